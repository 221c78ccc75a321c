"""
Views of the fleet: what operators and clients read. Nothing here changes anything.

A device that is not there is called simulated in every view, and so is a pool on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import text

from app.access.accounts import NamespaceAccount, list_accounts
from app.fleet.ledger.reservation import ReservationState
from app.fleet.pool import Desired, PoolPhase, PoolState, state_of
from app.kernel.database import Database, UnitOfWork
from app.kernel.errors import Conflict, NotFound

_HOSTS = text("""
    SELECT name, CASE WHEN lost_at IS NULL THEN state ELSE 'lost' END AS state, agent_until > now() AS alive,
           joined_at, cores, problems
    FROM host ORDER BY name
""")
_DEVICES = text("""
    SELECT id, host, name, kind, type, uuid, simulated, present, total_bytes, capacity_bytes, charged_bytes,
           used_bytes, unmanaged_bytes, temperature, utilisation,
           (SELECT COALESCE(sum(bytes), 0) FROM reserved_capacity WHERE device_id = device.id)::bigint
               AS guaranteed_bytes
    FROM device ORDER BY host, kind, name
""")
_POOLS = text("""
    SELECT pool.id::text, pool.configuration, pool.model, pool.slots, purpose, reason, desired, stop_reason,
           estimate_seconds, created_at, reservation.host, reservation.state AS reserved, reservation.pinned,
           reservation.namespace, reservation.released_at, reservation.release_reason, reservation.epoch,
           EXISTS (SELECT FROM promise WHERE reservation_id = pool.id) AS waits,
           ARRAY(SELECT victim_id::text FROM promise WHERE reservation_id = pool.id) AS after,
           (SELECT jsonb_object_agg(device_id, bytes) FROM reservation_device WHERE reservation_id = pool.id) AS bytes,
           (SELECT jsonb_object_agg(device_id, device.name) FROM reservation_device JOIN device ON device.id = device_id
            WHERE reservation_id = pool.id) AS devices,
           (SELECT bool_or(simulated) FROM reservation_device JOIN device ON device.id = device_id
            WHERE reservation_id = pool.id) AS simulated,
           pool_process.state AS process_state, pid, threads, ended_at, returncode, failed, ending, used, peak,
           phase, progress, detail, worker, busy, heartbeat_at, serving_at, last_used_at, stalled_ms
    FROM pool JOIN reservation ON reservation.id = pool.id
    LEFT JOIN pool_process ON pool_process.pool_id = pool.id LEFT JOIN pool_report ON pool_report.pool_id = pool.id
    WHERE (:ended OR reservation.state <> 'released') AND (CAST(:model AS text) IS NULL OR pool.model = :model)
      AND (CAST(:id AS text) IS NULL OR right(pool.id::text, length(:id)) = lower(:id))
    ORDER BY created_at DESC, pool.id DESC LIMIT :limit
""")
_LOG = text("SELECT log_tail FROM pool_process WHERE pool_id = CAST(:id AS uuid)")
_REFUSALS = text("SELECT model, reason, needs_bytes, estimate_seconds, since FROM refusal ORDER BY since")
_TARGETS = text("SELECT model, pools, pinned FROM pool_target ORDER BY model")
_RESERVES = text("""
    SELECT reserved_capacity.id::text, configuration, min(reserved_capacity.created_at) AS since,
           min(device.host) AS host, jsonb_object_agg(device_id, bytes) AS bytes,
           jsonb_object_agg(device_id, device.name) AS devices, bool_or(device.simulated) AS simulated
    FROM reserved_capacity JOIN device ON device.id = device_id
    GROUP BY reserved_capacity.id, configuration ORDER BY since, reserved_capacity.id
""")
# What the ledger says against what agents saw: neither can be the case for longer than the agent needs to end it.
_ORPHANS = text("""
    SELECT pool.id::text, pool.model, reservation.host, pid,
           CASE WHEN reservation.state = 'released' THEN 'process' ELSE 'reservation' END AS kind,
           CASE WHEN reservation.state = 'released' THEN released_at ELSE COALESCE(ended_at, lease_until) END AS since
    FROM pool JOIN reservation ON reservation.id = pool.id LEFT JOIN pool_process ON pool_process.pool_id = pool.id
    WHERE CASE WHEN reservation.state = 'released' THEN pool_process.state <> 'ended'
               ELSE reservation.state = 'suspect' OR pool_process.state = 'ended' END
    ORDER BY since
""")
_DEFRAGMENTATIONS = text("SELECT at, moves, gains, stuck FROM defragmentation ORDER BY at DESC LIMIT :limit")

#: Pools in one list.
MOST = 500


@dataclass(frozen=True, slots=True)
class HostView:
    """A host and its devices, as rows."""

    host: Any
    devices: Sequence[Any]


@dataclass(frozen=True, slots=True)
class PoolView:
    """A pool, as its row, and where it stands; None once its bytes are back."""

    row: Any
    state: PoolState | None

    @property
    def id(self) -> str:
        """Its id."""
        id_: str = self.row.id
        return id_


@dataclass(frozen=True, slots=True)
class FleetView:
    """All of it, at one instant."""

    now: datetime
    hosts: Sequence[HostView]
    pools: Sequence[PoolView]
    refusals: Sequence[Any]
    targets: Sequence[Any]
    #: Bytes that models own before they are loaded.
    reserves: Sequence[Any]
    #: Processes without a reservation, and reservations whose process is gone or silent.
    orphans: Sequence[Any]


def fleet(database: Database) -> FleetView:
    """Hosts, devices, pools, and what is refused."""
    with _snapshot(database) as work:
        devices: dict[str, list[Any]] = {}
        for row in work.rows(_DEVICES):
            devices.setdefault(row.host, []).append(row)
        return FleetView(
            now=work.rows(text("SELECT now() AS now"))[0].now,
            hosts=[HostView(row, devices.get(row.name, [])) for row in work.rows(_HOSTS)],
            pools=_pools(work),
            refusals=work.rows(_REFUSALS),
            targets=work.rows(_TARGETS),
            reserves=work.rows(_RESERVES),
            orphans=work.rows(_ORPHANS),
        )


def hosts(database: Database) -> Sequence[HostView]:
    """Hosts and their devices."""
    return fleet(database).hosts


def pools(database: Database, *, model: str | None = None, ended: bool = False) -> Sequence[PoolView]:
    """Pools, the newest first; with those that have ended lately if so asked."""
    with database.work() as work:
        return _pools(work, model=model, ended=ended)


def pool(database: Database, id_: str) -> PoolView:
    """
    A pool by its id, or by the end of it.

    Raises NotFound, and Conflict when several end so.
    """
    with database.work() as work:
        found = _pools(work, id_=id_, ended=True)
    if not found:
        raise NotFound("pool", id_)
    if len(found) > 1:
        raise Conflict(f"{len(found)} pools have an id that ends in {id_!r}: give more of it")
    return found[0]


def log_tail(database: Database, id_: str) -> str:
    """The last lines that a pool wrote. Raises as `pool` does."""
    found = pool(database, id_)
    with database.work() as work:
        row = work.row(_LOG, {"id": found.id})
    return "" if row is None else str(row.log_tail)


def accounts(database: Database) -> list[NamespaceAccount]:
    """Namespaces with limits, and those that used devices lately."""
    with database.work() as work:
        return list_accounts(work)


def defragmentations(database: Database, *, limit: int) -> Sequence[Any]:
    """What was moved so that models fit, and what that gained; the latest first."""
    with database.work() as work:
        return work.rows(_DEFRAGMENTATIONS, {"limit": limit})


def _pools(
    work: UnitOfWork, *, model: str | None = None, id_: str | None = None, ended: bool = False
) -> list[PoolView]:
    rows = work.rows(_POOLS, {"model": model, "id": id_, "ended": ended, "limit": MOST})
    return [PoolView(row, _state(row)) for row in rows]


def _state(row: Any) -> PoolState | None:
    reserved = ReservationState(row.reserved)
    if reserved is ReservationState.RELEASED:
        return None
    phase = None if row.phase is None else PoolPhase(row.phase)
    return state_of(reserved, waits=row.waits, desired=Desired(row.desired), phase=phase)


@contextmanager
def _snapshot(database: Database) -> Iterator[UnitOfWork]:
    """One instant for all that is read."""
    with database.work() as work:
        work.run(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"))
        yield work
