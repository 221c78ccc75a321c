"""
Defragmentation: the cheapest moves of idle pools after which a model fits that fits nowhere now.

Enough bytes are free for such a model, but not on one set of devices.
A pool that works, for which steps wait, or that is pinned is never moved. A pool is moved only into free bytes.
All moves together stay within a budget, and the moves for one model are made all or not at all.
Models with demand come first, then the largest.

A plan moves pools by itself for steps that wait. Defragmentation is for the time before.

Nothing here reads a clock or a database: the caller passes `now` and applies the moves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from app.footprint.layout import KnownLayout
from app.scheduler.planner import reasons
from app.scheduler.planner.candidate import PlacementCandidate
from app.scheduler.planner.cluster import Cluster, Configuration, Pool
from app.scheduler.planner.demand import WaitingSteps, load_seconds, model_demand, no_demand
from app.scheduler.planner.plan import MovePool
from app.scheduler.planner.policy import PlacementPolicy
from app.scheduler.planner.search import Search
from app.scheduler.planner.state import DeviceSet, PlanState


@dataclass(frozen=True, slots=True)
class Disturbance:
    """The budget of one defragmentation."""

    #: Pools that are moved.
    moves: int = 4
    #: Seconds that they load in all.
    seconds: float = 120.0


@dataclass(frozen=True, slots=True)
class Gain:
    """A model that fits after the moves."""

    configuration: str
    model: str
    #: Where it fits, by id of the device.
    bytes: Mapping[str, int]
    reason: str


@dataclass(frozen=True, slots=True)
class Stuck:
    """A model that still fits nowhere, and why."""

    configuration: str
    model: str
    reason: str


@dataclass(frozen=True, slots=True)
class Defragmentation:
    """The moves, the models that fit after them, and those that still do not."""

    moves: tuple[MovePool, ...] = ()
    gains: tuple[Gain, ...] = ()
    stuck: tuple[Stuck, ...] = ()


@dataclass(frozen=True, slots=True)
class _Hole:
    """A device set for a layout, and the moves that free it."""

    layout: KnownLayout
    devices: DeviceSet
    moves: tuple[tuple[Pool, PlacementCandidate], ...]
    #: Seconds of loading.
    load: float


def defragment(
    cluster: Cluster,
    waiting: Sequence[WaitingSteps],
    now: datetime,
    budget: Disturbance = Disturbance(),
    policy: PlacementPolicy | None = None,
) -> Defragmentation:
    """Moves for models without a pool that fit on no device set now. Models that fit, or never can, are left out."""
    policy = policy or PlacementPolicy()
    configurations = {configuration.id: configuration for configuration in cluster.configurations}
    demands = model_demand(cluster.configurations, cluster.accounts, waiting, now, policy)
    state = PlanState(cluster, policy)
    search = Search(cluster, demands, state, now, policy)
    names = reasons.Names(cluster)

    moves: list[MovePool] = []
    gains: list[Gain] = []
    stuck: list[Stuck] = []
    left = budget

    def urgency(configuration: Configuration) -> tuple[float, int, str]:
        demand = demands.get(configuration.id)
        return -(demand.pressure if demand else 0.0), -reasons.smallest(configuration), configuration.id

    for configuration in sorted(cluster.configurations, key=urgency):
        free = _free_in_total(configuration, search, state)
        if free is None or state.pools_of(configuration.id) or _fits(configuration, search):
            continue
        holes = sorted(_holes(configuration, search, state), key=lambda one: (one.load, len(one.moves), one.devices))
        hole = next((one for one in holes if len(one.moves) <= left.moves and one.load <= left.seconds), None)
        if hole is None:
            cheapest = (len(holes[0].moves), holes[0].load) if holes else None
            reason = reasons.no_moves(configuration, free, cheapest)
            stuck.append(Stuck(configuration.id, configuration.model, reason))
            continue
        left = Disturbance(left.moves - len(hole.moves), left.seconds - hole.load)
        bytes_ = hole.layout.on(hole.devices)
        # The hole is kept free: no pool that is moved for another model goes there.
        state.start(configuration, bytes_, [pool for pool, _ in hole.moves], now)
        for pool, target in hole.moves:
            estimate = timedelta(seconds=target.estimate)
            state.stop(pool)
            state.start(configurations[pool.configuration], target.bytes, (), now + estimate, pool.namespace)
            reason = reasons.makes_hole(configuration, hole.devices, target, names)
            moves.append(MovePool(pool.id, target.bytes, reason, estimate))
        reason = reasons.gained(configuration, free, len(hole.moves), hole.load)
        gains.append(Gain(configuration.id, configuration.model, bytes_, reason))
    return Defragmentation(tuple(moves), tuple(gains), tuple(stuck))


def _free_in_total(configuration: Configuration, search: Search, state: PlanState) -> int | None:
    """Free bytes on devices of a type for which it has a layout; None when they, or the devices, are too small."""
    for layout in configuration.layouts:
        devices = state.schedulable.get(layout.type, ())
        free = sum(max(state.free_for(configuration, device.id), 0) for device in devices)
        if free >= layout.total_bytes and any(search.sets.possible(configuration, layout, ())):
            return free
    return None


def _fits(configuration: Configuration, search: Search) -> bool:
    return any(True for _ in search.candidates(no_demand(configuration), evict=False))


def _holes(configuration: Configuration, search: Search, state: PlanState) -> list[_Hole]:
    """One for each device set that moves can free."""
    found = []
    backed_off = search.backed_off(configuration.id)
    for layout in configuration.layouts:
        for devices in search.sets.possible(configuration, layout, backed_off):
            if search.sets.conflicts(configuration, devices):
                continue
            chosen = _movable(configuration, layout, devices, search, state)
            moves = search.relocate(chosen, layout.on(devices), chosen) if chosen else None
            if moves:
                found.append(_Hole(layout, devices, moves, sum(target.estimate for _, target in moves)))
    return found


def _movable(
    configuration: Configuration, layout: KnownLayout, devices: DeviceSet, search: Search, state: PlanState
) -> list[Pool] | None:
    """Idle pools that hold the missing bytes, those that load the fastest for each byte first; None: too few."""
    eviction, unpromised = search.eviction, state.unpromised
    missing = state.missing(configuration, layout, devices)
    pools = {p.id: p for device in devices for p in state.pools_on[device] if eviction.may_move(p)}

    def load(pool: Pool) -> float:
        return load_seconds(eviction.configurations[pool.configuration])

    def load_by_byte(pool: Pool) -> tuple[float, str]:
        size = sum(min(unpromised(pool, d), m) for d, m in missing.items() if m > 0)
        return load(pool) / max(size, 1), pool.id

    chosen: list[Pool] = []
    for pool in sorted(pools.values(), key=load_by_byte):
        if any(m > 0 and unpromised(pool, d) > 0 for d, m in missing.items()):
            chosen.append(pool)
            for d in missing:
                missing[d] -= unpromised(pool, d)
    if any(m > 0 for m in missing.values()):
        return None
    for pool in sorted(chosen, key=lambda p: (-load(p), p.id)):
        if all(m + unpromised(pool, d) <= 0 for d, m in missing.items()):  # the others suffice
            chosen.remove(pool)
            for d in missing:
                missing[d] += unpromised(pool, d)
    return chosen
