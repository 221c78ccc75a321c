"""
An explanation: why a model runs or does not, what must happen next, and when its steps are expected to begin.

It is made from the same values as a plan, and never says other than the plan would do.
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
from app.scheduler.planner.placement import Plan, StartPool
from app.scheduler.planner.policy import PlacementPolicy


class Condition(StrEnum):
    """How a model stands."""

    #: Nobody waits for it, and no pool serves it.
    UNASKED = "unasked"
    #: A pool serves it; whoever waits has a slot, or gets one at once.
    SERVED = "served"
    #: Pools serve it, and all their slots are taken.
    QUEUED = "queued"
    #: A pool loads, waits for the bytes of others, or is started by the next plan.
    COMING = "coming"
    #: Steps wait, and nothing is done for them now.
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why, and what next."""

    configuration: str
    model: str
    condition: Condition
    reason: str
    #: Steps that wait.
    waiting: int = 0
    #: Until the last of them is expected to begin; None when that takes more than the passing of time.
    estimate: timedelta | None = timedelta(0)


def explain(
    fleet: Cluster,
    demand: Sequence[WaitingSteps],
    plan: Plan,
    now: datetime,
    configuration: Configuration,
    policy: PlacementPolicy | None = None,
) -> Explanation:
    """How the configuration stands. `plan` is that of the same fleet, demand and instant."""
    wants = model_demand(fleet.configurations, fleet.accounts, demand, now, policy or PlacementPolicy())
    want = wants.get(configuration.id) or no_demand(configuration)
    names = reasons.Names(fleet)
    pools = [pool for pool in fleet.pools if pool.configuration == configuration.id and pool.state in COMING]

    def told(condition: Condition, reason: str, estimate: float | None = 0.0) -> Explanation:
        after = None if estimate is None else timedelta(seconds=estimate)
        return Explanation(configuration.id, configuration.model, condition, reason, want.steps, after)

    serving = [pool for pool in pools if pool.state is PoolState.SERVING]
    if serving:
        busy, slots = sum(pool.busy for pool in serving), sum(pool.slots for pool in serving)
        where = f"{busy} of {slots} slots are taken on {names.devices({d for p in serving for d in p.bytes})}"
        if want.steps <= slots - busy:
            return told(Condition.SERVED, where)
        after = _turn(want, serving, slots)
        return told(Condition.QUEUED, f"{where}, and {want.steps} steps wait: about {reasons.seconds(after)}", after)
    if pools:
        first = min(pools, key=lambda pool: (_expected(pool, now), pool.id))
        after = _expected(first, now)
        return told(Condition.COMING, _state(first, fleet, names, after), after)
    for action in plan.actions:
        if isinstance(action, StartPool) and action.configuration == configuration.id:
            return told(Condition.COMING, action.reason, action.estimate.total_seconds())
    for refusal in plan.refusals:
        if refusal.configuration == configuration.id:
            estimate = None if refusal.estimate is None else refusal.estimate.total_seconds()
            return told(Condition.REFUSED, refusal.reason, estimate)
    return told(Condition.UNASKED, "nobody waits for it")


def without_demand(first: Explanation) -> Explanation:
    """How a model stands that nobody waits for, by what would become of a first step."""
    then = "would wait on" if first.condition is Condition.REFUSED else "would have it started"
    reason = f"nobody waits for it, and a step that did {then}: {first.reason.removeprefix(reasons.FIRST)}"
    return replace(first, condition=Condition.UNASKED, reason=reason, waiting=0)


def _turn(want: ModelDemand, serving: Sequence[Pool], slots: int) -> float:
    """Seconds until the last of those that wait has a slot."""
    each = want.work / want.steps
    first = min(pool.work_left.total_seconds() / max(pool.busy, 1) for pool in serving)
    return first + each * max(math.ceil(want.steps / slots) - 1, 0)


def _expected(pool: Pool, now: datetime) -> float:
    return max((pool.expected - now).total_seconds(), 0.0) if pool.expected else 0.0


def _state(pool: Pool, fleet: Cluster, names: reasons.Names, after: float) -> str:
    where = names.devices(pool.bytes)
    if pool.state is PoolState.STARTING:
        return f"its pool loads on {where}: about {reasons.seconds(after)}"
    waited = [other for other in fleet.pools if other.id in pool.backing]
    return f"its pool waits for {names.pools(waited)} to leave {where}, then loads: about {reasons.seconds(after)}"
