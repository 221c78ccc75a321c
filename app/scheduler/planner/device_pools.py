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
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

from app.fleet.pool import PoolState
from app.scheduler.planner.cluster import Configuration, Pool
from app.scheduler.planner.demand import ModelDemand
from app.scheduler.planner.eviction import Eviction
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
    #: It may be evicted whatever the pressure of the demand is.
    certain: bool


@dataclass(frozen=True, slots=True)
class Evictable:
    """The pools on a device that demands of one class may evict, if their pressure is high enough."""

    pools: list[JudgedPool]
    #: Bytes of those that are idle, and of all.
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


class DevicePools:
    """Judges the pools of each device for one plan."""

    def __init__(self, state: PlanState, eviction: Eviction, policy: PlacementPolicy) -> None:
        self._state, self._eviction, self._lend = state, eviction, policy.lend
        #: By device, with the revision of the device.
        self._judged: dict[str, tuple[int, list[JudgedPool]]] = {}
        self._leaving: dict[str, tuple[int, Leaving]] = {}
        #: By class of demand and device.
        self._evictable: dict[tuple[object, ...], dict[str, tuple[int, Evictable]]] = {}
        self._strongest: dict[tuple[object, ...], ModelDemand] = {}

    def evictable(self, demand: ModelDemand, device: str) -> Evictable:
        """The pools that the demand may evict there, except for bytes that are reserved for its model."""
        # Where reserves are not lent, only the owner may evict pools in them.
        key = (demand.rank, demand.overdue, "" if self._lend else demand.configuration.id)
        known, revision = self._evictable.setdefault(key, {}), self._state.revisions[device]
        found = known.get(device)
        if found is None or found[0] != revision:
            if (strongest := self._strongest.get(key)) is None:
                strongest = self._strongest[key] = replace(demand, pressure=math.inf)
            known[device] = found = (revision, self._find(strongest, self._judge(device, revision)))
        return found[1]

    def _find(self, strongest: ModelDemand, judged: list[JudgedPool]) -> Evictable:
        may_evict, pools = self._eviction.may_evict, []
        weakest = replace(strongest, pressure=-math.inf)
        for one in judged:
            if one.certain:
                pools.append(one)
            elif may_evict(one.pool, strongest, reclaims=False):
                pools.append(one._replace(certain=may_evict(one.pool, weakest, reclaims=False)))
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
        return Evictable(pools, idle, sizes[-1], sizes, regrets, prices, working, seconds, smallest)

    def _judge(self, device: str, revision: int) -> list[JudgedPool]:
        """The pools whose bytes there can be promised, whether or not a demand may evict them."""
        known = self._judged.get(device)
        if known is None or known[0] != revision:
            state, eviction = self._state, self._eviction
            found = []
            for pool in state.pools_on[device]:
                if (pool.state is PoolState.SERVING or pool.state is PoolState.DRAINING) and (
                    size := state.unpromised(pool, device)
                ) > 0:
                    certain = eviction.may_evict(pool, _WEAKEST, reclaims=False)
                    found.append(JudgedPool(pool, size, eviction.regret(pool), pool.busy > 0, certain))
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
