"""Small clusters for the tests of the planner, and random ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

from hypothesis import strategies as st

from app.devices.device import HardwareKind
from app.fleet.host import HostState
from app.fleet.ledger.reservation import ReservedCapacity
from app.fleet.pool import PoolState
from app.footprint.layout import KnownLayout
from app.kernel.priority import Priority
from app.scheduler.planner.arrivals import ArrivalPattern
from app.scheduler.planner.cluster import (
    Account,
    Cluster,
    Configuration,
    Device,
    Packing,
    Pool,
    Reserve,
    charges,
    promises,
)
from app.scheduler.planner.demand import WaitingSteps
from app.scheduler.planner.plan import DropReserve, GrantReserve, MovePool, Plan, StartPool, StopMode, StopPool

NOW = datetime(2030, 1, 1, tzinfo=UTC)
GB = 10**9


def seconds(count: float) -> timedelta:
    return timedelta(seconds=count)


def gpu(id_: str, size: float = 20, host: str = "box", **more: Any) -> Device:
    return Device(id_, id_, host, HardwareKind.GPU, "gpu", int(size * GB), **more)


def model(id_: str, *parts: float, load: float = 5, **more: Any) -> Configuration:
    sizes, ram_bytes = tuple(int(p * GB) for p in parts), int(more.pop("ram", 0) * GB)
    layout = KnownLayout(id_, "gpu", sizes, "measured", seconds(load), 1.0, ram_bytes)
    return Configuration(id_, id_, more.pop("slots", 2), (layout,), **more)


def ram(size: float, host: str = "box", **more: Any) -> Device:
    return Device(f"ram-{host}", f"ram-{host}", host, HardwareKind.CPU, "cpu", int(size * GB), **more)


def pool(id_: str, configuration: str, on: Mapping[str, float], **more: Any) -> Pool:
    values: dict[str, Any] = {
        "state": PoolState.SERVING,
        "started": NOW - seconds(600),
        "loaded": NOW - seconds(590),
        "last_used": NOW - seconds(60),
        "slots": 2,
    }
    return Pool(id=id_, configuration=configuration, bytes=bytes_of(on), **values | more)


def bytes_of(on: Mapping[str, float]) -> dict[str, int]:
    return {device: int(size * GB) for device, size in on.items()}


def backed(bytes_: Mapping[str, int], after: frozenset[str], pools: Mapping[str, Pool]) -> dict[str, dict[str, int]]:
    """The bytes that a new pool gets of each pool that it waits for, in the order of the ledger."""
    left, backing, promised = dict(bytes_), {}, promises(pools.values())
    for id_ in sorted(after & pools.keys()):
        part = {}
        for device, need in left.items():
            size = min(need, pools[id_].bytes.get(device, 0) - promised.get(id_, {}).get(device, 0))
            if size > 0:
                part[device] = size
                left[device] = need - size
        if part:
            backing[id_] = part
    return backing


def waits(configuration: str, *, age: float = 0, priority: Priority = Priority.STANDARD, **more: Any) -> WaitingSteps:
    return WaitingSteps(configuration, priority, more.pop("steps", 1), NOW - seconds(age), **more)


def applied(cluster: Cluster, plan: Plan) -> Cluster:
    """The cluster with every action of the plan applied, before any process has ended."""
    pools = {one.id: one for one in cluster.pools}
    reserves = {one.id: one for one in cluster.reserves}
    for number, action in enumerate(plan.actions):
        id_ = f"{len(cluster.pools)}-{len(cluster.reserves)}-{number}"
        match action:
            case StopPool():
                stopped = pools[action.pool]
                if stopped.state is PoolState.WAITING:
                    del pools[action.pool]
                else:
                    pools[action.pool] = replace(
                        stopped,
                        state=PoolState.DRAINING,
                        stopping=stopped.stopping or NOW,
                        preempting=action.mode is StopMode.PREEMPT,
                    )
            case StartPool():
                state = PoolState.WAITING if action.after else PoolState.STARTING
                backing = backed(action.bytes, action.after, pools)
                pools[id_] = Pool(id_, action.configuration, state, action.bytes, 2, NOW, backing=backing, expected=NOW)
            case MovePool():
                moved = pools[action.pool]
                pools[id_] = Pool(id_, moved.configuration, PoolState.STARTING, action.bytes, 2, NOW, expected=NOW)
                pools[action.pool] = replace(moved, state=PoolState.DRAINING)
            case GrantReserve():
                reserves[id_] = ReservedCapacity(id_, action.configuration, action.bytes)
            case DropReserve():
                del reserves[action.reserve]
    return replace(cluster, pools=tuple(pools.values()), reserves=tuple(reserves.values()))


@dataclass(frozen=True)
class Case:
    """A cluster and the steps that wait."""

    cluster: Cluster
    waiting: list[WaitingSteps]


def cases() -> st.SearchStrategy[Case]:
    """
    Random clusters, by seed: drawn value by value they would be small, and few plans would have to choose.
    """
    return st.integers(0, 2**32).map(_case)


def _case(seed: int) -> Case:
    chance = Random(seed)
    cluster = _cluster(chance)
    return Case(cluster, _waiting(chance, cluster))


def _cluster(chance: Random) -> Cluster:
    """Up to four GPUs on two hosts, up to seven models, pools in every state that the ledger would have granted."""
    devices = tuple(
        gpu(
            f"g{n}",
            chance.choice((10, 20, 20, 30)),
            f"h{n // 2}",
            state=chance.choice((HostState.SCHEDULABLE,) * 8 + tuple(HostState)),
            unmanaged_bytes=chance.choice((0, 0, 0, 0, 3 * GB)),
        )
        for n in range(chance.randint(1, 4))
    )
    devices += tuple(ram(chance.choice((6, 20)), host) for host in sorted({device.host for device in devices}))
    configurations = tuple(_model(chance, n) for n in range(chance.randint(2, 7)))
    reserves: list[ReservedCapacity] = []
    for configuration in configurations:
        if configuration.reserve is not None and chance.random() < 0.7:
            reserves += _reserves_of(configuration, devices, reserves)
    cluster = Cluster(devices, configurations=configurations, reserves=tuple(reserves))
    for number in range(chance.randint(0, 16)):
        cluster = _with_pool(chance, cluster, number)
    rates = {c.model: {Priority.STANDARD: chance.choice((0.0, 0.01, 0.1, 1.0))} for c in configurations}
    accounts = {name: Account(attained_seconds=chance.choice((0.0, 10.0, 1000.0))) for name in ("a", "b")}
    arrivals = {
        c.model: ArrivalPattern(
            NOW - seconds(chance.randint(0, 900)), chance.choice(tuple(Priority)), (600.0, 620.0) * 4
        )
        for c in configurations
        if chance.random() < 0.3
    }
    return replace(cluster, rates=rates, accounts=accounts, arrivals=arrivals)


def _model(chance: Random, number: int) -> Configuration:
    parts = chance.choice(((2,), (4,), (6,), (9,), (9,), (14,), (19,), (8, 8), (15, 15), (50,)))
    standing = chance.choice(("",) * 7 + ("pinned", "kept", "reserve"))
    return model(
        f"m{number}",
        *parts,
        load=chance.choice((1, 5, 20)),
        ram=chance.choice((0, 1, 3)),
        pinned=standing == "pinned",
        min_pools=int(standing == "kept"),
        reserve=Reserve(1) if standing == "reserve" else None,
        packing=chance.choice(tuple(Packing)),
        anti_affinity=frozenset(chance.choice(((), (), (), ("m0",)))),
    )


def _reserves_of(
    configuration: Configuration, devices: tuple[Device, ...], before: list[ReservedCapacity]
) -> list[ReservedCapacity]:
    parts = configuration.layouts[0].parts
    gpus = [device for device in devices if device.kind is HardwareKind.GPU][: len(parts)]
    on = _on(configuration, gpus, devices)
    non_preemptible = {d.id: sum(one.bytes.get(d.id, 0) for one in before) + on.get(d.id, 0) for d in devices}
    if len(gpus) < len(parts) or any(non_preemptible[d.id] > d.capacity_bytes - d.unmanaged_bytes for d in devices):
        return []
    return [ReservedCapacity(f"reserve-{configuration.id}", configuration.id, on)]


def _on(configuration: Configuration, gpus: Sequence[Device], devices: Sequence[Device]) -> dict[str, int]:
    """Its bytes on these GPUs and in the RAM of their host."""
    layout = configuration.layouts[0]
    rams = [d.id for d in devices if layout.ram and d.kind is HardwareKind.CPU and d.host == gpus[0].host]
    return layout.on([device.id for device in gpus] + rams)


def _with_pool(chance: Random, cluster: Cluster, number: int) -> Cluster:
    """The cluster with one more pool, if the ledger would grant it: in free bytes, or in those of pools that drain."""
    configuration = chance.choice(cluster.configurations)
    parts = configuration.layouts[0].parts
    gpus = [device for device in cluster.devices if device.kind is HardwareKind.GPU]
    first = chance.randrange(len(gpus))
    devices = gpus[first : first + len(parts)]
    if len(devices) < len(parts) or len({d.host for d in devices}) > 1:
        return cluster
    on = {id_: size / GB for id_, size in _on(configuration, devices, cluster.devices).items()}
    draining = [p.id for p in cluster.pools if p.state is PoolState.DRAINING and p.bytes.keys() & on.keys()]
    state = chance.choice((PoolState.SERVING,) * 12 + tuple(PoolState) + (PoolState.WAITING,) * 4 * bool(draining))
    backing = backed(bytes_of(on), frozenset(draining), {p.id: p for p in cluster.pools})
    if state is PoolState.WAITING and not backing:
        return cluster
    busy = chance.choice((0, 0, 1, 2)) if state in {PoolState.SERVING, PoolState.DRAINING} else 0
    age = chance.choice((1.0, 30.0, 600.0))
    loaded = None if state in {PoolState.WAITING, PoolState.STARTING} else NOW - seconds(age * 0.9)
    added = pool(
        f"p{number}",
        configuration.id,
        on,
        state=state,
        busy=busy,
        serving=chance.choice(tuple(Priority)) if busy else None,
        work_left=seconds(chance.choice((1.0, 15.0)) if busy else 0),
        preemptions=chance.choice((0, 0, 3)),
        started=NOW - seconds(age),
        loaded=loaded,
        last_used=chance.choice((loaded, None)),
        expected=NOW + seconds(3) if loaded is None else None,
        stopping=NOW - seconds(chance.choice((1, 9, 15))) if state is PoolState.DRAINING else None,
        backing=backing if state is PoolState.WAITING else {},
        namespace=chance.choice(("", "a", "b")),
    )
    grown = replace(cluster, pools=(*cluster.pools, added))
    charged = charges(grown)
    stays = {c.id for c in cluster.configurations if c.pinned or c.min_pools}
    for device in cluster.devices:
        usable = device.capacity_bytes - device.unmanaged_bytes
        non_preemptible = sum(one.bytes.get(device.id, 0) for one in cluster.reserves)
        non_preemptible += sum(p.bytes.get(device.id, 0) for p in grown.pools if p.configuration in stays)
        if charged[device.id] > usable or non_preemptible > usable:
            return cluster
    return grown


def _waiting(chance: Random, cluster: Cluster) -> list[WaitingSteps]:
    """Between no steps and old steps of every class."""
    return [
        waits(
            configuration.id,
            priority=priority,
            age=chance.choice((0.0, 5.0, 30.0, 100.0, 1000.0)),
            steps=chance.choice((1, 2, 10)),
            namespace=chance.choice(("", "a", "b")),
            ready=NOW + seconds(2) if chance.random() < 0.2 else None,
        )
        for configuration in cluster.configurations
        for priority in Priority
        if chance.random() < 0.3
    ]
