"""
A rule that knows every arrival: a measure of what can be gained by knowing what is requested next.

The victims are the idle pools that are requested again last (Belady, 1966), and a model is loaded before it is
requested, at the cost of pools that are requested later only. It is greedy: an optimum over all orders may be better.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from app.fleet.pool import COMING, PoolState
from app.scheduler.planner.cluster import Cluster, Configuration, Pool
from app.scheduler.planner.demand import WaitingSteps
from app.scheduler.planner.plan import Action, Plan
from benchmarks.fleet_baselines import Bytes, free, sets, start, stop
from benchmarks.fleet_values import EPOCH, Workload


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A model without a pool that is waited for, or will be requested before it could be loaded."""

    configuration: Configuration
    waits: bool
    rank: int
    #: When the first request came, or will come.
    since: float


class KnownArrivals:
    """LRU in parallel, with the time of the next request in place of that of the last one."""

    name: str = "known arrivals"
    by_class: bool = True
    drain: float = math.inf

    def __init__(self, workload: Workload, ahead: float = 1.5) -> None:
        """A model is loaded ahead so many times as early as it takes to load; 0: only once it is requested."""
        self.ahead = ahead
        self.arrivals: dict[str, list[tuple[float, int]]] = {one.id: [] for one in workload.configurations}
        for request in workload.requests:
            self.arrivals[request.configuration].append((request.ready, request.priority.rank))
        for times in self.arrivals.values():
            times.sort()

    def next_arrival(self, configuration: str, now: float) -> tuple[float, int]:
        """When it is requested next, and the rank of the class; never: infinite."""
        times = self.arrivals[configuration]
        at = bisect_right(times, (now, math.inf))
        return times[at] if at < len(times) else (math.inf, 0)

    def plan(self, fleet: Cluster, demand: Sequence[WaitingSteps], now: datetime) -> Plan:
        time = (now - EPOCH).total_seconds()
        waited_for = {one.model for one in demand if one.ready is None}
        room = Counter(free(fleet))
        # Who is requested again last goes first.
        later = sorted(
            (-self.next_arrival(pool.configuration, time)[0], pool.id, pool)
            for pool in fleet.pools
            if pool.state is PoolState.SERVING and not pool.busy and pool.configuration not in waited_for
        )
        idle = [pool for *_, pool in later]
        actions: list[Action] = []
        for wanted in self.wanted(fleet, demand, time):
            best = self.cheapest(fleet, wanted, room, idle, time)
            if best is None:
                continue
            victims, sizes = best
            actions += [stop(pool) for pool in victims]
            actions.append(start(wanted.configuration.id, sizes, frozenset(pool.id for pool in victims)))
            idle = [pool for pool in idle if pool not in victims]
            for device, size in sizes.items():
                room[device] -= max(size - sum(pool.bytes.get(device, 0) for pool in victims), 0)
        return Plan(tuple(actions))

    def wanted(self, fleet: Cluster, demand: Sequence[WaitingSteps], now: float) -> list[_Wanted]:
        """Models that need a pool, those that are waited for first, then by class and time."""
        there, found = {pool.configuration for pool in fleet.pools if pool.state in COMING}, []
        for one in fleet.configurations:
            if one.id in there:
                continue
            waiting = [group for group in demand if group.model == one.id and group.ready is None]
            if waiting:
                since = (min(group.oldest for group in waiting) - EPOCH).total_seconds()
                found.append(_Wanted(one, True, min(group.priority.rank for group in waiting), since))
            else:
                since, rank = self.next_arrival(one.id, now)
                if since <= now + self.ahead * one.layouts[0].load.total_seconds():
                    found.append(_Wanted(one, False, rank, since))
        return sorted(found, key=lambda one: (not one.waits, one.rank, one.since, one.configuration.id))

    def cheapest(
        self, fleet: Cluster, wanted: _Wanted, room: Counter[str], idle: Sequence[Pool], now: float
    ) -> tuple[list[Pool], Bytes] | None:
        """Victims and bytes on the device set whose victims are requested again last; None where there is none."""
        best: tuple[tuple[object, ...], list[Pool], Bytes] | None = None
        for devices, part in sets(fleet, wanted.configuration):
            left = {device: part - room[device] for device in devices}
            victims: list[Pool] = []
            for pool in idle:
                later = wanted.waits or self.next_arrival(pool.configuration, now)[0] > wanted.since
                if later and any(left[device] > 0 and pool.bytes.get(device, 0) for device in devices):
                    victims.append(pool)
                    left = {device: size - pool.bytes.get(device, 0) for device, size in left.items()}
            for pool in reversed(victims.copy()):
                if all(size + pool.bytes.get(device, 0) <= 0 for device, size in left.items()):  # the others suffice
                    victims.remove(pool)
                    left = {device: size + pool.bytes.get(device, 0) for device, size in left.items()}
            if all(size <= 0 for size in left.values()):
                soonest = min((self.next_arrival(pool.configuration, now)[0] for pool in victims), default=math.inf)
                key = (bool(victims), -soonest, sum(room[device] for device in devices), devices)
                if best is None or key < best[0]:
                    best = key, victims, dict.fromkeys(devices, part)
        return best and best[1:]
