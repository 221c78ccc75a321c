"""Explanations of models for users who wait for them."""

from __future__ import annotations

from collections.abc import Sequence

from app.fleet.pool import PoolState
from app.kernel.priority import Priority
from app.scheduler.planner.cluster import Cluster
from app.scheduler.planner.demand import WaitingSteps
from app.scheduler.planner.explanation import Condition, Explanation, explain
from app.scheduler.planner.placement import plan
from tests.scheduler.clusters import GB, NOW, gpu, model, pool, seconds, waits

M = model("m", 14)


def explained(cluster: Cluster, waiting: Sequence[WaitingSteps]) -> Explanation:
    return explain(cluster, waiting, plan(cluster, waiting, NOW), NOW, M)


def holding(*pools: object) -> Cluster:
    return Cluster((gpu("g0"),), pools, (M, model("old", 14)))  # type: ignore[arg-type]  # all of them are pools


def test_a_model_without_demand_is_unasked() -> None:
    assert explained(holding(), []).condition is Condition.UNASKED


def test_a_free_slot_serves_at_once() -> None:
    found = explained(holding(pool("p", "m", {"g0": 14}, busy=1, serving=Priority.BATCH)), [waits("m")])

    assert (found.condition, found.reason) == (Condition.SERVED, "1 of 2 slots are taken on g0")


def test_a_queue_says_how_long_it_takes() -> None:
    full = pool("p", "m", {"g0": 14}, busy=2, serving=Priority.BATCH, work_left=seconds(8))
    found = explained(holding(full), [waits("m", steps=6, work=seconds(10))])

    assert found.condition is Condition.QUEUED
    assert found.reason == "2 of 2 slots are taken on g0, and 6 steps wait: about 24 s"
    assert (found.waiting, found.estimate) == (6, seconds(24))


def test_a_pool_that_loads_or_waits_is_explained() -> None:
    loads = pool("p", "m", {"g0": 14}, state=PoolState.STARTING, loaded=None, expected=NOW + seconds(4))
    assert explained(holding(loads), [waits("m")]).reason == "its pool loads on g0: about 4 s"

    drains = pool("q", "old", {"g0": 14}, state=PoolState.DRAINING)
    waiting = pool(
        "p",
        "m",
        {"g0": 14},
        state=PoolState.WAITING,
        loaded=None,
        expected=NOW + seconds(9),
        backing={"q": {"g0": 14 * GB}},
    )
    found = explained(holding(drains, waiting), [waits("m")])
    assert found.reason == "its pool waits for `old` to leave g0, then loads: about 9 s"
    assert (found.condition, found.estimate) == (Condition.COMING, seconds(9))


def test_the_explanation_follows_the_plan() -> None:
    free = explained(holding(), [waits("m")])
    assert (free.condition, free.reason) == (
        Condition.COMING,
        "1 step waits, the oldest for 0.0 s: 13.04 GiB on g0, which is free",
    )

    busy = explained(holding(pool("q", "old", {"g0": 14}, busy=1, serving=Priority.INTERACTIVE)), [waits("m")])
    assert busy.condition is Condition.REFUSED
    assert busy.reason.startswith("needs 13.04 GiB, g0 has 5.59 GiB free; it waits for `old` with 1 step in flight")
