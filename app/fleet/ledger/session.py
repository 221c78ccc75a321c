"""
The ledger session: the ledger of some hosts within one transaction.

It is read under the locks of the hosts' rows, changed by the rules, and written by `write`.
A change of a grant holds the lock of its host's row, so the ledger that was read cannot change before it is written.
A renewal touches one reservation and locks only that.
The sums on the devices are written in the transaction of the claims. A constraint of Postgres refuses a device that is
charged above its capacity, so that a defect here fails and grants nothing.

Hosts are locked before everything else, in the order of their names.

`_INSERT`, `_UPDATE` and `_RELEASE` are the only statements that write the state of a reservation, and each writes what
the rules made of it (`reservation.TRANSITIONS`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import TextClause, text

from app.fleet.ledger import rules
from app.fleet.ledger.reservation import (
    DeviceCapacity,
    Ledger,
    Quota,
    Reservation,
    ReservationRefused,
    ReservationState,
    ReservedCapacity,
)
from app.kernel.database import Parameters, UnitOfWork
from app.kernel.errors import LeaseLost

_HOSTS = """
    SELECT name, state = 'schedulable' AND lost_at IS NULL AS schedulable, agent_epoch FROM host
    WHERE CAST(:host AS text) IS NULL OR name = :host ORDER BY name
"""
_LOCK_HOSTS, _READ_HOSTS = text(f"{_HOSTS} FOR UPDATE"), text(_HOSTS)
_DEVICES = text("""
    SELECT id, host, present, capacity_bytes, charged_bytes, non_preemptible_bytes FROM device WHERE host = ANY(:hosts)
""")
_COLUMNS = """
    id::text, epoch, revision, state, host, configuration, draining, pinned, namespace, lease_until
"""
_RESERVATIONS = text(f"""
    SELECT {_COLUMNS},
           (SELECT jsonb_object_agg(device_id, bytes) FROM reservation_device
            WHERE reservation_id = reservation.id) AS bytes
    FROM reservation WHERE host = ANY(:hosts) AND state <> 'released'
""")
_PROMISES = text("""
    SELECT reservation_id::text, victim_id::text, device_id, bytes
    FROM promise JOIN reservation ON reservation.id = reservation_id WHERE host = ANY(:hosts)
""")
_RESERVES = text("""
    SELECT reserved_capacity.id::text, configuration, jsonb_object_agg(device_id, bytes) AS bytes
    FROM reserved_capacity JOIN device ON device.id = device_id WHERE host = ANY(:hosts)
    GROUP BY reserved_capacity.id, configuration
""")
_QUOTAS = """
    SELECT namespace, max_bytes, held_bytes, CASE
        WHEN device_seconds >= max_device_seconds THEN period_began + period_seconds * interval '1 s'
    END AS until
    FROM quota ORDER BY namespace
"""
_LOCK_QUOTAS, _READ_QUOTAS = text(f"{_QUOTAS} FOR UPDATE"), text(_QUOTAS)
_CHARGE = text("""
    UPDATE device SET capacity_bytes = :capacity, charged_bytes = :charged, non_preemptible_bytes = :non_preemptible
    WHERE id = :id
""")
# The state of a claim that was granted: held.
_INSERT = text("""
    INSERT INTO reservation (id, epoch, revision, state, host, configuration, draining, pinned, namespace, lease_until)
    VALUES (CAST(:id AS uuid), :epoch, :revision, :state, :host, :configuration, :draining, :pinned, :namespace,
            :lease_until)
""")
_INSERT_CLAIM = text(
    "INSERT INTO reservation_device (reservation_id, device_id, bytes) VALUES (CAST(:id AS uuid), :device, :bytes)"
)
_INSERT_PROMISE = text("""
    INSERT INTO promise (reservation_id, victim_id, device_id, bytes)
    VALUES (CAST(:id AS uuid), CAST(:victim AS uuid), :device, :bytes)
""")
# The edges between states in which a reservation is charged.
# A session does not lock reservations: a lease that was renewed since it read them stays renewed.
_UPDATE = text("""
    UPDATE reservation SET state = CAST(:state AS text), revision = :revision, draining = :draining,
        lease_until = GREATEST(lease_until, :lease_until),
        activated_at = CASE WHEN CAST(:state AS text) = 'held' THEN NULL ELSE COALESCE(activated_at, now()) END
    WHERE id = CAST(:id AS uuid)
""")
_UPDATE_CLAIM = text("""
    UPDATE reservation_device SET bytes = :bytes WHERE reservation_id = CAST(:id AS uuid) AND device_id = :device
""")
_DROP_PROMISES = text("""
    DELETE FROM promise WHERE reservation_id = CAST(:id AS uuid) OR victim_id = CAST(:id AS uuid)
""")
# The edges to `released`: the rules took the reservation out of the ledger.
_RELEASE = text("""
    UPDATE reservation SET state = 'released', released_at = now(), release_reason = :reason
    WHERE id = CAST(:id AS uuid)
""")
_COUNT = text("UPDATE quota SET held_bytes = :held WHERE namespace = :namespace")
_INSERT_RESERVE = text("""
    INSERT INTO reserved_capacity (id, device_id, configuration, bytes)
    VALUES (CAST(:id AS uuid), :device, :configuration, :bytes)
""")
_DROP_RESERVE = text("DELETE FROM reserved_capacity WHERE id = CAST(:id AS uuid)")
_LOCK_ONE = text(f"""
    SELECT {_COLUMNS}, '{{}}'::jsonb AS bytes
    FROM reservation WHERE id = CAST(:id AS uuid) AND state <> 'released' FOR UPDATE
""")


@dataclass(slots=True)
class LedgerSession:
    """The open ledger of some hosts. `change` replaces `ledger`; nothing is written before `close`."""

    work: UnitOfWork
    #: The database's clock at the start of the transaction.
    now: datetime
    ledger: Ledger
    _before: Ledger
    #: The sums in each device's row, by id: capacity, charged, non_preemptible.
    _sums: dict[str, tuple[int, int, int]]
    #: Why reservations were released, by id.
    _reasons: dict[str, str]
    #: The sums of every device were compared with its row; from then on only those are that a change touches.
    _compared: bool = False

    def change(
        self, rule: Callable[[Ledger], Ledger | ReservationRefused], reason: str = ""
    ) -> ReservationRefused | None:
        """
        Apply a rule to the ledger. Returns the refusal, or None. `reason` is stored with what the rule releases.

        Raises what `rule` raises.
        """
        result = rule(self.ledger)
        if isinstance(result, ReservationRefused):
            return result
        for id_ in self.ledger.reservations.keys() - result.reservations.keys():
            self._reasons[id_] = reason
        self.ledger = result
        return None

    def write(self) -> None:
        """Write all changes since the session was opened or last written."""
        before, after = self._before, self.ledger
        for id_ in before.reservations.keys() - after.reservations.keys():
            self.work.run(_DROP_PROMISES, {"id": id_})
            self.work.run(_RELEASE, {"id": id_, "reason": self._reasons.get(id_, "")})
        for id_, one in after.reservations.items():
            if (old := before.reservations.get(id_)) is None:
                self._insert(one)
            elif old is not one and old != one:
                self._update(old, one)
        for id_ in before.reserves.keys() - after.reserves.keys():
            self.work.run(_DROP_RESERVE, {"id": id_})
        for id_ in after.reserves.keys() - before.reserves.keys():
            reserve = after.reserves[id_]
            rows = [
                {"id": id_, "device": device, "configuration": reserve.configuration, "bytes": size}
                for device, size in reserve.bytes.items()
            ]
            self.work.run(_INSERT_RESERVE, rows)
        self._write_sums(_touched(before, after) if self._compared else None)
        self._compared = True
        for namespace, quota in after.quotas.items():
            if quota.held_bytes != before.quotas[namespace].held_bytes:
                self.work.run(_COUNT, {"namespace": namespace, "held": quota.held_bytes})
        self._before = after

    def _insert(self, one: Reservation) -> None:
        fixed = {
            "epoch": one.epoch,
            "host": one.host,
            "configuration": one.configuration,
            "pinned": one.pinned,
            "namespace": one.namespace,
        }
        self.work.run(_INSERT, fixed | _changing(one))
        self.work.run(_INSERT_CLAIM, [{"id": one.id, "device": d, "bytes": size} for d, size in one.bytes.items()])
        promises = [
            {"id": one.id, "victim": victim, "device": device, "bytes": size}
            for victim, part in one.backing.items()
            for device, size in part.items()
        ]
        if promises:
            self.work.run(_INSERT_PROMISE, promises)

    def _update(self, old: Reservation, one: Reservation) -> None:
        self.work.run(_UPDATE, _changing(one))
        for device, size in one.bytes.items():
            if size != old.bytes[device]:
                self.work.run(_UPDATE_CLAIM, {"id": one.id, "device": device, "bytes": size})

    def _write_sums(self, devices: Collection[str] | None) -> None:
        for id_, found in self.ledger.sums(devices).items():
            sums = (self.ledger.devices[id_].capacity, *found)
            if self._sums.get(id_) != sums:
                self.work.run(
                    _CHARGE, dict(zip(("id", "capacity", "charged", "non_preemptible"), (id_, *sums), strict=True))
                )
                self._sums[id_] = sums


def _touched(before: Ledger, after: Ledger) -> set[str]:
    """The devices that differ, or of which a reservation or a reserve differs."""
    found = {id_ for id_, one in after.devices.items() if one is not before.devices.get(id_)}
    for old, new in ((before.reservations, after.reservations), (before.reserves, after.reserves)):
        if old is not new:
            changed = [id_ for id_, one in new.items() if one is not old.get(id_)]
            changed += old.keys() - new.keys()
            found.update(
                device for id_ in changed for held in (old.get(id_), new.get(id_)) if held for device in held.bytes
            )
    return found


def open_session(work: UnitOfWork, host: str | None = None, *, to_read: bool = False) -> LedgerSession:
    """Open the ledger of a host, or of all. Unless it is `to_read`, it is locked until the end of the transaction."""
    hosts = work.rows(_READ_HOSTS if to_read else _LOCK_HOSTS, {"host": host})
    names = {"hosts": [row.name for row in hosts]}
    schedulable = {row.name: row.schedulable for row in hosts}
    now = _now(work)
    devices = work.rows(_DEVICES, names)
    backing: dict[str, dict[str, dict[str, int]]] = {}
    for row in work.rows(_PROMISES, names):
        backing.setdefault(row.reservation_id, {}).setdefault(row.victim_id, {})[row.device_id] = row.bytes
    quotas = work.rows(_READ_QUOTAS if to_read else _LOCK_QUOTAS)
    ledger = Ledger(
        devices={
            row.id: DeviceCapacity(row.host, row.capacity_bytes, open=row.present and schedulable[row.host])
            for row in devices
        },
        agents={row.name: row.agent_epoch for row in hosts if row.agent_epoch},
        reservations=_reservations(work, _RESERVATIONS, names, backing),
        reserves={
            row.id: ReservedCapacity(row.id, row.configuration, row.bytes) for row in work.rows(_RESERVES, names)
        },
        quotas={row.namespace: Quota(row.max_bytes, row.held_bytes, row.until) for row in quotas},
    )
    sums = {row.id: (row.capacity_bytes, row.charged_bytes, row.non_preemptible_bytes) for row in devices}
    return LedgerSession(work, now, ledger, ledger, sums, {})


def renew(work: UnitOfWork, id_: str, epoch: int, lease: timedelta) -> None:
    """
    Extend the lease of a holder to `lease` from now.

    Raises LeaseLost when the reservation was released, or the epoch is another.
    """
    held = _reservations(work, _LOCK_ONE, {"id": id_}, {})
    if not held:
        raise LeaseLost(f"reservation {id_} was released")
    part = Ledger(reservations=held)
    renewed = rules.renew(part, id_, epoch, _now(work) + lease).reservations[id_]
    work.run(_UPDATE, _changing(renewed))


def next_epoch(work: UnitOfWork) -> int:
    """Return a number above all that were returned before."""
    row = work.row(text("SELECT nextval('fleet_epoch') AS epoch"))
    assert row is not None
    epoch: int = row.epoch
    return epoch


def _now(work: UnitOfWork) -> datetime:
    row = work.row(text("SELECT now() AS now"))
    assert row is not None
    now: datetime = row.now
    return now


def _reservations(
    work: UnitOfWork,
    statement: TextClause,
    parameters: Parameters,
    backing: Mapping[str, Mapping[str, Mapping[str, int]]],
) -> dict[str, Reservation]:
    """The reservations of a statement by their ids; its columns are their fields but `backing`."""
    return {
        row.id: Reservation(
            **row._asdict() | {"state": ReservationState(row.state), "backing": backing.get(row.id, {})}
        )
        for row in work.rows(statement, parameters)
    }


def _changing(one: Reservation) -> dict[str, Any]:
    """The columns of a reservation that change after its grant, and its id."""
    return {
        "id": one.id,
        "state": one.state,
        "revision": one.revision,
        "draining": one.draining,
        "lease_until": one.lease_until,
    }
