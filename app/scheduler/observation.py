"""
Observation: the cluster as the planner sees it, read from the database under the locks of the ledger.

What is read here decides what is granted next, in the same transaction. A row with invalid values is logged and left
out; the bytes of a pool that was left out are not granted to other pools.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

import psycopg
from sqlalchemy import text

from app.catalog.model import Model
from app.devices.device import HardwareKind
from app.fleet import backoff
from app.fleet.backoff import Backoff, PastPool
from app.fleet.host import HostState
from app.fleet.hosts import unserved_model
from app.fleet.ledger.reservation import Reservation
from app.fleet.ledger.session import LedgerSession
from app.fleet.pool import Desired, PoolPhase, PoolState, state_of
from app.footprint.layout import KnownLayout
from app.kernel.database import UnitOfWork
from app.kernel.errors import DatabaseUnreachable
from app.kernel.loop_guard import LoopGuard
from app.kernel.priority import Priority
from app.scheduler import arrival_patterns, needs
from app.scheduler.arrival_patterns import LastRequest, StoredPatterns
from app.scheduler.needs import OperatorTarget
from app.scheduler.planner.cluster import NO_TIME, Account, Cluster, Configuration, Device, Pool
from app.scheduler.planner.demand import WaitingSteps
from app.scheduler.residencies import Residency

#: A row with invalid values is left out; the others are read.
_GUARD = LoopGuard(psycopg.Error, DatabaseUnreachable)

_DEVICES = text("""
    SELECT device.id, device.name, host, kind, type, capacity_bytes, unmanaged_bytes, speed, CASE
               WHEN lost_at IS NOT NULL THEN 'lost'
               WHEN host.state = 'schedulable' AND NOT (present AND host.agent_until > now()) THEN 'cordoned'
               ELSE host.state
           END AS state
    FROM device JOIN host ON host.name = device.host ORDER BY device.id
""")
_HOSTS = text("SELECT name, files, problems FROM host WHERE lost_at IS NULL ORDER BY name")
_POOLS = text("""
    SELECT pool.id::text, pool.configuration, slots, desired, created_at, estimate_seconds, stop_at,
           phase, COALESCE(busy, 0) AS busy, urgent, serving_at, last_used_at, worker,
           agent_until < now() AND COALESCE(heartbeat_at, created_at) < agent_until AS silent
    FROM pool JOIN reservation ON reservation.id = pool.id JOIN host ON host.name = reservation.host
    LEFT JOIN pool_report ON pool_report.pool_id = pool.id
    WHERE reservation.state <> 'released' ORDER BY created_at, pool.id
""")
_LAYOUTS = text(
    "SELECT configuration, type, devices, parts, ram_bytes, source, load_seconds, tokens_per_second FROM layout"
)
_STARTS = text(
    "SELECT id::text, model FROM pool_command WHERE command = 'start' AND done_at IS NULL ORDER BY created_at"
)
_TARGETS = text("SELECT model, pools, pinned FROM pool_target")
_START_TIMES = text("""
    SELECT model, max(created_at) AS since FROM pool_command
    WHERE command = 'start' AND created_at > now() - :age GROUP BY model
""")
_PAST = text("""
    SELECT pool.configuration, host, ended_at AS ended, failed, serving_at IS NOT NULL AS served,
           COALESCE(ending, '') AS ending
    FROM pool_process JOIN pool ON pool.id = pool_process.pool_id JOIN reservation ON reservation.id = pool.id
    LEFT JOIN pool_report ON pool_report.pool_id = pool.id
    WHERE released_at > now() - :age AND reservation.state = 'released' AND pool_process.state = 'ended'
      AND ended_at IS NOT NULL
""")
_ACCOUNTS = text("""
    SELECT namespace, weight, max_bytes, attained_seconds, CASE
        WHEN device_seconds >= max_device_seconds THEN period_began + period_seconds * interval '1 s'
    END AS until
    FROM quota
""")


@dataclass(frozen=True, slots=True)
class InFlight:
    """The steps that a worker executes now."""

    #: Expected time that a step of its model keeps a slot.
    work: timedelta
    #: How many there are, by namespace.
    steps: Mapping[str, int] = field(default_factory=dict)
    #: The highest number of preemptions among them.
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class FleetDemand:
    """The demand on the fleet: the models that can be served, and the steps that need them."""

    #: The catalogue.
    models: Sequence[Model]
    waiting: Sequence[WaitingSteps]
    #: By model and class, steps a second that asked for the model over the last minutes.
    rates: Mapping[str, Mapping[Priority, float]]
    #: By model, what the settings ask for.
    targets: Mapping[str, OperatorTarget]
    #: By worker.
    in_flight: Mapping[str, InFlight] = field(default_factory=dict)
    #: By model, for how long clients want it to stay loaded.
    residencies: Mapping[str, Residency] = field(default_factory=dict)
    #: Models that are not served for a while: their steps wait, and their pools are stopped.
    paused: frozenset[str] = frozenset()
    #: By model, its last request in the minutes of the rates.
    requests: Mapping[str, LastRequest] = field(default_factory=dict)

    @property
    def served(self) -> list[WaitingSteps]:
        """The steps that wait for models that are served."""
        return [group for group in self.waiting if group.model not in self.paused]


@dataclass(frozen=True, slots=True)
class StartCommand:
    """An operator's open command to start a pool of a model."""

    id: str
    model: str


@dataclass(frozen=True, slots=True)
class Observation:
    """The cluster at one instant, and the open commands of operators."""

    now: datetime
    cluster: Cluster
    #: By name of the model.
    configurations: Mapping[str, Configuration]
    starts: tuple[StartCommand, ...]
    patterns: StoredPatterns = field(default_factory=lambda: StoredPatterns({}, {}))


@dataclass(frozen=True, slots=True)
class PoolRecord:
    """A pool that holds bytes: what is desired of it, and what it last reported."""

    id: str
    configuration: str
    slots: int
    desired: str
    created_at: datetime
    estimate_seconds: float
    stop_at: datetime | None
    phase: str | None
    busy: int
    #: The most urgent class among its steps.
    urgent: str | None
    serving_at: datetime | None
    last_used_at: datetime | None
    worker: str | None
    #: Neither the pool nor the agent of its host was heard since the agent's lease ended.
    silent: bool


def observe(session: LedgerSession, demand: FleetDemand) -> Observation:
    """Read everything that the planner decides on."""
    work, now = session.work, session.now
    starts = tuple(work.rows_of(StartCommand, _STARTS))
    configurations = _configurations(work, demand.models, _targets(work, demand.targets, starts))
    devices = _devices(work)
    known = {device.id for device in devices}
    pools = _pools(work, session.ledger.reservations, known, demand.in_flight)
    configurations = _with_residencies(configurations, pools, demand.residencies)
    for model in demand.paused & configurations.keys():
        configurations[model] = replace(
            configurations[model], min_pools=0, max_pools=0, requested=0, reserve=None, pinned=False
        )
    patterns = arrival_patterns.read(work, configurations.keys(), demand.requests)
    cluster = Cluster(
        devices=tuple(_with_unread(devices, session.ledger.reservations.values(), pools)),
        pools=tuple(pools),
        configurations=tuple(configurations.values()),
        reserves=tuple(one for one in session.ledger.reserves.values() if one.bytes.keys() <= known),
        rates=demand.rates,
        arrivals={model: found for model, found in patterns.current.items() if model not in demand.paused},
        accounts={
            row.namespace: Account(row.weight, row.attained_seconds, row.max_bytes, row.until)
            for row in work.rows(_ACCOUNTS)
        },
        backoffs=_backoffs(work, configurations, now),
    )
    return Observation(now, cluster, configurations, starts, patterns)


def _devices(work: UnitOfWork) -> list[Device]:
    found = []
    for row in work.rows(_DEVICES):
        with _GUARD.item("device", row.id):
            enums = {"kind": HardwareKind(row.kind), "state": HostState(row.state)}
            found.append(Device(**row._asdict() | enums))
    return found


def _with_unread(
    devices: Iterable[Device], reservations: Iterable[Reservation], pools: Iterable[Pool]
) -> Iterator[Device]:
    """The devices, with the bytes of pools that could not be read counted as unmanaged."""
    read = {pool.id for pool in pools}
    unread: dict[str, int] = {}
    for reservation in reservations:
        if reservation.id not in read:
            for id_, size in reservation.bytes.items():
                unread[id_] = unread.get(id_, 0) + size
    for device in devices:
        more = unread.get(device.id, 0)
        yield replace(device, unmanaged_bytes=device.unmanaged_bytes + more) if more else device


def _pools(
    work: UnitOfWork, reservations: Mapping[str, Reservation], devices: set[str], in_flight: Mapping[str, InFlight]
) -> list[Pool]:
    found = []
    for record in work.rows_of(PoolRecord, _POOLS):
        with _GUARD.item("pool", record.id):
            reservation = reservations[record.id]
            if unknown := reservation.bytes.keys() - devices:
                raise ValueError(f"it holds bytes of devices that cannot be read: {', '.join(sorted(unknown))}")
            found.append(_pool(record, reservation, in_flight.get(record.worker or "")))
    return found


def _pool(record: PoolRecord, reservation: Reservation, in_flight: InFlight | None) -> Pool:
    desired, phase = Desired(record.desired), None if record.phase is None else PoolPhase(record.phase)
    state = state_of(reservation.state, waits=bool(reservation.backing), desired=desired, phase=phase)
    if record.silent:
        # Pools that wait for its bytes do not wait for the end of its lease.
        state = PoolState.SUSPECT
    return Pool(
        id=record.id,
        configuration=record.configuration,
        state=state,
        bytes=reservation.bytes,
        slots=record.slots,
        started=record.created_at,
        busy=record.busy,
        serving=None if record.urgent is None else Priority(record.urgent),
        work_left=_work_left(record.busy, in_flight),
        preemptions=in_flight.preemptions if in_flight else 0,
        loaded=record.serving_at,
        last_used=record.last_used_at,
        expected=record.created_at + timedelta(seconds=record.estimate_seconds),
        stopping=record.stop_at,
        preempting=desired is Desired.PREEMPT,
        pinned=reservation.pinned,
        epoch=reservation.epoch,
        backing=reservation.backing,
        namespace=reservation.namespace,
    )


def _work_left(busy: int, in_flight: InFlight | None) -> timedelta:
    """Time until the last step in flight ends: one is half done on average, and the last of several takes longer."""
    if in_flight is None or not busy:
        return timedelta(0)
    return in_flight.work / 2 * (1 + math.log(busy))


def _configurations(
    work: UnitOfWork, models: Iterable[Model], targets: Mapping[str, OperatorTarget]
) -> dict[str, Configuration]:
    layouts = _layouts(work)
    files: dict[str, dict[str, timedelta]] = {}
    unusable: dict[str, dict[str, str]] = {}
    for host in work.rows(_HOSTS):
        for configuration in host.files:
            files.setdefault(configuration, {})[host.name] = NO_TIME
        for name, reason in filter(None, map(unserved_model, host.problems)):
            unusable.setdefault(name, {})[host.name] = reason
    found = {}
    for model in models:
        with _GUARD.item("model", model.name):
            id_ = needs.configuration_id(model)
            target = targets.get(model.name, OperatorTarget())
            hosts, problems = files.get(id_, {}), unusable.get(model.name, {})
            found[model.name] = needs.configuration_of(model, layouts.get(id_, ()), hosts, target, problems)
    return found


def _with_residencies(
    configurations: Mapping[str, Configuration], pools: Iterable[Pool], residencies: Mapping[str, Residency]
) -> dict[str, Configuration]:
    """
    The configurations with what clients want of them, as long as one of the pools that it is for stays.

    A pool that drains does not count: `keep_alive` 0 unloaded it, and does not hold for the pool that comes after it.
    """
    found, ids = dict(configurations), {pool.id for pool in pools if pool.state is not PoolState.DRAINING}
    for model, residency in residencies.items():
        if model in found and not residency.pools.isdisjoint(ids):
            found[model] = replace(found[model], keep_alive=residency.keep)
    return found


def _layouts(work: UnitOfWork) -> dict[str, list[KnownLayout]]:
    """The layouts of each configuration."""
    found: dict[str, list[KnownLayout]] = {}
    for row in work.rows(_LAYOUTS):
        with _GUARD.item("layout", row.configuration):
            parts, pace = tuple(row.parts), row.tokens_per_second
            if not parts or not all(isinstance(part, int) and part >= 0 for part in parts):
                raise ValueError(f"a layout on {row.type} has the parts {parts}, which are no numbers of bytes")
            if not 0 < pace < math.inf:
                raise ValueError(f"a layout on {row.type} has {pace} tokens a second")
            load = timedelta(seconds=row.load_seconds)
            layout = KnownLayout(row.configuration, row.type, parts, row.source, load, pace, row.ram_bytes)
            found.setdefault(row.configuration, []).append(layout)
    return found


def _targets(
    work: UnitOfWork, settings: Mapping[str, OperatorTarget], starts: Iterable[StartCommand]
) -> dict[str, OperatorTarget]:
    """The pools of each model that the settings, the targets of operators and their open commands ask for."""
    found = dict(settings)
    for row in work.rows(_TARGETS):
        before = found.get(row.model, OperatorTarget())
        found[row.model] = OperatorTarget(max(before.pools, row.pools), before.pinned or row.pinned)
    for command in starts:
        found[command.model] = replace(found.get(command.model, OperatorTarget()), requested=1)
    return found


def _backoffs(work: UnitOfWork, configurations: Mapping[str, Configuration], now: datetime) -> tuple[Backoff, ...]:
    age = {"age": backoff.QUARANTINE * 2}
    cleared = {
        configurations[row.model].id: row.since for row in work.rows(_START_TIMES, age) if row.model in configurations
    }
    return backoff.backoffs(work.rows_of(PastPool, _PAST, age), cleared, now)
