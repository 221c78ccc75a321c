"""
An explanation: why a model runs or does not, what must happen next, and when its steps are expected to begin.

It is derived from the cluster, the demand and the plan for them, and never contradicts the plan. It changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum

from app.fleet.pool import COMING, PoolState
from app.scheduler.planner import reasons
from app.scheduler.planner.cluster import Cluster, Configuration, Pool
from app.scheduler.planner.demand import ModelDemand, WaitingSteps, model_demand, no_demand
from app.scheduler.planner.plan import Plan, StartPool
from app.scheduler.planner.policy import PlacementPolicy


class Condition(StrEnum):
    """The state of a model."""

    #: No step waits for it, and no pool serves it.
    UNASKED = "unasked"
    #: A pool serves it, and has slots for all waiting steps.
    SERVED = "served"
    #: Pools serve it, and waiting steps exceed their free slots.
    QUEUED = "queued"
    #: A pool loads, waits for bytes, or is started by the next plan.
    COMING = "coming"
    #: Steps wait, and nothing is done for them now.
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Explanation:
    """The state of a model, and what happens next."""

    configuration: str
    model: str
    condition: Condition
    reason: str
    #: Steps that wait.
    waiting: int = 0
    #: Until the last of them is expected to begin; None when waiting alone does not help.
    estimate: timedelta | None = timedelta(0)


def explain(
    cluster: Cluster,
    waiting: Sequence[WaitingSteps],
    plan: Plan,
    now: datetime,
    configuration: Configuration,
    policy: PlacementPolicy | None = None,
) -> Explanation:
    """The explanation of one configuration. `plan` is that of the same cluster, steps and instant."""
    demands = model_demand(cluster.configurations, cluster.accounts, waiting, now, policy or PlacementPolicy())
    demand = demands.get(configuration.id) or no_demand(configuration)
    names = reasons.Names(cluster)
    pools = [pool for pool in cluster.pools if pool.configuration == configuration.id and pool.state in COMING]

    def explanation(condition: Condition, reason: str, estimate: float | None = 0.0) -> Explanation:
        after = None if estimate is None else timedelta(seconds=estimate)
        return Explanation(configuration.id, configuration.model, condition, reason, demand.steps, after)

    serving = [pool for pool in pools if pool.state is PoolState.SERVING]
    if serving:
        busy, slots = sum(pool.busy for pool in serving), sum(pool.slots for pool in serving)
        where = f"{busy} of {slots} slots are taken on {names.devices({d for p in serving for d in p.bytes})}"
        if demand.steps <= slots - busy:
            return explanation(Condition.SERVED, where)
        after = _queue_seconds(demand, serving, slots)
        text = f"{where}, and {demand.steps} steps wait: about {reasons.seconds(after)}"
        return explanation(Condition.QUEUED, text, after)
    if pools:
        first = min(pools, key=lambda pool: (_seconds_to_serve(pool, now), pool.id))
        after = _seconds_to_serve(first, now)
        return explanation(Condition.COMING, _progress(first, cluster, names, after), after)
    for action in plan.actions:
        if isinstance(action, StartPool) and action.configuration == configuration.id:
            return explanation(Condition.COMING, action.reason, action.estimate.total_seconds())
    for refusal in plan.refusals:
        if refusal.configuration == configuration.id:
            estimate = None if refusal.estimate is None else refusal.estimate.total_seconds()
            return explanation(Condition.REFUSED, refusal.reason, estimate)
    return explanation(Condition.UNASKED, "no step waits for it")


def without_demand(
    first: Explanation, cluster: Cluster, now: datetime, policy: PlacementPolicy | None = None
) -> Explanation:
    """The explanation of a model for which no step waits, derived from the explanation for a first step."""
    then = "would have to wait" if first.condition is Condition.REFUSED else "would start it"
    reason = f"no step waits for it; a first step {then}: {first.reason.removeprefix(reasons.FIRST)}"
    pattern = cluster.arrivals.get(first.model)
    if pattern is not None and pattern.is_regular((policy or PlacementPolicy()).spread):
        reason += f"; {reasons.usual(pattern, now)}, so that it is loaded before the next time"
    return replace(first, condition=Condition.UNASKED, reason=reason, waiting=0)


def _queue_seconds(demand: ModelDemand, serving: Sequence[Pool], slots: int) -> float:
    """Seconds until the last waiting step has a slot."""
    each = demand.work / demand.steps
    first = min(pool.work_left.total_seconds() / max(pool.busy, 1) for pool in serving)
    return first + each * max(math.ceil(demand.steps / slots) - 1, 0)


def _seconds_to_serve(pool: Pool, now: datetime) -> float:
    return max((pool.expected - now).total_seconds(), 0.0) if pool.expected else 0.0


def _progress(pool: Pool, cluster: Cluster, names: reasons.Names, after: float) -> str:
    where = names.devices(pool.bytes)
    if pool.state is PoolState.STARTING:
        return f"its pool loads on {where}: about {reasons.seconds(after)}"
    victims = [other for other in cluster.pools if other.id in pool.backing]
    return f"its pool waits for {names.pools(victims)} to leave {where}, then loads: about {reasons.seconds(after)}"
