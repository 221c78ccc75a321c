"""The state of a plan: one value that all searches read, that one module changes, and that no explanation changes."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from app.kernel.priority import Priority
from app.scheduler.planner.cluster import Cluster
from app.scheduler.planner.demand import no_demand
from app.scheduler.planner.device_pools import DevicePools
from app.scheduler.planner.eviction import Eviction
from app.scheduler.planner.explanation import explain
from app.scheduler.planner.placement import Planner
from app.scheduler.planner.policy import PlacementPolicy
from app.scheduler.planner.search import Search
from app.scheduler.planner.state import PlanState
from tests.scheduler.clusters import GB, NOW, Case, cases, gpu, model, pool

POLICY = PlacementPolicy()


def values(state: PlanState) -> dict[str, Any]:
    return deepcopy(vars(state))


@settings(max_examples=60, deadline=None)
@given(cases())
def test_searching_and_explaining_change_nothing(case: Case) -> None:
    planner = Planner(case.cluster, case.waiting, NOW, POLICY)
    made = planner.plan()
    before, actions, refusals = values(planner.state), list(planner.actions), dict(planner.refusals)

    for demand in planner.demands.values():
        _, nearest = planner.choose(demand)
        planner.explain(demand, nearest, planner.search.soonest_vacancy(demand))
        planner.explain(demand, None, planner.search.soonest_vacancy(demand))
        planner.explain(demand, None, None)
        explain(case.cluster, case.waiting, made, NOW, demand.configuration)
    assert values(planner.state) == before
    assert (planner.actions, planner.refusals) == (actions, refusals)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_after_a_plan_no_search_remembers_the_state_before(case: Case) -> None:
    """A search that has followed the plan judges pools as one that is made for the state that the plan left."""
    planner = Planner(case.cluster, case.waiting, NOW, POLICY)
    planner.plan()
    fresh = Eviction(case.cluster, planner.demands, planner.state, NOW, POLICY)

    for one in case.cluster.pools:
        assert planner.eviction.regret(one) == fresh.regret(one)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_judgements_that_are_kept_are_those_of_the_state_that_the_plan_left(case: Case) -> None:
    planner = Planner(case.cluster, case.waiting, NOW, POLICY)
    pools = planner.search.pools
    demands = [*planner.demands.values(), *(replace(one, rank=0, overdue=True) for one in planner.demands.values())]

    def judged(by: DevicePools) -> list[object]:
        ids = planner.state.devices
        on_each = [by.evictable(one).on(id_) for id_ in ids for one in demands]
        return [by.leaving(id_) for id_ in ids] + [by.departures(ids)] + on_each

    judged(pools)
    planner.plan()
    assert judged(pools) == judged(DevicePools(planner.state, planner.eviction, POLICY))
    for one in case.cluster.configurations:
        fresh = Search(case.cluster, planner.demands, planner.state, NOW, POLICY)
        assert planner.search.free_places(one) == fresh.free_places(one)


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from([0.01, 0.25, 5.0]), st.sampled_from([2, 32]))
def test_a_selection_is_that_of_comparing_all_candidates(case: Case, threshold: float, max_sets: int) -> None:
    planner = Planner(case.cluster, case.waiting, NOW, PlacementPolicy(threshold=threshold, max_sets=max_sets))
    for _ in range(2):  # of the cluster as it is, and as the plan leaves it
        for demand in planner.demands.values():
            found = list(planner.search.candidates(demand, evict=True))
            worth = [one for one in found if planner.price.is_worth(demand, one)]
            best = min(worth, key=lambda one: one.order, default=None)
            nearest = min(found, key=lambda one: (one.regret, one.devices), default=None) if best is None else None
            is_worth = partial(planner.price.is_worth, demand)
            assert planner.selection.select(demand, is_worth, planner.price.most_regret(demand)) == (best, nearest)
        planner.plan()


def test_a_start_and_a_stop_are_seen_by_every_search() -> None:
    pools = (pool("p", "m", {"g0": 9}), pool("q", "m", {"g1": 9}))
    rates = {"m": {Priority.STANDARD: 0.1}}
    cluster = Cluster((gpu("g0"), gpu("g1")), pools, (model("m", 9), model("n", 11)), rates=rates)
    state = PlanState(cluster, POLICY)
    search = Search(cluster, {}, state, NOW, POLICY)
    n = cluster.configurations[1]
    sibling = search.eviction.regret(pools[1])
    assert [one.devices for one in search.candidates(no_demand(n), evict=False)] == [("g0",), ("g1",)]

    state.start(n, {"g0": 11 * GB}, (), NOW)
    assert [one.devices for one in search.candidates(no_demand(n), evict=False)] == [("g1",)]
    assert [one.configuration for one in state.coming("n")] == ["n"]
    state.stop(pools[0])
    assert list(state.coming("m")) == [pools[1]]
    assert search.eviction.regret(pools[0]) == 0
    assert search.eviction.regret(pools[1]) == sibling / POLICY.sibling, "it is the only one now"
    assert state.free["g0"] == 0, "its process still has its bytes"
