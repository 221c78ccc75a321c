"""Models that are paused: nothing starts them, their pools drain, and their steps wait."""

from __future__ import annotations

from dataclasses import replace

from app.fleet.pool import Desired, PoolPhase
from app.kernel.database import Database
from app.scheduler import reconcile
from app.scheduler.needs import OperatorTarget
from app.scheduler.planner.explanation import Condition
from tests.scheduler.test_reconcile import A, B, Scene, scene

__all__ = ["scene"]


def test_the_pools_of_a_paused_model_drain_and_nothing_starts_it(scene: Scene, database: Database) -> None:
    scene.wait(A)
    scene.reconcile()
    pool = scene.begin()
    scene.demand = replace(scene.demand, paused=frozenset({A}), targets={A: OperatorTarget(pools=1, pinned=True)})
    scene.reconcile()
    assert scene.report(pool, PoolPhase.SERVING) is Desired.DRAIN
    assert scene.refusals() == {A: "the model is paused (the setting serving.paused)"}
    explained = reconcile.explain(database, scene.demand, [A])[A]
    assert (explained.condition, explained.waiting) == (Condition.REFUSED, 1)

    scene.end(pool)
    scene.reconcile()
    assert scene.pools(A) == []
    scene.wait(A, B)
    scene.reconcile()
    assert [one.model for one in scene.pools()] == [B], "others are placed all the same"

    scene.end(scene.begin())
    scene.wait(A)
    scene.demand = replace(scene.demand, paused=frozenset())
    scene.reconcile()
    assert len(scene.pools(A)) == 1
