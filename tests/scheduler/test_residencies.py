"""Residencies: how long clients want a model loaded, in Valkey and in a reconcile pass."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
import redis
from sqlalchemy import text

from app.fleet.pool import Desired, PoolPhase
from app.scheduler import residencies
from app.scheduler.residencies import Residencies, Residency
from tests.scheduler.test_reconcile import A, B, Scene, add_host, scene

__all__ = ["scene"]


@pytest.fixture
def served(scene: Scene) -> Scene:
    """A pool of A that serves, without demand."""
    scene.wait(A)
    scene.reconcile()
    scene.report(scene.begin(), PoolPhase.SERVING)
    return replace(scene, demand=replace(scene.demand, waiting=[]))


def want(scene: Scene, keep: timedelta | None, *pools: str) -> None:
    found = pools or tuple(pool.id for pool in scene.pools())
    scene.demand = replace(scene.demand, residencies={A: Residency(keep, frozenset(found))})


def age(scene: Scene) -> None:
    """Let the pool be idle for an hour."""
    with scene.database.work() as work:
        work.run(text("UPDATE pool_report SET serving_at = serving_at - interval '1 h', last_used_at = NULL"))


def desired(scene: Scene) -> list[Desired]:
    return [pool.desired for pool in scene.granted()]


def test_a_model_that_nobody_wants_is_unloaded_at_once(served: Scene) -> None:
    served.reconcile()
    assert desired(served) == [Desired.RUN]
    want(served, timedelta(0))
    served.reconcile()
    assert desired(served) == [Desired.DRAIN]


def test_a_model_is_kept_beyond_the_time_of_its_entry(served: Scene) -> None:
    age(served)
    want(served, None)
    served.reconcile()
    assert desired(served) == [Desired.RUN]
    want(served, timedelta(minutes=90))
    served.reconcile()
    assert desired(served) == [Desired.RUN]
    served.demand = replace(served.demand, residencies={})
    served.reconcile()
    assert desired(served) == [Desired.DRAIN]


def test_a_model_that_is_kept_forever_makes_room_for_others(served: Scene) -> None:
    want(served, None)
    served.wait(B)
    served.reconcile()
    assert Desired.DRAIN in desired(served)


def test_a_residency_ends_with_the_pools_that_it_was_for(served: Scene) -> None:
    want(served, timedelta(0), "another pool")
    served.reconcile()
    assert desired(served) == [Desired.RUN]


def test_a_residency_does_not_unload_the_pool_that_comes_after_its_own(served: Scene) -> None:
    want(served, timedelta(0))
    idle = served.demand
    served.reconcile()
    assert desired(served) == [Desired.DRAIN]
    add_host(served, "other")
    served.wait(A)
    served.reconcile()
    served.begin("other")
    served.demand = idle
    served.reconcile()
    assert desired(served) == [Desired.DRAIN], "it drains still"
    assert [pool.desired for pool in served.granted("other")] == [Desired.RUN]


def test_residencies_are_read_as_they_were_stored(redis_url: str, valkey: redis.Redis) -> None:
    forever, short = Residency(None, frozenset({"p"})), Residency(timedelta(seconds=1.5), frozenset({"q", "r"}))
    residencies.store(valkey, A, forever)
    residencies.store(valkey, B, short)
    residencies.store(valkey, "gone:1", short)
    valkey.hset("arriero:residencies", "bad:1", "[]")
    reader = Residencies(redis_url)
    assert reader.current([A, B, "bad:1"]) == {A: forever, B: short, "gone:1": short}
    assert reader.current([A, B, "bad:1"]) == {A: forever, B: short}, "models that the catalogue lost are deleted"
    reader.close()


def test_the_last_residencies_hold_while_redis_is_away(redis_url: str, valkey: redis.Redis) -> None:
    residencies.store(valkey, A, Residency(None, frozenset({"p"})))
    reader = Residencies(redis_url)
    known = reader.current([A])
    valkey.delete("arriero:residencies")
    valkey.set("arriero:residencies", "of another type")
    assert reader.current([A]) == known
    reader.close()
