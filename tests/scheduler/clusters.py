"""Small fleets for the tests of placement, and random ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

from hypothesis import strategies as st

from app.fleet.ledger.reservation import ReservedCapacity
from app.fleet.pool import PoolState
from app.kernel.priority import Priority
from app.scheduler.cluster import (
    Account,
    Cluster,
    Configuration,
    Demand,
    Device,
    DeviceKind,
    DeviceState,
    Layout,
    Packing,
    Pool,
    RequestRate,
    Reserve,
    charges,
    promises,
)
from app.scheduler.placement import DropReserve, GrantReserve, MovePool, Plan, StartPool, StopMode, StopPool

NOW = datetime(2030, 1, 1, tzinfo=UTC)
GB = 10**9


def seconds(count: float) -> timedelta:
    return timedelta(seconds=count)


def gpu(id_: str, size: float = 20, host: str = "box", **more: Any) -> Device:
    return Device(id_, id_, host, DeviceKind.GPU, "gpu", int(size * GB), **more)


def model(id_: str, *parts: float, load: float = 5, **more: Any) -> Configuration:
    layout = Layout("gpu", tuple(int(p * GB) for p in parts), seconds(load), ram=int(more.pop("ram", 0) * GB))
    return Configuration(id_, id_, more.pop("slots", 2), (layout,), **more)


def ram(size: float, host: str = "box", **more: Any) -> Device:
    return Device(f"ram-{host}", f"ram-{host}", host, DeviceKind.CPU, "cpu", int(size * GB), **more)


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
    """What a new pool gets of those that it waits for, each in turn, as the ledger gives it."""
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


def waits(configuration: str, *, age: float = 0, priority: Priority = Priority.STANDARD, **more: Any) -> Demand:
    return Demand(configuration, priority, more.pop("steps", 1), NOW - seconds(age), **more)


def applied(fleet: Cluster, plan: Plan) -> Cluster:
    """The fleet with every action of the plan granted, and nothing gone yet."""
    pools = {one.id: one for one in fleet.pools}
    reserves = {one.id: one for one in fleet.reserves}
    for number, action in enumerate(plan.actions):
        id_ = f"{len(fleet.pools)}-{len(fleet.reserves)}-{number}"
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
                        handing_back=action.how is StopMode.PREEMPT,
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
    return replace(fleet, pools=tuple(pools.values()), reserves=tuple(reserves.values()))


@dataclass(frozen=True)
class Case:
    """A fleet and what is waited for."""

    fleet: Cluster
    demand: list[Demand]


def cases() -> st.SearchStrategy[Case]:
    """
    Random fleets, by seed: drawn value by value they would come out small, and hardly any plan would have to choose.
    """
    return st.integers(0, 2**32).map(_case)


def _case(seed: int) -> Case:
    chance = Random(seed)
    fleet = _fleet(chance)
    return Case(fleet, _demand(chance, fleet))


def _fleet(chance: Random) -> Cluster:
    """Up to four GPUs on two hosts, up to seven models, pools in every state that the ledger would have granted."""
    devices = tuple(
        gpu(
            f"g{n}",
            chance.choice((10, 20, 20, 30)),
            f"h{n // 2}",
            state=chance.choice((DeviceState.SCHEDULABLE,) * 8 + tuple(DeviceState)),
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
    fleet = Cluster(devices, configurations=configurations, reserves=tuple(reserves))
    for number in range(chance.randint(0, 16)):
        fleet = _with_pool(chance, fleet, number)
    usage = {c.id: RequestRate(chance.choice((0.0, 0.01, 0.1, 1.0))) for c in configurations}
    accounts = {name: Account(attained_seconds=chance.choice((0.0, 10.0, 1000.0))) for name in ("a", "b")}
    return replace(fleet, usage=usage, accounts=accounts)


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
    gpus = [device for device in devices if device.kind is DeviceKind.GPU][: len(parts)]
    on = _on(configuration, gpus, devices)
    non_preemptible = {d.id: sum(one.bytes.get(d.id, 0) for one in before) + on.get(d.id, 0) for d in devices}
    if len(gpus) < len(parts) or any(non_preemptible[d.id] > d.capacity_bytes - d.unmanaged_bytes for d in devices):
        return []
    return [ReservedCapacity(f"reserve-{configuration.id}", configuration.id, on)]


def _on(configuration: Configuration, gpus: Sequence[Device], devices: Sequence[Device]) -> dict[str, int]:
    """Its bytes on these GPUs, and of the RAM of their host."""
    layout = configuration.layouts[0]
    beside = [d.id for d in devices if layout.ram and d.kind is DeviceKind.CPU and d.host == gpus[0].host]
    return layout.on([device.id for device in gpus] + beside)


def _with_pool(chance: Random, fleet: Cluster, number: int) -> Cluster:
    """One more pool, if the ledger would grant it: into free bytes, or waiting for those of pools that drain."""
    configuration = chance.choice(fleet.configurations)
    parts = configuration.layouts[0].parts
    gpus = [device for device in fleet.devices if device.kind is DeviceKind.GPU]
    first = chance.randrange(len(gpus))
    devices = gpus[first : first + len(parts)]
    if len(devices) < len(parts) or len({d.host for d in devices}) > 1:
        return fleet
    on = {id_: size / GB for id_, size in _on(configuration, devices, fleet.devices).items()}
    draining = [p.id for p in fleet.pools if p.state is PoolState.DRAINING and p.bytes.keys() & on.keys()]
    state = chance.choice((PoolState.SERVING,) * 12 + tuple(PoolState) + (PoolState.WAITING,) * 4 * bool(draining))
    backing = backed(bytes_of(on), frozenset(draining), {p.id: p for p in fleet.pools})
    if state is PoolState.WAITING and not backing:
        return fleet
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
    grown = replace(fleet, pools=(*fleet.pools, added))
    charged = charges(grown)
    stays = {c.id for c in fleet.configurations if c.pinned or c.min_pools}
    for device in fleet.devices:
        usable = device.capacity_bytes - device.unmanaged_bytes
        non_preemptible = sum(one.bytes.get(device.id, 0) for one in fleet.reserves)
        non_preemptible += sum(p.bytes.get(device.id, 0) for p in grown.pools if p.configuration in stays)
        if charged[device.id] > usable or non_preemptible > usable:
            return fleet
    return grown


def _demand(chance: Random, fleet: Cluster) -> list[Demand]:
    """From nothing to old steps of every class."""
    return [
        waits(
            configuration.id,
            priority=priority,
            age=chance.choice((0.0, 5.0, 30.0, 100.0, 1000.0)),
            steps=chance.choice((1, 2, 10)),
            namespace=chance.choice(("", "a", "b")),
            ready=NOW + seconds(2) if chance.random() < 0.2 else None,
        )
        for configuration in fleet.configurations
        for priority in Priority
        if chance.random() < 0.3
    ]
