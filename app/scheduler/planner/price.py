"""
The price: the pressure from which on pools are evicted for a demand, and the wait before pools with work are drained.

Free bytes, overdue demand, and bytes that are reserved for the model have no price and no wait.
The price rises with the regret for the victims; pools that are not in use cost nothing while nothing loads on the host.
A drain is put off until a step has waited for longer than the drain takes, unless a deadline would be missed.

Reads the plan state and changes nothing.
"""

from __future__ import annotations

import math

from app.fleet.pool import PoolState
from app.scheduler.planner.candidate import MostRegret, PlacementCandidate
from app.scheduler.planner.demand import ModelDemand
from app.scheduler.planner.eviction import Eviction
from app.scheduler.planner.policy import PlacementPolicy
from app.scheduler.planner.state import PlanState


class EvictionPrice:
    """Judges the candidates of one plan."""

    def __init__(self, state: PlanState, eviction: Eviction, policy: PlacementPolicy) -> None:
        self._state, self._eviction, self._policy = state, eviction, policy
        #: The part of the regret that is the price of pools in use.
        self.threshold = policy.threshold

    def is_worth(self, demand: ModelDemand, candidate: PlacementCandidate) -> bool:
        """Whether the victims are stopped for the demand now."""
        if not candidate.victims or demand.overdue or self.reclaims(demand, candidate):
            return True
        return self.is_reached(demand, candidate) and demand.oldest >= self.drain_wait(demand, candidate)

    def is_reached(self, demand: ModelDemand, candidate: PlacementCandidate) -> bool:
        """Whether the pressure is at the price: victims that are not worth it are only put off then, by their drain."""
        return demand.pressure >= self.price(demand, candidate)

    def is_cheaper(self, demand: ModelDemand, one: PlacementCandidate, reclaiming: PlacementCandidate) -> bool:
        """
        Whether the owner of a reserve takes the candidate and leaves its own bytes to their borrowers.

        It costs only pools that are not in use, less regret than the borrowers, no reserve of another model, and no
        more in all: what the owner waits longer, weighted, is at most the regret that is saved.
        """
        return (
            one.regret < reclaiming.regret
            and one.cost <= reclaiming.cost
            and not one.borrows
            and not any(map(self._eviction.is_used, one.victims))
            and not self.reclaims(demand, one)
        )

    def reclaims(self, demand: ModelDemand, candidate: PlacementCandidate) -> bool:
        """Whether its bytes are reserved for the model."""
        return self._state.reclaims(demand.configuration, candidate.layout, candidate.devices)

    def price(self, demand: ModelDemand, candidate: PlacementCandidate) -> float:
        """The pressure, in weighted seconds, at which the victims are stopped."""
        price = candidate.regret * self._price_of_regret(demand)
        part = self._policy.per_load * self._state.loads[self._state.devices[candidate.devices[0]].host]
        if part >= 1 or any(map(self._eviction.is_used, candidate.victims)):
            return price
        # Nobody waits for the victims: a delay is of use only to those who load there, whom another load slows down.
        return price * part

    def _price_of_regret(self, demand: ModelDemand) -> float:
        return self.threshold * (self._policy.due if demand.due else 1.0)

    def most_regret(self, demand: ModelDemand) -> MostRegret:
        """The regret from which on no victims are worth it, a little above it; see `is_worth`."""
        price = self._price_of_regret(demand)
        if demand.overdue or price <= 0:
            return MostRegret(math.inf, math.inf)
        used, part = demand.pressure / price * (1 + 1e-9), min(1.0, self._policy.per_load * self._state.fewest_loads)
        return MostRegret(used / part if part > 0 else math.inf, used)

    def drain_wait(self, demand: ModelDemand, candidate: PlacementCandidate) -> float:
        """
        The seconds that the oldest step must have waited before the victims are drained; 0 where none is.

        A drain takes as long as the steps of the victim do, and its slots are not used meanwhile. Pools with short
        steps are often idle for a moment, and are evicted then at no such cost; pools with long ones are not, so that
        no more than the drain limit counts. A drain that a deadline needs begins in time for it.
        """
        drains = [
            victim.work_left.total_seconds()
            for victim in candidate.victims
            if victim.busy
            and victim.state is not PoolState.DRAINING
            and victim.id not in self._state.stopped
            and not self._eviction.preempts(victim, demand, reclaims=False)
        ]
        if not drains:
            return 0.0
        wait = self._policy.drain_wait_factor * min(max(drains), self._policy.drain_limit)
        return min(wait, demand.oldest + max(demand.until_deadline - max(drains), 0.0))
