"""
Device pools: the pools of each device, judged, sorted and added up once for many demands.

A plan asks the same of the same pools for each model: what their regret is, whether they may be evicted, when they
leave. The answers for a device are kept until the plan changes it (`PlanState.revisions`).
A sum over pools that a demand may evict is an upper limit: of demands of one class the one with the most pressure may
evict the most. The regret for bytes is a lower limit: pools are counted in part, those with the least regret for each
byte first.

Reads the plan state and changes nothing.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate, repeat
from typing import NamedTuple

from app.scheduler.planner.cluster import Configuration, Pool
from app.scheduler.planner.demand import ModelDemand
from app.scheduler.planner.eviction import EVICTABLE, Eviction
from app.scheduler.planner.policy import PlacementPolicy
from app.scheduler.planner.state import PlanState

#: What a sum of rounded numbers may be smaller than the same sum in another order, as a part of it.
_ROUNDING = 1e-9
#: A demand that may evict only what every demand may.
_WEAKEST = ModelDemand(Configuration("", "", 0, ()), load=0.0, pressure=-math.inf)


class JudgedPool(NamedTuple):
    """A pool on a device, as a demand sees it that may evict it."""

    pool: Pool
    #: Bytes of it on the device that are promised to no other pool; more than 0.
    size: int
    #: See `Eviction.regret`.
    regret: float
    #: It works: such pools come last.
    works: bool
    #: See `Eviction.is_used`.
    used: bool
    #: It may be evicted whatever the pressure of the demand is.
    certain: bool


@dataclass(frozen=True, slots=True)
class Evictable:
    """The pools on a device that demands of one class may evict, if their pressure is high enough."""

    pools: list[JudgedPool]
    #: Bytes of those that are not in use, of those that are idle, and of all.
    unused: int
    idle: int
    total: int
    #: With the least regret for each byte first: bytes and regret of the first so many pools, and the regret for a byte
    #: of the next.
    sizes: list[int]
    regrets: list[float]
    prices: list[float]
    #: Of those that work, the first to leave first: bytes of the idle ones and the first so many, and seconds of each.
    working: list[int]
    seconds: list[float]
    #: Bytes of the so many smallest.
    smallest: list[int]

    def least_regret(self, size: int) -> float:
        """No smaller regret frees so many bytes, which are at most `total`."""
        if size <= 0:
            return 0.0
        at = bisect_left(self.sizes, size) - 1
        return (self.regrets[at] + (size - self.sizes[at]) * self.prices[at]) * (1 - _ROUNDING)

    def least_wait(self, size: int) -> float:
        """Pools that hold so many bytes are not gone in less seconds, from when they are stopped."""
        return self.seconds[bisect_left(self.working, size) - 1] if size > self.idle else 0.0

    def most_victims(self, size: int) -> int:
        """No more pools are stopped for so many bytes: without any one of the victims there are too few."""
        return bisect_left(self.smallest, size)


@dataclass(frozen=True, slots=True)
class Leaving:
    """The pools on a device that will leave it, the first first."""

    pools: list[Pool]
    #: Seconds until it leaves, by pool.
    seconds: list[float]
    #: Bytes that are free once the first so many have left.
    sizes: list[int]

    def least(self, size: int) -> float | None:
        """Seconds until so many bytes are free; None when they never are."""
        if size <= 0:
            return 0.0
        return self.seconds[bisect_left(self.sizes, size) - 1] if size <= self.sizes[-1] else None


@dataclass(frozen=True, slots=True)
class Departures:
    """Which of several devices is the first to have so many bytes free, without an eviction."""

    #: Bytes that a device has free, now or once some pools have left it, rising.
    sizes: list[int]
    #: Of the devices that have so many or more: the seconds until the first of them has, and its id.
    firsts: list[tuple[float, str]]

    def first(self, size: int) -> tuple[float, str] | None:
        """Seconds until a device has so many bytes free, and its id; None when none ever has."""
        at = bisect_left(self.sizes, size)
        return self.firsts[at] if at < len(self.sizes) else None


class EvictablePools:
    """The pools of each device, as the demands of one class see them that may evict some of them."""

    def __init__(self, pools: DevicePools, state: PlanState, eviction: Eviction, demand: ModelDemand) -> None:
        self._pools, self._state, self._eviction = pools, state, eviction
        self._strongest, self._weakest = replace(demand, pressure=math.inf), replace(demand, pressure=-math.inf)
        #: By device, with the revision of the device.
        self._known: dict[str, tuple[int, Evictable]] = {}

    def on(self, device: str) -> Evictable:
        """Those on one device."""
        revision = self._state.revisions[device]
        known = self._known.get(device)
        if known is None or known[0] != revision:
            self._known[device] = known = (revision, self._find(self._pools.judged(device)))
        return known[1]

    def _find(self, judged: list[JudgedPool]) -> Evictable:
        may_evict, strongest, pools = self._eviction.may_evict, self._strongest, []
        for one in judged:
            if one.certain:
                pools.append(one)
            elif may_evict(one.pool, strongest, reclaims=False):
                pools.append(one._replace(certain=may_evict(one.pool, self._weakest, reclaims=False)))
        ranked = sorted((one.regret / one.size, one.size, one.regret) for one in pools)
        sizes, regrets, prices = [0], [0.0], []
        for price, size, regret in ranked:
            sizes.append(sizes[-1] + size)
            regrets.append(regrets[-1] + regret)
            prices.append(price)
        idle = sum(one.size for one in pools if not one.works)
        working, seconds = [idle], []
        seconds_to_free = self._eviction.seconds_to_free
        for after, size in sorted(
            (seconds_to_free(one.pool, strongest, reclaims=False), one.size) for one in pools if one.works
        ):
            working.append(working[-1] + size)
            seconds.append(after)
        smallest = [0, *accumulate(sorted(one.size for one in pools))]
        unused = sum(one.size for one in pools if not one.used)
        return Evictable(pools, unused, idle, sizes[-1], sizes, regrets, prices, working, seconds, smallest)


class DevicePools:
    """Judges the pools of each device for one plan."""

    def __init__(self, state: PlanState, eviction: Eviction, policy: PlacementPolicy) -> None:
        self._state, self._eviction, self._lend = state, eviction, policy.lend
        #: By device, with the revision of the device.
        self._judged: dict[str, tuple[int, list[JudgedPool]]] = {}
        self._leaving: dict[str, tuple[int, Leaving]] = {}
        #: By class of demand.
        self._evictable: dict[tuple[object, ...], EvictablePools] = {}

    def evictable(self, demand: ModelDemand) -> EvictablePools:
        """The pools that the demand may evict, except for bytes that are reserved for its model."""
        # Where reserves are not lent, only the owner may evict pools in them.
        key = (demand.rank, demand.overdue, "" if self._lend else demand.configuration.id)
        if (found := self._evictable.get(key)) is None:
            found = self._evictable[key] = EvictablePools(self, self._state, self._eviction, demand)
        return found

    def judged(self, device: str) -> list[JudgedPool]:
        """The pools whose bytes there can be promised, whether or not a demand may evict them."""
        known, revision = self._judged.get(device), self._state.revisions[device]
        if known is None or known[0] != revision:
            state, eviction = self._state, self._eviction
            found = []
            for pool in state.pools_on[device]:
                if pool.state in EVICTABLE and (size := state.unpromised(pool, device)) > 0:
                    certain = eviction.may_evict(pool, _WEAKEST, reclaims=False)
                    used = eviction.is_used(pool)
                    found.append(JudgedPool(pool, size, eviction.regret(pool), pool.busy > 0, used, certain))
            self._judged[device] = known = (revision, found)
        return known[1]

    def leaving(self, device: str) -> Leaving:
        """The pools that leave the device without an eviction, with the time that each takes."""
        state, eviction, revision = self._state, self._eviction, self._state.revisions[device]
        known = self._leaving.get(device)
        if known is None or known[0] != revision:
            pools = [pool for pool in state.pools_on[device] if not eviction.is_protected(pool)]
            ranked = sorted((eviction.seconds_to_leave(pool), pool.id, pool) for pool in pools)
            sizes = [0]
            for *_, pool in ranked:
                sizes.append(sizes[-1] + state.unpromised(pool, device))
            found = Leaving([pool for *_, pool in ranked], [seconds for seconds, *_ in ranked], sizes)
            self._leaving[device] = known = (revision, found)
        return known[1]

    def departures(self, devices: Iterable[str]) -> Departures:
        """When devices have how many bytes free without an eviction."""
        found: list[tuple[int, float, str]] = []
        for id_ in devices:
            free, leaving = self._state.free[id_], self.leaving(id_)
            found += zip((free + size for size in leaving.sizes), (0.0, *leaving.seconds), repeat(id_))
        found.sort()
        firsts = list(accumulate(((seconds, id_) for _, seconds, id_ in reversed(found)), min))
        return Departures([size for size, *_ in found], firsts[::-1])
