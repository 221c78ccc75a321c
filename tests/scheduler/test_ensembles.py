"""The members of an ensemble, as the planner sees them: steps that are ready, or will be soon."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from app.scheduler.planner.cluster import Cluster
from app.scheduler.planner.demand import WaitingSteps
from app.scheduler.planner.placement import plan
from app.scheduler.planner.plan import Plan, StartPool, StopPool
from tests.scheduler.clusters import NOW, gpu, model, pool, seconds, waits

SMALL, LARGE, OTHER = model("small", 4), model("large", 10), model("other", 8)


def started(made: Plan) -> set[str]:
    return {action.configuration for action in made.actions if isinstance(action, StartPool)}


def stopped(made: Plan) -> set[str]:
    return {action.pool for action in made.actions if isinstance(action, StopPool)}


def soon(name: str, after: float) -> WaitingSteps:
    """A step of a member that is not asked yet."""
    when = NOW + timedelta(seconds=after)
    return replace(waits(name), oldest=when, ready=when)


def test_members_that_fit_together_are_loaded_in_one_pass() -> None:
    cluster = Cluster((gpu("g0", 20),), (), (SMALL, LARGE))

    assert started(plan(cluster, [waits("small"), waits("large")], NOW)) == {"small", "large"}


def test_an_idle_pool_goes_before_a_member_does() -> None:
    """The members take the place of a model that nobody wants, not that of each other."""
    idle = pool("old", "other", {"g0": 8}, last_used=NOW - seconds(3_600))
    cluster = Cluster((gpu("g0", 20),), (idle, pool("s", "small", {"g0": 4})), (SMALL, LARGE, OTHER))
    made = plan(cluster, [waits("small"), waits("large", age=60)], NOW)

    assert stopped(made) == {"old"}
    assert started(made) == {"large"}


def test_the_next_member_of_a_cascade_is_loaded_beside_the_first() -> None:
    """It is demand of the near future: it takes free memory, and evicts nothing that works."""
    first = pool("s", "small", {"g0": 4}, busy=1)
    roomy = Cluster((gpu("g0", 20),), (first,), (SMALL, LARGE))
    full = Cluster((gpu("g0", 10),), (first,), (SMALL, LARGE))

    assert started(plan(roomy, [soon("large", 2)], NOW)) == {"large"}
    assert stopped(plan(full, [soon("large", 2)], NOW)) == set()
