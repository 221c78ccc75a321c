"""
Eviction: what stopping a pool costs, whether it may be stopped for a demand, and how long that takes.

The regret for a pool is the weighted time that its next steps are expected to wait because it is gone (as in
GreedyDual: FaasCache, ASPLOS 2021). It is high for models that are likely to be requested soon, load slowly and are
used much; a rare model is likely to be requested when the usual gap between its arrivals ends. The steps that wait for
the model already wait for as long. For a pool with work, the work that it does not
do meanwhile counts too, and the work that is thrown away if its steps are preempted.
A pool with work is evicted only for a higher class than the class of its steps; for an equal class, when the demand has
waited for a multiple of the regret; for overdue demand; or for bytes that are reserved for another model.
Except for the last, it is evicted only once it has served for a multiple of its own load time (it is fresh until then),
and not while it works on a step that was preempted too often.

Reads the plan state and changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime

from app.fleet.pool import PoolState
from app.scheduler.planner.arrivals import ArrivalPattern
from app.scheduler.planner.cluster import Cluster, Configuration, Pool
from app.scheduler.planner.demand import NO_RANK, ModelDemand, load_seconds
from app.scheduler.planner.policy import PlacementPolicy
from app.scheduler.planner.state import PlanState

#: States in which the bytes of a pool can be promised to others.
EVICTABLE = frozenset({PoolState.SERVING, PoolState.DRAINING})


class Eviction:
    """Judges the pools of one plan."""

    def __init__(
        self,
        cluster: Cluster,
        demands: Mapping[str, ModelDemand],
        state: PlanState,
        now: datetime,
        policy: PlacementPolicy,
    ) -> None:
        self.configurations = {configuration.id: configuration for configuration in cluster.configurations}
        self._rates, self._demands, self._state = cluster.rates, demands, state
        self._arrivals = cluster.arrivals
        self._now, self._policy = now, policy
        #: By configuration, the regret for its only pool. It does not depend on the plan.
        self._regrets: dict[str, float] = {}
        #: By configuration, the seconds of a start.
        self._loads = {id_: load_seconds(one) for id_, one in self.configurations.items()}

    # ---- the cost ----

    def regret(self, pool: Pool) -> float:
        """Weighted seconds that the next steps are expected to wait when the pool is stopped; 0 once it is."""
        if pool.state is PoolState.DRAINING or pool.id in self._state.stopped:
            return 0.0
        if (alone := self._regrets.get(pool.configuration)) is None:
            alone = self._regrets[pool.configuration] = self._regret(pool.configuration)
        shared = alone * (self._policy.sibling if self._state.count_coming(pool.configuration) > 1 else 1.0)
        return shared + self._work_lost(pool)

    def _work_lost(self, pool: Pool) -> float:
        """Weighted seconds of its slots in use until it is back, and of its steps in flight, which are half done."""
        if not pool.busy or pool.serving is None:
            return 0.0
        seconds = self._load(pool) + self._policy.recovery + pool.work_left.total_seconds()
        return self._policy.weights[pool.serving] * pool.busy * seconds

    def _regret(self, id_: str) -> float:
        configuration = self.configurations.get(id_)
        if configuration is None:
            return 0.0
        demand, rates = self._demands.get(id_), self._rates.get(configuration.model, {})
        gone = load_seconds(configuration) + self._policy.recovery
        regret, rate = 0.0, sum(rates.values())
        if rate > 0:
            weight = sum(self._policy.weights[priority] * (part / rate) for priority, part in rates.items())
            # The first step waits for all of the time, later ones for half of it on average.
            regret = weight * self.request_probability(configuration) * gone * (1 + rate * gone / 2)
        if (pattern := self.pattern(configuration)) is not None:
            probability = pattern.probability(self._now, self._policy.horizon)
            regret = max(regret, self._policy.weights[pattern.priority] * probability * gone)
        if demand is not None:
            regret += (demand.upcoming + demand.growth) * gone + demand.pressure
        return regret

    def request_probability(self, configuration: Configuration) -> float:
        """The probability that the model is requested within the horizon."""
        rates = self._rates.get(configuration.model)
        return 1 - math.exp(-sum(rates.values()) * self._policy.horizon) if rates else 0.0

    def pattern(self, configuration: Configuration) -> ArrivalPattern | None:
        """The arrival pattern of a model that is requested with regularity; None of others."""
        found = self._arrivals.get(configuration.model)
        return found if found is not None and found.is_regular(self._policy.spread) else None

    def is_expected(self, configuration: Configuration) -> bool:
        """Whether its next arrival can be near: then a grant for it is kept."""
        pattern = self.pattern(configuration)
        within = load_seconds(configuration) + self._policy.spread
        return pattern is not None and pattern.probability(self._now, within) > 0

    # ---- whether ----

    def is_used(self, pool: Pool) -> bool:
        """Whether it works, or steps wait for it and the plan does not stop it."""
        own = self._demands.get(pool.configuration)
        remains = pool.state is not PoolState.DRAINING and pool.id not in self._state.stopped
        return pool.busy > 0 or (remains and own is not None and own.steps > 0)

    def is_kept(self, pool: Pool) -> bool:
        """Whether it is one of the pools that its model keeps running."""
        return pool.id in self._state.kept

    def is_protected(self, pool: Pool) -> bool:
        """Whether it is never evicted: it is kept, or may still live though its lease has ended."""
        return self.is_kept(pool) or pool.state is PoolState.SUSPECT

    def may_evict(self, pool: Pool, demand: ModelDemand, reclaims: bool) -> bool:
        """Whether the pool may be stopped for the demand; with `reclaims`, for bytes reserved for that model."""
        if pool.state is PoolState.DRAINING or pool.id in self._state.stopped:
            return True
        if self.is_protected(pool) or (
            not self._policy.lend and self._state.has_reserve(pool) and pool.configuration != demand.configuration.id
        ):
            return False
        own = self._demands.get(pool.configuration)
        waits = own is not None and own.steps > 0
        if reclaims or not (pool.busy or waits):
            return True
        if self._is_fresh(pool) or (pool.busy and pool.preemptions >= self._policy.max_preemptions):
            return False
        if demand.overdue:
            return True
        if (own is not None and own.overdue) or (pool.busy and pool.serving is None):
            return False
        working = NO_RANK if pool.serving is None else pool.serving.rank
        rank = min(working, NO_RANK if own is None else own.rank)
        if demand.rank == rank:
            return demand.pressure >= self._policy.drain_factor * self.regret(pool)
        return demand.rank < rank

    def _is_fresh(self, pool: Pool) -> bool:
        """Whether it has not served yet for the multiple of its load time."""
        if pool.loaded is None:
            return True
        return (self._now - pool.loaded).total_seconds() < self._policy.amortise * self._load(pool)

    def _load(self, pool: Pool) -> float:
        return self._loads.get(pool.configuration, 0.0)

    def may_move(self, pool: Pool) -> bool:
        """
        Whether it may be stopped here and started elsewhere: it is idle and not pinned, no step waits for it, and its
        namespace may hold its bytes twice for that time.
        """
        configuration, demand = self.configurations.get(pool.configuration), self._demands.get(pool.configuration)
        return (
            pool.state is PoolState.SERVING
            and not pool.busy
            and pool.id not in self._state.stopped
            and configuration is not None
            and not (configuration.pinned and self.is_kept(pool))
            and (demand is None or not demand.steps)
            and self._state.may_hold(pool.namespace, sum(pool.bytes.values()))
        )

    # ---- how long ----

    def grace_period(self, pool: Pool, demand: ModelDemand, reclaims: bool) -> float:
        """
        Seconds that the steps in flight of a pool may take before they are preempted for the demand.

        For reserved bytes it is the time within which the reserve is returned; for a higher class the drain limit,
        unless the steps were preempted too often; else infinite.
        """
        reserve = demand.configuration.reserve
        if reclaims and reserve is not None:
            return max(reserve.within.total_seconds() - self._policy.unload, 0.0)
        if pool.serving is None or pool.serving.rank <= demand.rank or pool.preemptions >= self._policy.max_preemptions:
            return math.inf
        return self._policy.drain_limit

    def preempts(self, pool: Pool, demand: ModelDemand, reclaims: bool) -> bool:
        """Whether its steps are preempted at once, because they would exceed the grace period."""
        if not pool.busy or pool.state is PoolState.DRAINING:
            return False
        return pool.work_left.total_seconds() > self.grace_period(pool, demand, reclaims)

    def seconds_to_free(self, pool: Pool, demand: ModelDemand, reclaims: bool) -> float:
        """Seconds until its bytes are free when it is stopped now for the demand."""
        left = pool.work_left.total_seconds() if pool.busy else 0.0
        return self._policy.unload + (0.0 if self.preempts(pool, demand, reclaims) else left)

    def seconds_to_leave(self, pool: Pool) -> float:
        """
        Seconds until its bytes can be free without a preemption.

        A pool with work stays until it has served for the multiple of its load time and its steps have ended.
        """
        left = pool.work_left.total_seconds() if pool.busy else 0.0
        if pool.state is PoolState.DRAINING or pool.id in self._state.stopped:
            return left + self._policy.unload
        load = self._load(pool)
        paid = self._policy.amortise * load
        if pool.loaded is None:
            expected = (pool.expected - self._now).total_seconds() if pool.expected else load
            return max(expected, 0.0) + paid + self._policy.unload
        own = self._demands.get(pool.configuration)
        if pool.busy or (own is not None and own.steps):
            left = max(left, paid - (self._now - pool.loaded).total_seconds())
        return left + self._policy.unload
