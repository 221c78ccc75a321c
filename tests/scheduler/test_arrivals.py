"""Arrival patterns, and the pools that are started for models that are expected."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from random import Random

import pytest

from app.fleet.pool import PoolState
from app.kernel.priority import Priority
from app.scheduler.planner.arrivals import KEPT_GAPS, ArrivalPattern
from app.scheduler.planner.cluster import Cluster
from app.scheduler.planner.explanation import explain, without_demand
from app.scheduler.planner.placement import plan
from app.scheduler.planner.plan import Plan, Purpose, StartPool, StopPool
from app.scheduler.planner.policy import PlacementPolicy
from tests.scheduler.clusters import NOW, gpu, model, pool, seconds, waits

SPREAD = PlacementPolicy().spread
#: Every ten minutes.
REGULAR = (600.0, 590.0, 610.0, 600.0, 620.0, 580.0)


def last_asked(ago: float, gaps: tuple[float, ...] = REGULAR) -> ArrivalPattern:
    return ArrivalPattern(NOW - seconds(ago), Priority.INTERACTIVE, gaps)


def fleet(pattern: ArrivalPattern, *pools: object, **more: object) -> Cluster:
    """One device, and a model that takes a minute to load."""
    models = (model("rare", 14, load=60), model("old", 14))
    return Cluster((gpu("g0"),), pools, models, arrivals={"rare": pattern}, **more)  # type: ignore[arg-type]  # pools, and fields by name


def starts(made: Plan) -> list[StartPool]:
    return [action for action in made.actions if isinstance(action, StartPool)]


def test_requests_of_one_burst_are_one_arrival() -> None:
    pattern = ArrivalPattern(NOW, Priority.BATCH)
    for later in (5, 10, 29, 629, 640):
        pattern = pattern.after(NOW + seconds(later), Priority.STANDARD)

    assert pattern == ArrivalPattern(NOW + seconds(640), Priority.STANDARD, (600.0,))
    assert pattern.after(NOW, Priority.BATCH) is pattern, "older ones change nothing"


def test_a_pattern_does_not_grow_and_follows_a_change() -> None:
    pattern, at = last_asked(0), NOW
    for _ in range(50):
        at += timedelta(hours=1)
        pattern = pattern.after(at, Priority.BATCH)

    assert pattern.gaps == (3600.0,) * KEPT_GAPS


def test_patterns_with_gaps_of_all_lengths_are_not_regular() -> None:
    """The gaps of a Poisson process, as they are kept."""
    chance = Random(3)
    found = 0
    for _ in range(1000):
        gaps = tuple(max(chance.expovariate(1 / 600), 30.0) for _ in range(KEPT_GAPS))
        found += last_asked(0, gaps).is_regular(SPREAD)
    assert found < 20

    assert last_asked(0).is_regular(SPREAD)
    assert last_asked(0, (*REGULAR, 60.0, 3000.0, 200.0)).is_regular(SPREAD), "some may differ"


def test_a_pattern_of_few_gaps_or_of_short_ones_is_not_regular() -> None:
    assert not last_asked(0, REGULAR[:3]).is_regular(SPREAD)
    assert not last_asked(0, (40.0,) * 9).is_regular(SPREAD)
    assert not last_asked(0).is_regular(0)


def test_the_probability_rises_as_the_usual_gap_ends_and_is_never_certain() -> None:
    found = [last_asked(ago).probability(NOW, 60) for ago in (100, 530, 560, 599, 700)]

    assert found == pytest.approx([0, 2 / 7, 6 / 7, 4 / 5, 0])


def test_a_regular_model_is_loaded_before_its_next_request() -> None:
    """It takes 61.5 s, and the shortest gap was 580 s."""
    assert plan(fleet(last_asked(518)), [], NOW).actions == ()
    (start,) = starts(plan(fleet(last_asked(519)), [], NOW))
    assert start.purpose is Purpose.EXPECTED
    assert start.reason == (
        "it is requested about every 10 min, and was last 9 min ago: 13.04 GiB on g0, which is free"
    )
    assert plan(fleet(last_asked(900)), [], NOW).actions == (), "its use has changed"
    assert plan(fleet(last_asked(519)), [], NOW, PlacementPolicy(spread=0)).actions == ()


def test_an_expected_model_costs_others_no_more_than_it_gains() -> None:
    idle = pool("p", "old", {"g0": 14})
    rarely, often = ({"old": {Priority.STANDARD: rate}} for rate in (0.001, 5.0))
    assert starts(plan(fleet(last_asked(519), idle, rates=rarely), [], NOW))[0].after == {"p"}
    assert plan(fleet(last_asked(519), idle, rates=often), [], NOW).actions == ()

    works = replace(idle, busy=1, serving=Priority.BATCH)
    assert plan(fleet(last_asked(519), works, rates=rarely), [], NOW).actions == ()


def test_an_expected_model_waits_while_others_load_on_the_host() -> None:
    loads = pool("p", "old", {"g0": 2}, state=PoolState.STARTING, loaded=None)
    assert plan(fleet(last_asked(519), loads), [], NOW).actions == ()


def test_a_grant_for_an_expected_model_is_kept_until_it_is_not_expected_any_more() -> None:
    grant = pool("p", "rare", {"g0": 14}, state=PoolState.WAITING, loaded=None, last_used=None)
    assert plan(fleet(last_asked(560), grant), [], NOW).actions == ()
    (stop,) = plan(fleet(last_asked(900), grant), [], NOW).actions
    assert isinstance(stop, StopPool)


def test_a_model_that_is_expected_soon_is_not_the_victim() -> None:
    """Neither was requested in the last minutes."""
    pools = (pool("p", "rare", {"g0": 9}), pool("q", "old", {"g0": 9}, last_used=NOW - seconds(1)))
    models = (model("rare", 9, load=60), model("old", 9), model("new", 9))
    cluster = Cluster((gpu("g0"),), pools, models, arrivals={"rare": last_asked(570)})
    (start,) = starts(plan(cluster, [waits("new")], NOW))
    assert start.after == {"q"}


def test_the_explanation_of_a_regular_model_says_when_it_is_requested() -> None:
    cluster = fleet(last_asked(100))
    first = explain(cluster, [waits("rare")], plan(cluster, [waits("rare")], NOW), NOW, cluster.configurations[0])

    told = without_demand(first, cluster, NOW).reason
    assert told.endswith(
        "; it is requested about every 10 min, and was last 100 s ago, so that it is loaded before the next time"
    )
    assert (
        "requested" not in without_demand(first, fleet(last_asked(100, (60.0, 400.0, 3000.0, 9000.0) * 2)), NOW).reason
    )
