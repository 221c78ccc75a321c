"""
The books: the ledger in the database, opened under the locks of its hosts and closed with what was changed.

Whoever changes what is granted on a host holds the lock of the host's row: the ledger that is read then cannot change
before it is written. A renewal touches one reservation only, and takes the lock of that alone.
The sums on the devices are written with the claims, in one transaction, and Postgres itself refuses a device that is
charged above its capacity: a defect here fails, and grants nothing.

Hosts are locked before everything else, in the order of their names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import text

from app.fleet.ledger import rules as ledgers
from app.fleet.ledger.reservation import (
    DeviceCapacity,
    Ledger,
    Quota,
    Reservation,
    ReservationRefused,
    ReservationState,
    ReservedCapacity,
)
from app.kernel.database import UnitOfWork
from app.kernel.errors import LeaseLost

_HOSTS = """
    SELECT name, state = 'schedulable' AND lost_at IS NULL AS schedulable, agent_epoch FROM host
    WHERE CAST(:host AS text) IS NULL OR name = :host ORDER BY name
"""
_LOCK_HOSTS, _LOOK_AT_HOSTS = text(f"{_HOSTS} FOR UPDATE"), text(_HOSTS)
_DEVICES = text("""
    SELECT id, host, present, capacity_bytes, charged_bytes, non_preemptible_bytes FROM device WHERE host = ANY(:hosts)
""")
_RESERVATIONS = text("""
    SELECT id::text, epoch, revision, state, host, configuration, draining, pinned, namespace, lease_until,
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
_LOCK_QUOTAS, _LOOK_AT_QUOTAS = text(f"{_QUOTAS} FOR UPDATE"), text(_QUOTAS)
_CHARGE = text("""
    UPDATE device SET capacity_bytes = :capacity, charged_bytes = :charged, non_preemptible_bytes = :non_preemptible
    WHERE id = :id
""")
_INSERT = text("""
    INSERT INTO reservation (id, epoch, revision, state, host, configuration, draining, pinned, namespace, lease_until)
    VALUES (CAST(:id AS uuid), :epoch, 0, :state, :host, :configuration, :draining, :pinned, :namespace, :lease_until)
""")
_INSERT_CLAIM = text(
    "INSERT INTO reservation_device (reservation_id, device_id, bytes) VALUES (CAST(:id AS uuid), :device, :bytes)"
)
_INSERT_PROMISE = text("""
    INSERT INTO promise (reservation_id, victim_id, device_id, bytes)
    VALUES (CAST(:id AS uuid), CAST(:victim AS uuid), :device, :bytes)
""")
_UPDATE = text("""
    UPDATE reservation SET state = CAST(:state AS text), revision = :revision, draining = :draining,
        lease_until = :lease_until,
        activated_at = CASE WHEN CAST(:state AS text) = 'held' THEN NULL ELSE COALESCE(activated_at, now()) END
    WHERE id = CAST(:id AS uuid)
""")
_UPDATE_CLAIM = text("""
    UPDATE reservation_device SET bytes = :bytes WHERE reservation_id = CAST(:id AS uuid) AND device_id = :device
""")
_DROP_PROMISES = text("""
    DELETE FROM promise WHERE reservation_id = CAST(:id AS uuid) OR victim_id = CAST(:id AS uuid)
""")
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
_ONE = text("""
    SELECT id::text, epoch, revision, state, host, configuration, draining, pinned, namespace, lease_until,
           '{}'::jsonb AS bytes
    FROM reservation WHERE id = CAST(:id AS uuid) AND state <> 'released' FOR UPDATE
""")
_RENEW = text("""
    UPDATE reservation SET state = :state, lease_until = :lease_until WHERE id = CAST(:id AS uuid)
""")


@dataclass(slots=True)
class LedgerSession:
    """The open ledger of some hosts. `ledger` moves on with each change; nothing is written before `close`."""

    work: UnitOfWork
    #: The database's clock, at the begin of the transaction.
    now: datetime
    ledger: Ledger
    _before: Ledger
    #: By device, what its row says: capacity, charged, non_preemptible.
    _sums: dict[str, tuple[int, int, int]]
    _reason: dict[str, str]

    def change(
        self, act: Callable[[Ledger], Ledger | ReservationRefused], reason: str = ""
    ) -> ReservationRefused | None:
        """
        Let the ledger move on, or give the reason why it does not. `reason` is kept of what is given back by it.

        Raises what `act` raises.
        """
        result = act(self.ledger)
        if isinstance(result, ReservationRefused):
            return result
        for id_ in self.ledger.reservations.keys() - result.reservations.keys():
            self._reason[id_] = reason
        self.ledger = result
        return None

    def close(self) -> None:
        """Write what has changed."""
        before, after = self._before, self.ledger
        for id_ in before.reservations.keys() - after.reservations.keys():
            self.work.run(_DROP_PROMISES, {"id": id_})
            self.work.run(_RELEASE, {"id": id_, "reason": self._reason.get(id_, "")})
        for id_, one in after.reservations.items():
            if (old := before.reservations.get(id_)) is None:
                self._insert(one)
            elif old != one:
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
        self._write_sums()
        for namespace, quota in after.quotas.items():
            if quota.held_bytes != before.quotas[namespace].held_bytes:
                self.work.run(_COUNT, {"namespace": namespace, "held": quota.held_bytes})
        self._before = after

    def _insert(self, one: Reservation) -> None:
        values = {
            "id": one.id,
            "epoch": one.epoch,
            "state": one.state,
            "host": one.host,
            "configuration": one.configuration,
            "draining": one.draining,
            "pinned": one.pinned,
            "namespace": one.namespace,
            "lease_until": one.lease_until,
        }
        self.work.run(_INSERT, values)
        self.work.run(_INSERT_CLAIM, [{"id": one.id, "device": d, "bytes": size} for d, size in one.bytes.items()])
        promises = [
            {"id": one.id, "victim": victim, "device": device, "bytes": size}
            for victim, part in one.backing.items()
            for device, size in part.items()
        ]
        if promises:
            self.work.run(_INSERT_PROMISE, promises)

    def _update(self, old: Reservation, one: Reservation) -> None:
        values = {
            "id": one.id,
            "state": one.state,
            "revision": one.revision,
            "draining": one.draining,
            "lease_until": one.lease_until,
        }
        self.work.run(_UPDATE, values)
        for device, size in one.bytes.items():
            if size != old.bytes[device]:
                self.work.run(_UPDATE_CLAIM, {"id": one.id, "device": device, "bytes": size})

    def _write_sums(self) -> None:
        for id_, book in self.ledger.devices.items():
            sums = (book.capacity, self.ledger.charged(id_), self.ledger.non_preemptible(id_))
            if self._sums.get(id_) != sums:
                self.work.run(
                    _CHARGE, dict(zip(("id", "capacity", "charged", "non_preemptible"), (id_, *sums), strict=True))
                )
                self._sums[id_] = sums


def open_session(work: UnitOfWork, host: str | None = None, *, to_read: bool = False) -> LedgerSession:
    """The ledger of a host, or of all, locked until the end of the transaction, but for one that is only `to_read`."""
    hosts = work.rows(_LOOK_AT_HOSTS if to_read else _LOCK_HOSTS, {"host": host})
    names = {"hosts": [row.name for row in hosts]}
    is_open = {row.name: row.schedulable for row in hosts}
    now = _now(work)
    devices = work.rows(_DEVICES, names)
    backing: dict[str, dict[str, dict[str, int]]] = {}
    for row in work.rows(_PROMISES, names):
        backing.setdefault(row.reservation_id, {}).setdefault(row.victim_id, {})[row.device_id] = row.bytes
    quotas = work.rows(_LOOK_AT_QUOTAS if to_read else _LOCK_QUOTAS)
    ledger = Ledger(
        devices={
            row.id: DeviceCapacity(row.host, row.capacity_bytes, open=row.present and is_open[row.host])
            for row in devices
        },
        agents={row.name: row.agent_epoch for row in hosts if row.agent_epoch},
        reservations={row.id: _reservation(row, backing.get(row.id, {})) for row in work.rows(_RESERVATIONS, names)},
        reserves={
            row.id: ReservedCapacity(row.id, row.configuration, row.bytes) for row in work.rows(_RESERVES, names)
        },
        quotas={row.namespace: Quota(row.max_bytes, row.held_bytes, row.until) for row in quotas},
    )
    sums = {row.id: (row.capacity_bytes, row.charged_bytes, row.non_preemptible_bytes) for row in devices}
    return LedgerSession(work, now, ledger, ledger, sums, {})


def renew(work: UnitOfWork, id_: str, epoch: int, lease: Any) -> None:
    """
    Extend the lease of a holder by `lease`, a duration, from now on.

    Raises LeaseLost when it was given back, or the epoch is another.
    """
    row = work.row(_ONE, {"id": id_})
    if row is None:
        raise LeaseLost(f"reservation {id_} was given back")
    part = Ledger(reservations={id_: _reservation(row, {})})
    renewed = ledgers.renew(part, id_, epoch, _now(work) + lease).reservations[id_]
    work.run(_RENEW, {"id": id_, "state": renewed.state, "lease_until": renewed.lease_until})


def next_epoch(work: UnitOfWork) -> int:
    """A number above all that were given before."""
    row = work.row(text("SELECT nextval('fleet_epoch') AS epoch"))
    assert row is not None
    epoch: int = row.epoch
    return epoch


def _now(work: UnitOfWork) -> datetime:
    row = work.row(text("SELECT now() AS now"))
    assert row is not None
    now: datetime = row.now
    return now


def _reservation(row: Any, backing: dict[str, dict[str, int]]) -> Reservation:
    return Reservation(
        id=row.id,
        epoch=row.epoch,
        revision=row.revision,
        state=ReservationState(row.state),
        host=row.host,
        configuration=row.configuration,
        bytes=row.bytes,
        lease_until=row.lease_until,
        backing=backing,
        draining=row.draining,
        pinned=row.pinned,
        namespace=row.namespace,
    )
