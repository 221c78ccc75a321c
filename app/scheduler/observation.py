"""
Observation: the fleet as the planner sees it, read from the rows under the locks of the books.

What is read here decides what is granted next, in the same transaction. A row of which no value can be made is logged
and left out; the bytes of a pool that was left out are not granted to others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, TypeVar

import psycopg
from sqlalchemy import text

from app.catalog.model import Model
from app.fleet import backoff
from app.fleet.backoff import Backoff, Past
from app.fleet.ledger.reservation import ReservedCapacity
from app.fleet.ledger.session import LedgerSession
from app.fleet.pool import Desired, PoolPhase, PoolState, state_of
from app.footprint.layout import KnownLayout
from app.kernel.database import UnitOfWork
from app.kernel.errors import DatabaseUnreachable
from app.kernel.loop_guard import LoopGuard
from app.kernel.priority import Priority
from app.scheduler import needs
from app.scheduler.cluster import Account, Cluster, Configuration, Device, DeviceKind, DeviceState, Pool, RequestRate
from app.scheduler.needs import OperatorTarget

T = TypeVar("T")

#: A row of which nothing can be made is left out, and stops none of the others.
_GUARD = LoopGuard(psycopg.Error, DatabaseUnreachable)

_DEVICES = text("""
    SELECT device.id, device.name, host, kind, type, capacity_bytes, unmanaged_bytes, speed, simulated, present,
           CASE WHEN lost_at IS NULL THEN host.state ELSE 'lost' END AS host_state, host.agent_until > now() AS alive
    FROM device JOIN host ON host.name = device.host ORDER BY device.id
""")
_HOSTS = text("SELECT name, files FROM host ORDER BY name")
_POOLS = text("""
    SELECT pool.id::text, pool.configuration, pool.model, slots, desired, created_at, estimate_seconds,
           phase, busy, urgent, serving_at, last_used_at, stop_at, worker,
           agent_until < now() AND COALESCE(heartbeat_at, created_at) < agent_until AS silent
    FROM pool JOIN reservation ON reservation.id = pool.id JOIN host ON host.name = reservation.host
    LEFT JOIN pool_report ON pool_report.pool_id = pool.id
    WHERE reservation.state <> 'released' ORDER BY created_at, pool.id
""")
_KNOWN = text(
    "SELECT configuration, type, devices, parts, ram_bytes, source, load_seconds, tokens_per_second FROM layout"
)
_STARTS = text(
    "SELECT id::text, model FROM pool_command WHERE command = 'start' AND done_at IS NULL ORDER BY created_at"
)
_TARGETS = text("SELECT model, pools, pinned FROM pool_target")
_PARDONS = text("""
    SELECT model, max(created_at) AS since FROM pool_command
    WHERE command = 'start' AND created_at > now() - :age GROUP BY model
""")
_PAST = text("""
    SELECT pool.configuration, host, ended_at, failed, serving_at IS NOT NULL AS served, COALESCE(ending, '') AS ending
    FROM pool_process JOIN pool ON pool.id = pool_process.pool_id JOIN reservation ON reservation.id = pool.id
    LEFT JOIN pool_report ON pool_report.pool_id = pool.id
    WHERE released_at > now() - :age AND reservation.state = 'released' AND pool_process.state = 'ended'
""")
_ACCOUNTS = text("""
    SELECT namespace, weight, max_bytes, attained_seconds, CASE
        WHEN device_seconds >= max_device_seconds THEN period_began + period_seconds * interval '1 s'
    END AS until
    FROM quota
""")


@dataclass(frozen=True, slots=True)
class InFlight:
    """What a pool works on."""

    #: How long a step of its model keeps a slot.
    length: timedelta
    #: The most often that any of its steps was handed back before.
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class Start:
    """An order to start a pool of a model."""

    id: str
    model: str


@dataclass(frozen=True, slots=True)
class Observation:
    """The fleet, and what is beside it."""

    now: datetime
    fleet: Cluster
    #: By name of the model.
    configurations: Mapping[str, Configuration]
    starts: tuple[Start, ...]


def observe(
    books: LedgerSession,
    models: Iterable[Model],
    usage: Mapping[str, Mapping[Priority, float]],
    wishes: Mapping[str, OperatorTarget],
    in_flight: Mapping[str, InFlight],
) -> Observation:
    """
    All that the planner decides on.

    `usage` says by model and class how many steps a second ask for it; `wishes` by model what the settings want;
    `in_flight` by worker what it works on.
    """
    work, now = books.work, books.now
    hosts = work.rows(_HOSTS)
    starts = tuple(Start(row.id, row.model) for row in work.rows(_STARTS))
    configurations = _configurations(work, models, hosts, _wished(work, wishes, starts))
    devices = _each("device", work.rows(_DEVICES), _device)
    known = {device.id for device in devices}
    pools = _each("pool", work.rows(_POOLS), lambda row: _pool(row, books, known, in_flight.get(row.worker)))
    fleet = Cluster(
        devices=tuple(_with_unread(devices, books, pools)),
        pools=tuple(pools),
        configurations=tuple(configurations.values()),
        reserves=tuple(
            ReservedCapacity(one.id, one.configuration, one.bytes)
            for one in books.ledger.reserves.values()
            if one.bytes.keys() <= known
        ),
        usage={configurations[name].id: _usage(rates) for name, rates in usage.items() if name in configurations},
        accounts={
            row.namespace: Account(row.weight, row.attained_seconds, row.max_bytes, row.until)
            for row in work.rows(_ACCOUNTS)
        },
        backoffs=_backoffs(work, configurations, now),
    )
    return Observation(now, fleet, configurations, starts)


def _each(kind: str, rows: Iterable[Any], make: Callable[[Any], T]) -> list[T]:
    """What is made of each row, without those of which nothing can be made: they are logged."""
    found = []
    for row in rows:
        with _GUARD.item(kind, str(row[0])):
            found.append(make(row))
    return found


def _with_unread(devices: Iterable[Device], books: LedgerSession, pools: Iterable[Pool]) -> Iterator[Device]:
    """The devices, on which the bytes of pools that could not be read are nobody's to grant."""
    read = {pool.id for pool in pools}
    unread: dict[str, int] = {}
    for held in books.ledger.reservations.values():
        if held.id not in read:
            for id_, size in held.bytes.items():
                unread[id_] = unread.get(id_, 0) + size
    for device in devices:
        yield replace(device, unmanaged_bytes=device.unmanaged_bytes + unread.get(device.id, 0))


def _usage(rates: Mapping[Priority, float]) -> RequestRate:
    rate = sum(rates.values())
    return RequestRate(rate, {priority: part / rate for priority, part in rates.items()} if rate else {})


def _device(row: Any) -> Device:
    state = DeviceState(row.host_state)
    if state is DeviceState.SCHEDULABLE and not (row.present and row.alive):
        state = DeviceState.CORDONED  # nothing new, until its agent is heard again
    return Device(
        id=row.id,
        name=row.name,
        host=row.host,
        kind=DeviceKind.CPU if row.kind == "cpu" else DeviceKind.GPU,
        type=row.type,
        capacity_bytes=row.capacity_bytes,
        unmanaged_bytes=row.unmanaged_bytes,
        speed=row.speed,
        state=state,
        simulated=row.simulated,
    )


def _pool(row: Any, books: LedgerSession, devices: Collection[str], in_flight: InFlight | None) -> Pool:
    held = books.ledger.reservations[row.id]
    if unknown := held.bytes.keys() - devices:
        raise ValueError(f"it lies on devices that cannot be read: {', '.join(sorted(unknown))}")
    phase = None if row.phase is None else PoolPhase(row.phase)
    state = state_of(held.state, waits=bool(held.backing), desired=Desired(row.desired), phase=phase)
    if row.silent:
        # Neither it nor its agent was heard since: whoever waits for it does not wait for its lease.
        state = PoolState.SUSPECT
    return Pool(
        id=row.id,
        configuration=row.configuration,
        state=state,
        bytes=held.bytes,
        slots=row.slots,
        started=row.created_at,
        busy=row.busy or 0,
        serving=None if row.urgent is None else Priority(row.urgent),
        work_left=_work_left(row.busy or 0, in_flight),
        preemptions=in_flight.preemptions if in_flight else 0,
        loaded=row.serving_at,
        last_used=row.last_used_at,
        expected=row.created_at + timedelta(seconds=row.estimate_seconds),
        stopping=row.stop_at,
        handing_back=Desired(row.desired) is Desired.PREEMPT,
        pinned=held.pinned,
        epoch=held.epoch,
        backing=held.backing,
        namespace=held.namespace,
    )


def _work_left(busy: int, in_flight: InFlight | None) -> timedelta:
    """Until the last of them ends: one is half done, and of several the last takes the longer."""
    if in_flight is None or not busy:
        return timedelta(0)
    return in_flight.length / 2 * (1 + math.log(busy))


def _configurations(
    work: UnitOfWork, models: Iterable[Model], hosts: Iterable[Any], wishes: Mapping[str, OperatorTarget]
) -> dict[str, Configuration]:
    known: dict[str, list[KnownLayout]] = {}
    for one in _each("layout", work.rows(_KNOWN), _known):
        known.setdefault(one.configuration, []).append(one)
    files: dict[str, dict[str, timedelta]] = {}
    for host in hosts:
        for configuration in host.files:
            files.setdefault(configuration, {})[host.name] = timedelta(0)
    found = {}
    for model in models:
        with _GUARD.item("model", model.name):
            id_ = needs.configuration_id(model)
            found[model.name] = needs.configuration_of(
                model, known.get(id_, ()), files.get(id_, {}), wishes.get(model.name, OperatorTarget())
            )
    return found


def _known(row: Any) -> KnownLayout:
    parts, pace = tuple(row.parts), row.tokens_per_second
    if not parts or not all(isinstance(part, int) and part >= 0 for part in parts):
        raise ValueError(f"a layout on {row.type} has the parts {parts}, which are no numbers of bytes")
    if not 0 < pace < math.inf:
        raise ValueError(f"a layout on {row.type} has {pace} tokens a second")
    load = timedelta(seconds=row.load_seconds)
    return KnownLayout(row.configuration, row.type, parts, row.source, load, pace, row.ram_bytes)


def _wished(
    work: UnitOfWork, wishes: Mapping[str, OperatorTarget], starts: Iterable[Start]
) -> dict[str, OperatorTarget]:
    """What is wanted of each model: by the settings, by standing wishes, and by orders that are open."""
    found = dict(wishes)
    for row in work.rows(_TARGETS):
        before = found.get(row.model, OperatorTarget())
        found[row.model] = OperatorTarget(max(before.pools, row.pools), before.pinned or row.pinned)
    for order in starts:
        found[order.model] = replace(found.get(order.model, OperatorTarget()), ordered=1)
    return found


def _backoffs(work: UnitOfWork, configurations: Mapping[str, Configuration], now: datetime) -> tuple[Backoff, ...]:
    age = {"age": backoff.QUARANTINE * 2}
    pardoned = {
        configurations[row.model].id: row.since for row in work.rows(_PARDONS, age) if row.model in configurations
    }
    past = [
        Past(row.configuration, row.host, row.ended_at, row.failed, row.served, row.ending)
        for row in work.rows(_PAST, age)
        if row.ended_at is not None
    ]
    return backoff.backoffs(past, pardoned, now)
