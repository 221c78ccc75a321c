"""
Selection: the best candidate for a demand, found without computing every candidate.

Victims are the costly part of a candidate. For each device set, limits are computed first: no victims there have less
regret, and no candidate there has a smaller order. Device sets are then looked at in the order of their limits, until
the best candidate that was found is better than the limits of all others.
The result is the one that comparing all candidates gives.

Reads the plan state and changes nothing.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from app.footprint.layout import KnownLayout
from app.scheduler.planner.candidate import NO_VICTIMS, MostRegret, PlacementCandidate
from app.scheduler.planner.cluster import NO_TIME, Packing
from app.scheduler.planner.demand import ModelDemand
from app.scheduler.planner.device_pools import Evictable
from app.scheduler.planner.policy import PlacementPolicy
from app.scheduler.planner.search import Search
from app.scheduler.planner.state import DeviceSet, PlanState

#: What a sum of rounded numbers may be smaller than the same sum in another order: a part of it, and an absolute part.
_PART, _ABSOLUTE = 1e-9, 1e-7

#: The best candidate that is worth its regret, and the one with the least regret of those that are not.
Selected = tuple[PlacementCandidate | None, PlacementCandidate | None]


@dataclass(slots=True)
class _Place:
    """A device set, and the limits of the candidate there."""

    layout: KnownLayout
    devices: DeviceSet
    #: The regret for victims there is not less.
    regret: float
    #: Not only free bytes are looked at.
    evicts: bool = True
    #: Of the devices with too few free bytes, what is missing there and what the demand may evict.
    needs: Sequence[tuple[int, Evictable]] = ()
    #: The candidate once it is computed.
    candidate: PlacementCandidate | None = None
    known: bool = False

    @property
    def may_be_unused(self) -> bool:
        """Whether pools that are not in use may suffice as victims."""
        return all(missing <= evictable.unused for missing, evictable in self.needs)


class CandidateSelection:
    """Selects candidates for one plan."""

    def __init__(self, search: Search, state: PlanState, policy: PlacementPolicy) -> None:
        self._search, self._state, self._policy = search, state, policy

    def select(
        self, demand: ModelDemand, is_worth: Callable[[PlacementCandidate], bool], most_regret: MostRegret
    ) -> Selected:
        """
        The candidate with the smallest order of those that are worth their regret; where there is none, the candidate
        with the least regret as well.
        """
        fastest = max((layout.tokens_per_second for layout in demand.configuration.layouts), default=1.0)
        places = list(self._places(demand))

        def compute(place: _Place) -> PlacementCandidate | None:
            if not place.known:
                place.known, place.candidate = True, self._compute(demand, place, fastest)
            return place.candidate

        # Places of the same order are told apart by their position: the first is taken.
        orders = [
            (self._least_order(demand, place, fastest), at)
            for at, place in enumerate(places)
            if place.regret <= (most_regret.unused if place.may_be_unused else most_regret.used)
        ]
        heapq.heapify(orders)
        best: tuple[tuple[object, ...], int, PlacementCandidate] | None = None
        while orders and (best is None or orders[0][0] <= best[0]):
            at = heapq.heappop(orders)[1]
            found = compute(places[at])
            if found is not None and is_worth(found) and (best is None or (found.order, at) < best[:2]):
                best = found.order, at, found
        if best is not None:
            return best[2], None
        regrets = [(place.regret, place.devices, at) for at, place in enumerate(places)]
        heapq.heapify(regrets)
        nearest: tuple[tuple[float, DeviceSet], int, PlacementCandidate] | None = None
        while regrets and (nearest is None or regrets[0][0] <= nearest[0][0]):
            at = heapq.heappop(regrets)[2]
            found = compute(places[at])
            if found is not None and (nearest is None or ((found.regret, found.devices), at) < nearest[:2]):
                nearest = (found.regret, found.devices), at, found
        return None, nearest and nearest[2]

    def _places(self, demand: ModelDemand) -> Iterator[_Place]:
        """The device sets with free bytes and, for layouts that fit nowhere, those with enough bytes to evict."""
        search, state, configuration = self._search, self._state, demand.configuration
        backed_off = search.backed_off(configuration.id)
        for layout in configuration.layouts:
            found = False
            for devices in search.sets.fitting(configuration, layout, backed_off):
                if search.is_open(configuration, devices, layout, demand):
                    found = True
                    yield _Place(layout, devices, 0.0, evicts=False)
            if found:
                continue
            free, parts = state.free, (*layout.parts, layout.ram)
            is_alone = len(layout.parts) == 1 and not layout.ram and not search.sets.conflicts_with(configuration)
            if is_alone and not state.has_idle_reserves and layout.parts[0] > search.most_bytes(demand, layout.type):
                continue
            evictable = search.pools.evictable(demand)
            for devices in search.cheapest(demand, layout, backed_off):
                if not search.is_open(configuration, devices, layout, demand):
                    continue
                if state.has_idle_reserves and state.reclaims(configuration, layout, devices):
                    yield _Place(layout, devices, 0.0)
                    continue
                regret, needs = 0.0, []
                for device, part in zip(devices, parts, strict=False):
                    missing = part - free[device]
                    if missing > 0:
                        found_there = evictable.on(device)
                        if missing > found_there.total:
                            break
                        regret = max(regret, found_there.least_regret(missing))
                        needs.append((missing, found_there))
                else:
                    yield _Place(layout, devices, regret, needs=needs)

    def _least_order(self, demand: ModelDemand, place: _Place, fastest: float) -> tuple[object, ...]:
        """No candidate there has a smaller order; for a free place it is the order itself, but for rounding."""
        state, configuration, layout, devices = self._state, demand.configuration, place.layout, place.devices
        computing = devices[: len(layout.parts)]
        host = state.devices[devices[0]].host
        fetch = configuration.files.get(host, configuration.fetch or NO_TIME).total_seconds()
        idle, wait = True, 0.0
        for missing, evictable in place.needs:
            idle = idle and missing <= evictable.idle
            wait = max(wait, self._policy.unload, evictable.least_wait(missing))
        estimate = max(wait, fetch) + layout.load.total_seconds()
        sharing = self._search.sharing(computing, ())
        if not idle:  # some of the pools that work there are victims
            alone = len(devices) == 1 and not self._search.sets.conflicts_with(configuration)
            victims = place.needs[0][1].most_victims(place.needs[0][0]) if alone else math.inf
            sharing = max(sharing - victims, 0.0)
        cost = self._search.waiting_cost(demand, layout, computing, estimate, sharing, fastest) + place.regret
        borrows = state.borrows(configuration.id, devices)
        least = round(cost - abs(cost) * _PART - _ABSOLUTE, 3)
        if configuration.packing is Packing.SPREAD:  # the rest depends on the victims
            return borrows, not idle, least
        left = sum(state.free[d] - part for d, part in zip(devices, layout.parts, strict=False))
        return borrows, not idle, least, 0.0, 0.0, left, *devices

    def _compute(self, demand: ModelDemand, place: _Place, fastest: float) -> PlacementCandidate | None:
        search, layout, devices = self._search, place.layout, place.devices
        victims = search.victims(demand, layout, devices, moving=False) if place.evicts else NO_VICTIMS
        return None if victims is None else search.candidate(demand, layout, devices, victims, fastest)
