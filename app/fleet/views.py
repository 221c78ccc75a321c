"""
Views of the fleet: its state as operators and clients read it. Nothing here changes anything.

A view is read by one query, and its fields have the names of the columns. A simulated device, and a pool on one, is
called simulated in every view.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime

from sqlalchemy import text

from app.access.accounts import NamespaceAccount, list_accounts
from app.fleet.ledger.reservation import ReservationState
from app.fleet.pool import Desired, PoolPhase, PoolState, state_of
from app.kernel.database import Database, UnitOfWork
from app.kernel.errors import Conflict, NotFound

_HOSTS = text("""
    SELECT name, CASE WHEN lost_at IS NULL THEN state ELSE 'lost' END AS state,
           lost_at IS NULL AND agent_until > now() AS alive, joined_at, cores, problems
    FROM host WHERE CAST(:name AS text) IS NULL OR name = :name ORDER BY name
""")
_DEVICES = text("""
    SELECT id, host, name, kind, type, simulated, present, total_bytes AS total, capacity_bytes AS capacity,
           charged_bytes AS reserved, capacity_bytes - charged_bytes AS free, used_bytes AS used,
           unmanaged_bytes AS unmanaged, temperature, utilisation,
           (SELECT COALESCE(sum(bytes), 0) FROM reserved_capacity WHERE device_id = device.id)::bigint AS guaranteed
    FROM device ORDER BY host, kind, name
""")
_POOLS = text("""
    SELECT pool.id::text, pool.configuration, pool.model, pool.slots, purpose, reason, desired, stop_reason,
           created_at, reservation.host, reservation.state AS reservation_state, reservation.pinned,
           ARRAY(SELECT victim_id::text FROM promise WHERE reservation_id = pool.id) AS waits_for,
           COALESCE((SELECT jsonb_object_agg(device_id, bytes) FROM reservation_device
                     WHERE reservation_id = pool.id), '{}') AS bytes,
           ARRAY(SELECT device.name FROM reservation_device JOIN device ON device.id = device_id
                 WHERE reservation_id = pool.id ORDER BY device.name COLLATE "C") AS devices,
           COALESCE((SELECT bool_or(simulated) FROM reservation_device JOIN device ON device.id = device_id
                     WHERE reservation_id = pool.id), false) AS simulated,
           pid, threads, COALESCE(ended_at, released_at) AS ended_at, COALESCE(failed, false) AS failed,
           COALESCE(NULLIF(ending, ''), release_reason) AS ending, COALESCE(used, '{}') AS used,
           COALESCE(peak, '{}') AS peak, phase, COALESCE(progress, 0) AS progress, COALESCE(detail, '') AS detail,
           COALESCE(worker, '') AS worker, COALESCE(busy, 0) AS busy, heartbeat_at, serving_at, last_used_at
    FROM pool JOIN reservation ON reservation.id = pool.id
    LEFT JOIN pool_process ON pool_process.pool_id = pool.id LEFT JOIN pool_report ON pool_report.pool_id = pool.id
    WHERE (:ended OR reservation.state <> 'released') AND (CAST(:model AS text) IS NULL OR pool.model = :model)
      AND (CAST(:id AS text) IS NULL OR right(pool.id::text, length(:id)) = lower(:id))
    ORDER BY created_at DESC, pool.id DESC LIMIT :limit
""")
_LOG = text("SELECT log_tail FROM pool_process WHERE pool_id = CAST(:id AS uuid)")
_REFUSALS = text("""
    SELECT model, reason, needs_bytes AS needs, estimate_seconds AS estimate_s, since FROM refusal ORDER BY since
""")
_TARGETS = text("SELECT model, pools, pinned FROM pool_target ORDER BY model")
_RESERVES = text("""
    SELECT configuration, min(device.host) AS host, array_agg(device.name ORDER BY device.name COLLATE "C") AS devices,
           bool_or(device.simulated) AS simulated, jsonb_object_agg(device_id, bytes) AS bytes,
           min(reserved_capacity.created_at) AS since
    FROM reserved_capacity JOIN device ON device.id = device_id
    GROUP BY reserved_capacity.id, configuration ORDER BY since, reserved_capacity.id
""")
# The ledger and the observation of the agents disagree here. A running agent resolves each case shortly.
_ORPHANS = text("""
    SELECT CASE WHEN reservation.state = 'released' THEN 'process' ELSE 'reservation' END AS kind,
           pool.id::text AS pool, pool.model, reservation.host, pid,
           CASE WHEN reservation.state = 'released' THEN released_at ELSE COALESCE(ended_at, lease_until) END AS since
    FROM pool JOIN reservation ON reservation.id = pool.id LEFT JOIN pool_process ON pool_process.pool_id = pool.id
    WHERE CASE WHEN reservation.state = 'released' THEN pool_process.state <> 'ended'
               ELSE reservation.state = 'suspect' OR pool_process.state = 'ended' END
    ORDER BY since
""")
_DEFRAGMENTATIONS = text("SELECT at, moves, gains, stuck FROM defragmentation ORDER BY at DESC LIMIT :limit")

#: Most pools in one list.
MOST = 500


@dataclass(frozen=True, slots=True)
class DeviceView:
    """A device of a host: its memory, and the part that is reserved. Sizes are bytes."""

    id: str
    host: str
    name: str
    kind: str
    type: str
    simulated: bool
    #: False when its agent no longer finds it.
    present: bool
    total: int
    #: Most bytes that all reservations together may have.
    capacity: int
    reserved: int
    free: int
    #: Guaranteed to models, loaded or not.
    guaranteed: int
    #: In use by all processes, as measured.
    used: int
    #: In use by processes without a reservation.
    unmanaged: int
    temperature: int | None
    utilisation: float | None


@dataclass(frozen=True, slots=True)
class HostView:
    """A host and its devices."""

    name: str
    #: A HostState.
    state: str
    #: Its agent sent a heartbeat recently.
    alive: bool
    joined_at: datetime
    cores: int
    problems: list[str]
    devices: tuple[DeviceView, ...] = ()


@dataclass(frozen=True, slots=True)
class PoolView:
    """A pool: its reservation, its process and its last report. Sizes are bytes, by id of the device."""

    id: str
    configuration: str
    model: str
    slots: int
    purpose: str
    reason: str
    #: A Desired.
    desired: str
    stop_reason: str | None
    created_at: datetime
    host: str
    #: A ReservationState.
    reservation_state: str
    pinned: bool
    #: Ids of the pools whose bytes it gets when they have ended.
    waits_for: list[str]
    bytes: Mapping[str, int]
    #: Names of its devices.
    devices: list[str]
    simulated: bool
    pid: int | None
    threads: int | None
    ended_at: datetime | None
    failed: bool
    ending: str | None
    used: Mapping[str, int]
    peak: Mapping[str, int]
    #: A PoolPhase; None before its first heartbeat.
    phase: str | None
    progress: float
    detail: str
    worker: str
    busy: int
    heartbeat_at: datetime | None
    serving_at: datetime | None
    last_used_at: datetime | None

    @property
    def state(self) -> PoolState | None:
        """Its state; None once its bytes are released."""
        if self.reservation_state == ReservationState.RELEASED:
            return None
        phase = None if self.phase is None else PoolPhase(self.phase)
        return state_of(
            ReservationState(self.reservation_state),
            waits=bool(self.waits_for),
            desired=Desired(self.desired),
            phase=phase,
        )

    @property
    def name(self) -> str:
        """Its name in Celery, logs and Flower."""
        slug = self.configuration.rpartition(".")[0]
        return self.worker or f"{'simulated-' if self.simulated else ''}pool.{slug}.{self.id[-6:]}"


@dataclass(frozen=True, slots=True)
class RefusalView:
    """The reason why a model with demand is not started."""

    model: str
    reason: str
    #: Bytes of its smallest layout.
    needs: int
    #: Seconds until it serves; None when waiting alone does not help.
    estimate_s: float | None
    since: datetime


@dataclass(frozen=True, slots=True)
class TargetView:
    """A model that an operator keeps running."""

    model: str
    pools: int
    pinned: bool


@dataclass(frozen=True, slots=True)
class ReserveView:
    """Guaranteed capacity of a configuration, on a set of devices."""

    configuration: str
    host: str
    #: Their names.
    devices: list[str]
    simulated: bool
    bytes: Mapping[str, int]
    since: datetime


@dataclass(frozen=True, slots=True)
class OrphanView:
    """A process without a reservation, or a reservation whose process is gone or silent."""

    #: `process` or `reservation`.
    kind: str
    pool: str
    model: str
    host: str
    pid: int | None
    since: datetime


@dataclass(frozen=True, slots=True)
class DefragmentationView:
    """A past defragmentation: its moves, the models that fit after them, and those that still did not."""

    at: datetime
    moves: list[dict[str, str]]
    gains: list[dict[str, str]]
    stuck: list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class FleetView:
    """The whole fleet at one instant."""

    hosts: Sequence[HostView]
    pools: Sequence[PoolView]
    refusals: Sequence[RefusalView]
    targets: Sequence[TargetView]
    reserves: Sequence[ReserveView]
    orphans: Sequence[OrphanView]


def fleet(database: Database) -> FleetView:
    """Return the whole fleet at one instant."""
    with _snapshot(database) as work:
        return FleetView(
            hosts=_hosts(work),
            pools=_pools(work),
            refusals=work.rows_of(RefusalView, _REFUSALS),
            targets=work.rows_of(TargetView, _TARGETS),
            reserves=work.rows_of(ReserveView, _RESERVES),
            orphans=work.rows_of(OrphanView, _ORPHANS),
        )


def targets(database: Database) -> Sequence[TargetView]:
    """The models that operators keep running."""
    with database.work() as work:
        return work.rows_of(TargetView, _TARGETS)


def hosts(database: Database) -> Sequence[HostView]:
    """Return all hosts with their devices."""
    with _snapshot(database) as work:
        return _hosts(work)


def host(database: Database, name: str) -> HostView:
    """Return a host and its devices. Raises NotFound."""
    with _snapshot(database) as work:
        found = _hosts(work, name)
    if not found:
        raise NotFound("host", name)
    return found[0]


def pools(database: Database, *, model: str | None = None, ended: bool = False) -> Sequence[PoolView]:
    """Return pools, the newest first; with `ended`, also those that ended recently."""
    with database.work() as work:
        return _pools(work, model=model, ended=ended)


def pool(database: Database, id_: str) -> PoolView:
    """
    Return a pool by its id, or by the end of its id.

    Raises NotFound, and Conflict when several ids have this end.
    """
    with database.work() as work:
        found = _pools(work, id_=id_, ended=True)
    if not found:
        raise NotFound("pool", id_)
    if len(found) > 1:
        raise Conflict(f"{len(found)} pools have an id that ends in {id_!r}: give more of it")
    return found[0]


def log_tail(database: Database, id_: str) -> str:
    """Return the last lines of a pool's log. Raises the errors of `pool`."""
    found = pool(database, id_)
    with database.work() as work:
        row = work.row(_LOG, {"id": found.id})
    return "" if row is None else str(row.log_tail)


def accounts(database: Database) -> list[NamespaceAccount]:
    """Return the namespaces that have limits or used devices recently."""
    with database.work() as work:
        return list_accounts(work)


def defragmentations(database: Database, *, limit: int) -> Sequence[DefragmentationView]:
    """Return past defragmentations, the latest first."""
    with database.work() as work:
        return work.rows_of(DefragmentationView, _DEFRAGMENTATIONS, {"limit": limit})


def _hosts(work: UnitOfWork, name: str | None = None) -> list[HostView]:
    devices: dict[str, list[DeviceView]] = {}
    for device in work.rows_of(DeviceView, _DEVICES):
        devices.setdefault(device.host, []).append(device)
    return [
        replace(host, devices=tuple(devices.get(host.name, ())))
        for host in work.rows_of(HostView, _HOSTS, {"name": name})
    ]


def _pools(
    work: UnitOfWork, *, model: str | None = None, id_: str | None = None, ended: bool = False
) -> list[PoolView]:
    return work.rows_of(PoolView, _POOLS, {"model": model, "id": id_, "ended": ended, "limit": MOST})


@contextmanager
def _snapshot(database: Database) -> Iterator[UnitOfWork]:
    """A transaction whose statements all see the same instant."""
    with database.work() as work:
        work.run(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"))
        yield work
