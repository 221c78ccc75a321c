"""
Defragmentation: the cheapest moves of idle pools after which a model fits that now fits nowhere, although enough bytes
are free in all.

A pool that works, that somebody waits for, or that is pinned is never moved. A pool is moved only where bytes are free.
All moves together stay within what may be disturbed, and each model's moves are made all or not at all.
Models that somebody waits for come first, then the largest.

A plan moves pools by itself for steps that wait. This is for the time before somebody waits.

Nothing here reads a clock or a database: the caller passes `now` and applies the moves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from app.scheduler import pressure, reasons
from app.scheduler.cluster import Cluster, Configuration, Demand, Layout, Pool
from app.scheduler.option import Option
from app.scheduler.placement import MovePool
from app.scheduler.policy import PlacementPolicy
from app.scheduler.room import DeviceSet, Room
from app.scheduler.search import Search


@dataclass(frozen=True, slots=True)
class Disturbance:
    """What may be disturbed at once."""

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
    """Moves, what they bring, and what they do not."""

    moves: tuple[MovePool, ...] = ()
    gains: tuple[Gain, ...] = ()
    stuck: tuple[Stuck, ...] = ()


@dataclass(frozen=True, slots=True)
class _Hole:
    """Room for a layout on a device set, and the moves that make it."""

    layout: Layout
    devices: DeviceSet
    moves: tuple[tuple[Pool, Option], ...]
    #: Seconds of loading.
    load: float


def defragment(
    fleet: Cluster,
    demand: Sequence[Demand],
    now: datetime,
    budget: Disturbance = Disturbance(),
    policy: PlacementPolicy | None = None,
) -> Defragmentation:
    """Moves for models without a pool that fit on no device set now. Models that fit, or never can, are left out."""
    policy = policy or PlacementPolicy()
    of = {configuration.id: configuration for configuration in fleet.configurations}
    wants = pressure.wants(of, fleet.accounts, demand, now, policy)
    room = Room(fleet, policy)
    search = Search(fleet, wants, room, now, policy)
    names = reasons.Names(fleet)

    moves: list[MovePool] = []
    gains: list[Gain] = []
    stuck: list[Stuck] = []
    left = budget

    def urgency(configuration: Configuration) -> tuple[float, int, str]:
        want = wants.get(configuration.id)
        return -(want.pressure if want else 0.0), -reasons.smallest(configuration), configuration.id

    for configuration in sorted(fleet.configurations, key=urgency):
        free = _free_in_all(configuration, room)
        if free is None or room.coming(configuration.id) or _fits(configuration, search):
            continue
        holes = sorted(_holes(configuration, search), key=lambda hole: (hole.load, len(hole.moves), hole.devices))
        hole = next((one for one in holes if len(one.moves) <= left.moves and one.load <= left.seconds), None)
        if hole is None:
            cheapest = (len(holes[0].moves), holes[0].load) if holes else None
            reason = reasons.no_moves(configuration, free, cheapest)
            stuck.append(Stuck(configuration.id, configuration.model, reason))
            continue
        left = Disturbance(left.moves - len(hole.moves), left.seconds - hole.load)
        bytes_ = hole.layout.on(hole.devices)
        # The hole is kept: nothing that is moved for another model goes there.
        room.take(configuration, bytes_, [pool for pool, _ in hole.moves], now)
        for pool, target in hole.moves:
            estimate = timedelta(seconds=target.estimate)
            room.take(of[pool.configuration], target.bytes, (), now + estimate)
            search.stop(pool)
            reason = reasons.makes_hole(configuration, hole.devices, target, names)
            moves.append(MovePool(pool.id, target.bytes, reason, estimate))
        reason = reasons.gained(configuration, free, len(hole.moves), hole.load)
        gains.append(Gain(configuration.id, configuration.model, bytes_, reason))
    return Defragmentation(tuple(moves), tuple(gains), tuple(stuck))


def _free_in_all(configuration: Configuration, room: Room) -> int | None:
    """Free bytes on devices of a type that it can lie on, if they come to what it needs, and some could hold it."""
    for layout in configuration.layouts:
        free = sum(max(room.free_for(configuration, device.id), 0) for device in room.open.get(layout.type, ()))
        if free >= layout.total_bytes and any(room.sets(configuration, layout, ())):
            return free
    return None


def _fits(configuration: Configuration, search: Search) -> bool:
    return any(True for _ in search.options(pressure.nothing(configuration), evict=False))


def _holes(configuration: Configuration, search: Search) -> list[_Hole]:
    """One for each device set that moves can empty far enough."""
    found = []
    backed_off = {backoff.host for backoff in search.backoffs(configuration.id)}
    for layout in configuration.layouts:
        for devices in search.room.sets(configuration, layout, backed_off):
            if search.room.shunned(configuration, devices):
                continue
            chosen = _leavers(configuration, layout, devices, search)
            moves = search.relocate(chosen, layout.on(devices), chosen) if chosen else None
            if moves:
                found.append(_Hole(layout, devices, moves, sum(target.estimate for _, target in moves)))
    return found


def _leavers(configuration: Configuration, layout: Layout, devices: DeviceSet, search: Search) -> list[Pool] | None:
    """Idle pools whose bytes are missing there, those that load the fastest for each byte first; None: too few."""
    offer = search.room.offer
    missing = search.missing(configuration, layout, devices)
    pools = {p.id: p for device in devices for p in search.room.on[device] if search.may_move(p)}

    def load_by_byte(pool: Pool) -> tuple[float, str]:
        size = sum(min(offer(pool, d), m) for d, m in missing.items() if m > 0)
        return pressure.load_of(search.configurations[pool.configuration]) / max(size, 1), pool.id

    chosen: list[Pool] = []
    for pool in sorted(pools.values(), key=load_by_byte):
        if any(m > 0 and offer(pool, d) > 0 for d, m in missing.items()):
            chosen.append(pool)
            for d in missing:
                missing[d] -= offer(pool, d)
    if any(m > 0 for m in missing.values()):
        return None
    for pool in sorted(chosen, key=lambda p: (-pressure.load_of(search.configurations[p.configuration]), p.id)):
        if all(m + offer(pool, d) <= 0 for d, m in missing.items()):  # the others suffice
            chosen.remove(pool)
            for d in missing:
                missing[d] += offer(pool, d)
    return chosen
