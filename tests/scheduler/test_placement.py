"""Placement: what no plan may do in any cluster, and what plans do in small clusters."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from app.fleet.backoff import Backoff
from app.fleet.host import HostState
from app.fleet.ledger.reservation import ReservedCapacity
from app.fleet.pool import COMING, PoolState
from app.footprint.layout import KnownLayout
from app.kernel.priority import Priority
from app.scheduler.planner.cluster import (
    Account,
    Cluster,
    Configuration,
    Device,
    Packing,
    Pool,
    Reserve,
    charges,
)
from app.scheduler.planner.demand import WaitingSteps, model_demand
from app.scheduler.planner.eviction import Eviction
from app.scheduler.planner.placement import plan
from app.scheduler.planner.plan import (
    DropReserve,
    GrantReserve,
    MovePool,
    Plan,
    Purpose,
    Refusal,
    StartPool,
    StopMode,
    StopPool,
)
from app.scheduler.planner.policy import PlacementPolicy
from app.scheduler.planner.state import PlanState
from tests.scheduler.clusters import GB, NOW, Case, applied, cases, gpu, model, pool, ram, seconds, waits

POLICY = PlacementPolicy()
ONE, TWO = (gpu("g0"),), (gpu("g0"), gpu("g1"))


def starts(made: Plan) -> list[StartPool]:
    return [action for action in made.actions if isinstance(action, StartPool)]


def stops(made: Plan) -> dict[str, StopMode]:
    return {action.pool: action.mode for action in made.actions if isinstance(action, StopPool)}


def reasons(made: Plan) -> list[str]:
    return [one.reason for one in (*made.actions, *made.refusals)]


# ---- in any cluster ----


@settings(max_examples=150, deadline=None)
@given(cases())
def test_no_plan_charges_a_device_above_its_capacity(case: Case) -> None:
    cluster = case.cluster
    made = plan(cluster, case.waiting, NOW)
    after = applied(cluster, made)

    charged = charges(after)
    assert [d.id for d in cluster.devices if charged[d.id] > d.capacity_bytes] == []
    before = charges(cluster)
    for device in cluster.devices:  # unmanaged memory is left alone
        if charged[device.id] > before[device.id]:
            assert charged[device.id] <= device.capacity_bytes - device.unmanaged_bytes
    for action in starts(made):
        there = {d.id: d for d in cluster.devices}
        assert all(there[device].state is HostState.SCHEDULABLE for device in action.bytes)
        assert len({there[device].host for device in action.bytes}) == 1


@settings(max_examples=100, deadline=None)
@given(cases())
def test_steps_are_preempted_for_higher_classes_only(case: Case) -> None:
    """No pool drains for a lower class. Reserved bytes and drained devices are exceptions."""
    cluster, demand = case.cluster, case.waiting
    made = plan(cluster, demand, NOW)
    owners = {
        one.configuration
        for one in (*cluster.reserves, *made.actions)
        if isinstance(one, ReservedCapacity | GrantReserve)
    }
    going = {d.id for d in cluster.devices if d.state is HostState.DRAINING}
    of = {one.id: one for one in cluster.pools}
    for action in made.actions:
        if not isinstance(action, StopPool) or action.room_for in owners:
            continue
        victim, asking = of[action.pool], [one for one in demand if one.model == action.room_for]
        if not victim.busy or victim.bytes.keys() & going:
            continue
        assert victim.serving is not None
        urgent = min(one.priority.rank for one in asking if one.ready is None)
        late = any((NOW - one.oldest).total_seconds() >= POLICY.bound[one.priority] for one in asking)
        if action.mode is StopMode.PREEMPT:
            assert urgent < victim.serving.rank
            assert victim.preemptions < POLICY.max_preemptions
        else:
            assert urgent <= victim.serving.rank or late


@settings(max_examples=100, deadline=None)
@given(cases())
def test_pinned_and_targeted_pools_are_not_evicted(case: Case) -> None:
    cluster = case.cluster
    made = plan(cluster, case.waiting, NOW)
    going = {d.id for d in cluster.devices if d.state is HostState.DRAINING}
    of = {one.id: one for one in cluster.pools}
    configurations = {one.id: one for one in cluster.configurations}
    for id_ in stops(made):
        if of[id_].state is not PoolState.DRAINING and not of[id_].bytes.keys() & going:
            configuration = configurations[of[id_].configuration]
            others = [p for p in cluster.pools if p.configuration == configuration.id and p.state in COMING]
            kept = max(configuration.min_pools, int(configuration.pinned))
            assert len(others) - len([p for p in others if p.id in stops(made)]) >= min(kept, len(others))


@settings(max_examples=100, deadline=None)
@given(cases())
def test_waiting_steps_have_a_pool_coming_or_a_reason_with_figures(case: Case) -> None:
    cluster, demand = case.cluster, case.waiting
    made = plan(cluster, demand, NOW)
    stopped, moved = stops(made), {a.pool for a in made.actions if isinstance(a, MovePool)}
    served = {p.configuration for p in cluster.pools if p.state in COMING and p.id not in stopped}
    served |= {action.configuration for action in starts(made)}
    served |= {p.configuration for p in cluster.pools if p.id in moved}
    refused = {one.configuration: one for one in made.refusals}
    for one in demand:
        if one.ready is None and one.model not in served:
            assert one.model in refused
    assert all(len(text) > 10 and re.search(r"\d|`|no step|no host|no device", text) for text in reasons(made))
    assert len(refused) == len(made.refusals)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_the_same_arguments_give_the_same_plan(case: Case) -> None:
    cluster, demand = case.cluster, case.waiting
    other = replace(
        cluster,
        devices=tuple(reversed(cluster.devices)),
        pools=tuple(reversed(cluster.pools)),
        accounts=dict(reversed(cluster.accounts.items())),
    )

    assert plan(cluster, demand, NOW) == plan(cluster, list(demand), NOW)
    assert set(map(repr, plan(cluster, demand, NOW).actions)) == set(map(repr, plan(other, demand, NOW).actions))


@settings(max_examples=60, deadline=None)
@given(cases())
def test_bytes_are_promised_once(case: Case) -> None:
    """A pool that waits gets bytes that no other pool was promised, so that all can start when the victim is gone."""
    cluster = case.cluster
    after = applied(cluster, plan(cluster, case.waiting, NOW))
    named = {id_ for one in after.pools for id_ in one.backing}
    gone = replace(after, pools=tuple(p for p in after.pools if not (p.id in named and p.state is PoolState.DRAINING)))

    charged = charges(gone)
    assert [d.id for d in cluster.devices if charged[d.id] > d.capacity_bytes] == []


@settings(max_examples=60, deadline=None)
@given(cases())
def test_a_second_plan_does_nothing_when_nothing_has_changed(case: Case) -> None:
    """No oscillation at rest."""
    cluster, demand = case.cluster, case.waiting
    for _ in range(30):
        made = plan(cluster, demand, NOW)
        if not made.actions:
            return
        cluster = applied(cluster, made)
    raise AssertionError(f"it does not settle: {made.actions}")


# ---- in small clusters ----


def test_a_model_goes_where_the_least_is_left() -> None:
    cluster = Cluster(TWO, (pool("p", "old", {"g1": 6}),), (model("old", 6), model("new", 5)))

    (start,) = starts(plan(cluster, [waits("new")], NOW))
    assert start.bytes == {"g1": 5 * GB}
    assert start.after == frozenset()
    assert start.estimate == seconds(5)


def test_a_model_that_is_spread_goes_where_the_most_is_left() -> None:
    spread = model("new", 5, packing=Packing.SPREAD)
    cluster = Cluster(TWO, (pool("p", "old", {"g1": 6}),), (model("old", 6), spread))

    assert starts(plan(cluster, [waits("new")], NOW))[0].bytes == {"g0": 5 * GB}


def test_an_idle_device_is_better_than_one_that_works() -> None:
    """Pools that share a device slow each other down."""
    works = pool("p", "old", {"g1": 6}, busy=1, serving=Priority.BATCH)
    cluster = Cluster(TWO, (works,), (model("old", 6), model("new", 5)))

    assert starts(plan(cluster, [waits("new")], NOW))[0].bytes == {"g0": 5 * GB}


def full(**more: object) -> Cluster:
    """One device, almost filled by `old`, which is idle and requested every ten seconds."""
    cluster = Cluster(ONE, (pool("p", "old", {"g0": 14}, **more),), (model("old", 14), model("new", 14)))
    return replace(cluster, rates={"old": {Priority.STANDARD: 0.1}})


def loading(cluster: Cluster, count: int) -> Cluster:
    """The cluster, with so many pools that load on another device of its host."""
    pools = tuple(pool(f"l{n}", f"x{n}", {"g9": 1}, state=PoolState.STARTING, loaded=None) for n in range(count))
    models = tuple(model(f"x{n}", 1) for n in range(count))
    return replace(
        cluster,
        devices=(*cluster.devices, gpu("g9", count)),
        pools=(*cluster.pools, *pools),
        configurations=(*cluster.configurations, *models),
    )


def test_an_idle_pool_is_evicted_at_once_while_nothing_loads_on_its_host() -> None:
    assert stops(plan(full(), [waits("new", priority=Priority.BATCH)], NOW)) == {"p": StopMode.DRAIN}

    other = replace(gpu("g9", 1, "other"))
    away = pool("l", "x", {"g9": 1}, state=PoolState.STARTING, loaded=None)
    cluster = full()
    elsewhere = replace(cluster, devices=(*ONE, other), pools=(*cluster.pools, away))
    assert stops(plan(elsewhere, [waits("new", priority=Priority.BATCH)], NOW)) == {"p": StopMode.DRAIN}


def test_the_price_of_an_idle_pool_rises_with_the_loads_on_its_host() -> None:
    """Two loads and more: all of it, 6.5 s of the class standard. One: half of it."""
    for loads, age in ((1, 3), (2, 6), (5, 6)):
        assert plan(loading(full(), loads), [waits("new", age=age)], NOW).actions == (), loads
        assert stops(plan(loading(full(), loads), [waits("new", age=age + 1)], NOW)) == {"p": StopMode.DRAIN}, loads


def test_one_plan_counts_the_loads_that_it_starts() -> None:
    """Three idle pools that are worth keeping, and three models that wait: the host loads one at a time at no price."""
    names = ("a", "b", "c")
    cluster = Cluster(
        tuple(gpu(f"g{name}") for name in names),
        tuple(pool(name, name, {f"g{name}": 14}) for name in names),
        tuple(model(name, 14) for name in (*names, "x", "y", "z")),
        rates={name: {Priority.STANDARD: 0.5} for name in names},
    )
    made = plan(cluster, [waits(name, age=0.1) for name in ("x", "y", "z")], NOW)
    assert (len(starts(made)), len(made.refusals)) == (1, 2)


def test_a_pool_for_which_steps_wait_keeps_its_price_while_nothing_loads() -> None:
    demand = [waits("old", age=1), waits("new", age=8)]
    assert plan(full(), demand, NOW).actions == ()


def test_an_idle_pool_is_evicted_once_the_pressure_reaches_the_price() -> None:
    early = plan(loading(full(), 2), [waits("new", age=1)], NOW)
    assert early.actions == ()
    (refusal,) = early.refusals
    assert re.fullmatch(
        r"needs 13\.04 GiB, g0 has 5\.59 GiB free; evicting `old` would cost 26 s, weighted, and is done after 7 s of "
        r"waiting: 1 s so far, about 6 s to go",
        refusal.reason,
    )
    assert refusal.estimate is not None
    assert seconds(11) < refusal.estimate < seconds(13)

    late = plan(loading(full(), 2), [waits("new", age=7)], NOW)
    assert stops(late) == {"p": StopMode.DRAIN}
    assert starts(late)[0].after == {"p"}
    assert late.refusals == ()


def test_the_pool_with_the_least_regret_is_evicted() -> None:
    pools = (pool("a", "rare", {"g0": 9}), pool("b", "hot", {"g0": 9}))
    cluster = Cluster(ONE, pools, (model("rare", 9), model("hot", 9), model("new", 9)))
    rates = {"rare": {Priority.STANDARD: 0.001}, "hot": {Priority.STANDARD: 0.5}}

    assert stops(plan(replace(cluster, rates=rates), [waits("new", age=30)], NOW)) == {"a": StopMode.DRAIN}


def test_the_regret_counts_the_queue_and_the_work_of_a_pool_for_the_time_that_it_is_gone() -> None:
    """A load of 5 s and 10 s until there is room again, by weights: batch 0.3, standard 1."""

    def regret(demand: Sequence[WaitingSteps] = (), **more: Any) -> float:
        cluster = Cluster(ONE, (pool("p", "old", {"g0": 14}, **more),), (model("old", 14),))
        demands = model_demand(cluster.configurations, {}, demand, NOW, POLICY)
        return Eviction(cluster, demands, PlanState(cluster, POLICY), NOW, POLICY).regret(cluster.pools[0])

    assert regret() == 0
    assert regret([waits("old", steps=3, age=4)]) == pytest.approx(3 * (4 + 15))
    assert regret(busy=2, serving=Priority.BATCH, work_left=seconds(7)) == pytest.approx(0.3 * 2 * (15 + 7))
    assert regret(busy=2, serving=Priority.BATCH, state=PoolState.DRAINING) == 0


def test_a_long_queue_of_batch_steps_is_worth_more_than_one_interactive_step_until_that_is_late() -> None:
    """Else a trickle of a higher class stops a pool with much work again and again."""
    queue = waits("old", steps=200, age=30, priority=Priority.BATCH)
    busy = working(Priority.BATCH)
    person = [waits("new", age=age, priority=Priority.INTERACTIVE) for age in (8, 61)]

    assert plan(busy, [queue, person[0]], NOW).actions == ()
    assert stops(plan(busy, [person[0]], NOW)) == {"p": StopMode.PREEMPT}
    assert stops(plan(busy, [queue, person[1]], NOW)) == {"p": StopMode.PREEMPT}


def working(serving: Priority, **more: object) -> Cluster:
    return full(busy=1, serving=serving, work_left=seconds(30), **more)


def test_a_higher_class_evicts_a_pool_that_works_for_a_lower_one() -> None:
    urgent = [waits("new", age=20, priority=Priority.INTERACTIVE)]

    assert stops(plan(working(Priority.BATCH), urgent, NOW)) == {"p": StopMode.PREEMPT}
    assert "it waits for `old`" in refused(plan(working(Priority.BATCH, preemptions=3), urgent, NOW)).reason
    short = replace(working(Priority.BATCH).pools[0], work_left=seconds(2))
    assert stops(plan(replace(full(), pools=(short,)), urgent, NOW)) == {"p": StopMode.DRAIN}


def test_a_pool_with_short_steps_is_drained_only_for_steps_that_waited_for_much_longer() -> None:
    """It may be idle for a moment before; one whose steps would be preempted yields at once."""

    def made(age: float, left: float, serving: Priority, urgent: Priority = Priority.INTERACTIVE) -> Plan:
        works = full(busy=1, serving=serving, work_left=seconds(left))
        return plan(works, [waits("new", age=age, priority=urgent, steps=50)], NOW)

    assert stops(made(8.9, 3, Priority.BATCH)) == {}
    assert (
        "after a step has waited for 9 s, as a drain would take long: 8 s so far, about 1 s to go"
        in reasons(made(8, 3, Priority.BATCH))[0]
    )
    assert stops(made(9, 3, Priority.BATCH)) == {"p": StopMode.DRAIN}
    assert stops(made(8.9, 30, Priority.BATCH)) == {"p": StopMode.PREEMPT}
    assert stops(made(29, 60, Priority.STANDARD, Priority.STANDARD)) == {}
    assert stops(made(30, 60, Priority.STANDARD, Priority.STANDARD)) == {"p": StopMode.DRAIN}, "no lull is expected"


def test_a_drain_begins_in_time_for_a_deadline() -> None:
    """The load takes 10 s, unloading 1.5 s, the drain 9 s: of 30 s, 9.5 s are left."""
    works = full(busy=1, serving=Priority.BATCH, work_left=seconds(9))
    cluster = replace(works, configurations=(model("old", 14), model("new", 14, load=10)))

    def made(age: float, **more: Any) -> Plan:
        return plan(cluster, [waits("new", age=age, priority=Priority.INTERACTIVE, steps=20, **more)], NOW)

    assert stops(made(9.4, deadline=NOW + seconds(20.6))) == {}
    assert stops(made(9.6, deadline=NOW + seconds(20.4))) == {"p": StopMode.DRAIN}
    assert stops(made(9.6)) == {}


def test_the_estimate_of_a_refusal_counts_the_price_and_not_the_wait_before_a_drain() -> None:
    """Else a call would be refused for a wait that is most often shorter. The text names the longer one."""

    def refusal(age: float) -> Refusal:
        works = full(busy=1, serving=Priority.BATCH, work_left=seconds(9.9))
        return refused(plan(works, [waits("new", age=age, priority=Priority.INTERACTIVE)], NOW))

    early, late = refusal(0), refusal(3)
    assert "after a step has waited for 30 s, as a drain would take long: 0.0 s so far, about 30 s to go" in (
        early.reason
    )
    assert "about 27 s to go" in late.reason
    assert late.estimate == seconds(9.9 + 1.5 + 5), "the price is reached"
    assert early.estimate is not None
    assert late.estimate < early.estimate < late.estimate + seconds(3)


def test_an_idle_pool_of_a_target_moves_while_a_drain_is_put_off() -> None:
    works = pool("p", "old", {"g0": 14}, busy=1, serving=Priority.BATCH, work_left=seconds(9))
    kept = pool("q", "kept", {"g1": 14})
    models = (model("old", 14), model("kept", 14, min_pools=1), model("new", 18))
    cluster = Cluster((*TWO, gpu("g2", 15)), (works, kept), models)
    urgent = [waits("new", age=5, priority=Priority.INTERACTIVE, steps=20)]

    moves = [one for one in plan(cluster, urgent, NOW).actions if isinstance(one, MovePool)]
    assert [(one.pool, one.bytes) for one in moves] == [("q", {"g2": 14 * GB})]
    put_off = refused(plan(replace(cluster, devices=TWO), urgent, NOW))
    assert "evicting `old`" in put_off.reason
    assert "as a drain would take long" in put_off.reason

    beside = pool("r", "beside", {"g1": 5}, busy=1, serving=Priority.BATCH, work_left=seconds(9))
    both = replace(cluster, pools=(replace(works, busy=2), kept, beside), configurations=(*models, model("beside", 5)))
    assert "evicting `old`" in refused(plan(both, urgent, NOW)).reason, "to move a pool is put off there too"


def test_a_drain_beyond_the_limit_is_preempted_for_a_higher_class_only() -> None:
    """The expected time of steps in flight may be wrong."""

    def drained(for_: float, urgent: Priority, **more: Any) -> dict[str, StopMode]:
        values = {"busy": 1, "serving": Priority.STANDARD, "state": PoolState.DRAINING}
        leaves = pool("p", "old", {"g0": 14}, **values, stopping=NOW - seconds(for_), **more)
        coming = pool("q", "new", {"g0": 14}, state=PoolState.WAITING, loaded=None, backing={"p": {"g0": 14 * GB}})
        cluster = Cluster(ONE, (leaves, coming), (model("old", 14), model("new", 14)))
        return stops(plan(cluster, [waits("new", priority=urgent, age=20)], NOW))

    assert drained(9.9, Priority.INTERACTIVE) == {}
    assert drained(10, Priority.INTERACTIVE) == {"p": StopMode.PREEMPT}
    assert drained(10, Priority.INTERACTIVE, preemptions=3) == {}
    assert drained(1000, Priority.STANDARD) == {}


def test_a_pool_that_works_for_an_equal_class_finishes_first() -> None:
    made = plan(working(Priority.INTERACTIVE), [waits("new", age=5, priority=Priority.INTERACTIVE)], NOW)

    assert made.actions == ()
    assert "it waits for `old` with 1 step in flight: about 32 s" in made.refusals[0].reason


def test_a_pool_that_has_just_begun_to_serve_keeps_its_work() -> None:
    fresh = working(Priority.BATCH, loaded=NOW - seconds(10))

    assert plan(fresh, [waits("new", age=20, priority=Priority.INTERACTIVE)], NOW).actions == ()


def test_a_device_set_is_kept_for_overdue_demand() -> None:
    """Only pools that end before the set is free are started there."""
    fresh = pool(
        "p", "old", {"g0": 14}, busy=1, serving=Priority.STANDARD, loaded=NOW - seconds(1), work_left=seconds(9)
    )
    configurations = (model("old", 14), model("large", 18), model("small", 4, load=1), model("slow", 4, load=60))
    cluster = Cluster(ONE, (fresh,), configurations)
    demand = [waits("large", age=1000), waits("small", work=seconds(2)), waits("slow", work=seconds(2))]

    made = plan(cluster, demand, NOW)
    assert [start.configuration for start in starts(made)] == ["small"]
    assert {one.configuration for one in made.refusals} == {"large", "slow"}
    assert "only pools that end earlier are started there" in made.refusals[0].reason


def test_a_step_with_a_deadline_is_served_in_time() -> None:
    soon, later = waits("new", deadline=NOW + seconds(5)), waits("new", deadline=NOW + seconds(60))

    assert stops(plan(loading(full(), 2), [soon], NOW)) == {"p": StopMode.DRAIN}
    assert plan(loading(full(), 2), [later], NOW).actions == ()


def test_a_pool_is_started_ahead_of_steps_that_will_be_ready() -> None:
    cluster = Cluster(ONE, (), (model("next", 9),))
    ahead = [waits("next", steps=8, ready=NOW + seconds(3))]

    assert starts(plan(cluster, ahead, NOW))[0].purpose is Purpose.LOOK_AHEAD
    assert plan(cluster, ahead, NOW, PlacementPolicy(look_ahead=0)).actions == ()
    assert plan(cluster, [waits("next", ready=NOW + seconds(300))], NOW).actions == ()

    # Discounted: eight upcoming steps count less than eight that wait.
    missed = replace(full(), configurations=(model("old", 14), model("next", 14)))
    assert stops(plan(missed, [waits("next", steps=40, ready=NOW + seconds(3))], NOW)) == {"p": StopMode.DRAIN}
    assert plan(missed, ahead, NOW).actions == ()


def test_a_queue_without_end_gets_no_replica_at_any_cost() -> None:
    """Its steps are served, though late. A model without a pool is served next, whatever that costs."""
    hot, used = model("hot", 14, slots=1), model("used", 14)
    serves = pool("p", "hot", {"g0": 14}, slots=1, busy=1, serving=Priority.STANDARD, work_left=seconds(9))
    works = pool("q", "used", {"g1": 14}, busy=2, serving=Priority.STANDARD, work_left=seconds(60))
    cluster = Cluster(TWO, (serves, works), (hot, used), rates={"used": {Priority.INTERACTIVE: 0.5}})
    queue = [waits("hot", age=3000, steps=500, work=seconds(10))]

    assert plan(cluster, queue, NOW).actions == ()
    assert starts(plan(replace(cluster, pools=(works,), devices=TWO[1:]), queue, NOW))[0].after == {"q"}
    idle = replace(works, busy=0, serving=None)
    (replica,) = starts(plan(replace(cluster, pools=(serves, idle)), queue, NOW))
    assert (replica.purpose, replica.after) == (Purpose.REPLICA, {"q"})


def test_a_replica_relieves_the_steps_that_it_serves_while_it_is_fresh() -> None:
    """Four loads of 5 s: two slots serve four steps of 10 s, which would wait for 10 s on average."""
    (demand,) = model_demand(
        (model("m", 9),), {}, [waits("m", age=3000, steps=50, work=seconds(10))], NOW, POLICY
    ).values()
    assert demand.overdue

    limited = demand.for_replica(POLICY)
    assert (limited.overdue, limited.due, limited.steps) == (False, False, 50)
    late = replace(demand, until_deadline=-1.0)
    assert late.for_replica(POLICY).until_deadline == math.inf
    assert limited.pressure == pytest.approx(4 * 10)
    young = replace(demand, pressure=7.0)
    assert young.for_replica(POLICY).pressure == 7


def test_a_long_queue_gets_a_replica_and_an_idle_replica_is_stopped() -> None:
    serving = pool("p", "hot", {"g0": 9}, busy=2, serving=Priority.STANDARD)
    cluster = Cluster(TWO, (serving,), (model("hot", 9),))

    (start,) = starts(plan(cluster, [waits("hot", steps=40, work=seconds(10))], NOW))
    assert (start.purpose, start.bytes) == (Purpose.REPLICA, {"g1": 9 * GB})
    assert starts(plan(cluster, [waits("hot", steps=3, work=seconds(10))], NOW)) == []

    idle = pool("q", "hot", {"g1": 9}, last_used=NOW - seconds(61))
    assert stops(plan(replace(cluster, pools=(serving, idle)), [], NOW)) == {"q": StopMode.DRAIN}


def test_a_long_queue_of_the_class_batch_gets_replicas_on_idle_devices_only() -> None:
    """A second pool on a device would slow what others do there; the first one of a model goes anywhere."""
    serving = pool("p", "hot", {"g0": 3}, busy=2, serving=Priority.BATCH)
    one, two = (Cluster(devices, (serving,), (model("hot", 3),)) for devices in ((gpu("g0"),), TWO))
    queue = {priority: [waits("hot", steps=60, age=1000, work=seconds(10), priority=priority)] for priority in Priority}
    for priority in (Priority.INTERACTIVE, Priority.STANDARD):
        (start,) = starts(plan(one, queue[priority], NOW))
        assert start.bytes == {"g0": 3 * GB}
    assert plan(one, queue[Priority.BATCH], NOW).actions == ()
    assert starts(plan(one, [*queue[Priority.BATCH], waits("hot")], NOW)), "somebody else waits, too"

    (start,) = starts(plan(two, queue[Priority.BATCH], NOW))
    assert start.bytes == {"g1": 3 * GB}
    other = pool("q", "other", {"g1": 3}, last_used=NOW - seconds(5))
    both = replace(two, pools=(serving, other), configurations=(model("hot", 3), model("other", 3)))
    assert starts(plan(both, queue[Priority.BATCH], NOW)) == []

    (start,) = starts(plan(replace(both, pools=(other,), devices=(gpu("g1"),)), queue[Priority.BATCH], NOW))
    assert start.bytes == {"g1": 3 * GB}, "it has no pool yet"


@pytest.mark.parametrize("more", [{"pinned": True}, {"min_pools": 1}, {"pinned": True, "min_pools": 1}])
def test_idle_replicas_of_a_pinned_model_are_stopped(more: dict[str, Any]) -> None:
    """Only as many pools are kept as the model's target says, the oldest ones; all others may leave."""
    granted = {f"p{n}": NOW - seconds(600 - n) for n in range(4)}
    pools = [pool(id_, "hot", {"g0": 3}, started=at, last_used=NOW - seconds(61)) for id_, at in granted.items()]
    cluster = Cluster((gpu("g0"),), tuple(pools), (model("hot", 3, **more),))

    assert stops(plan(cluster, [], NOW)) == dict.fromkeys(("p1", "p2", "p3"), StopMode.DRAIN)

    pinned = replace(cluster, pools=(*pools[:2], replace(pools[2], pinned=True), pools[3]))
    assert stops(plan(pinned, [], NOW)) == dict.fromkeys(("p0", "p1", "p3"), StopMode.DRAIN), "the ledger keeps p2"

    remains = replace(cluster, pools=(replace(pools[0], state=PoolState.DRAINING), *pools[1:]))
    assert stops(plan(remains, [], NOW)) == dict.fromkeys(("p2", "p3"), StopMode.DRAIN)


def test_replicas_of_a_pinned_model_make_room_for_others() -> None:
    kept, replica = pool("p", "hot", {"g0": 9}), pool("q", "hot", {"g0": 9}, started=NOW - seconds(90))
    models = (model("hot", 9, pinned=True), model("other", 9))
    cluster = Cluster(ONE, (kept, replica), models)

    (start,) = starts(plan(cluster, [waits("other", age=1000)], NOW))
    assert (start.after, start.pinned) == ({"q"}, False)
    assert starts(plan(replace(cluster, pools=(kept,)), [waits("other", age=1000)], NOW))[0].after == frozenset()


def test_only_the_pools_of_the_target_are_pinned() -> None:
    hot = model("hot", 4, pinned=True, min_pools=2)
    queue = [waits("hot", steps=400, work=seconds(10))]

    assert [one.pinned for one in starts(plan(Cluster(ONE, (), (hot,)), queue, NOW))] == [True, True, False]
    serving = tuple(pool(f"p{n}", "hot", {"g0": 4}, pinned=True, busy=2) for n in range(2))
    (replica,) = starts(plan(Cluster(ONE, serving, (hot,)), queue, NOW))
    assert (replica.purpose, replica.pinned) == (Purpose.REPLICA, False)


def test_a_pool_without_work_is_stopped_after_its_keep_alive() -> None:
    def idle_for(keep_alive: timedelta | None, demand: Sequence[WaitingSteps] = (), **more: object) -> Plan:
        cluster = Cluster(ONE, (pool("p", "m", {"g0": 9}),), (model("m", 9, keep_alive=keep_alive, **more),))
        used_up = {"x": Account(exhausted_until=NOW + seconds(90))}
        return plan(replace(cluster, accounts=used_up), demand, NOW)

    assert idle_for(seconds(59)).actions == (StopPool("p", StopMode.DRAIN, "no work for 60 s, it is kept for 59 s"),)
    assert idle_for(seconds(61)).actions == ()
    assert idle_for(None).actions == ()
    assert idle_for(seconds(59), min_pools=1).actions == ()
    assert idle_for(seconds(59), pinned=True).actions == ()
    assert idle_for(seconds(59), [waits("m")]).actions == ()
    assert idle_for(seconds(59), [waits("m", ready=NOW + seconds(9))]).actions == ()
    assert stops(idle_for(seconds(59), [waits("m", namespace="x")])) == {"p": StopMode.DRAIN}, (
        "its allowance is used up"
    )


def test_the_target_of_an_entry_is_met() -> None:
    made = plan(Cluster(TWO, (), (model("m", 14, min_pools=2),)), [], NOW)

    assert [start.purpose for start in starts(made)] == [Purpose.TARGET] * 2
    assert {device for start in starts(made) for device in start.bytes} == {"g0", "g1"}


OWNER = model("owner", 14, reserve=Reserve(1, within=seconds(10)))


def reserve() -> ReservedCapacity:
    return ReservedCapacity("r", "owner", {"g0": 14 * GB})


def test_a_reserve_is_granted_before_there_is_demand() -> None:
    made = plan(Cluster(TWO, (pool("p", "old", {"g0": 9}),), (model("old", 9), OWNER)), [], NOW)

    (grant,) = [action for action in made.actions if isinstance(action, GrantReserve)]
    assert grant.bytes == {"g1": 14 * GB}


def test_a_reserve_leaves_a_device_that_is_drained() -> None:
    devices = (gpu("g0", state=HostState.DRAINING), gpu("g1"))
    made = plan(Cluster(devices, (), (OWNER,), (reserve(),)), [], NOW)

    assert made.actions[0] == DropReserve("r", "g0 is drained")
    assert [one.bytes for one in made.actions if isinstance(one, GrantReserve)] == [{"g1": 14 * GB}]
    away = replace(devices[0], state=HostState.CORDONED)
    assert plan(Cluster((away, devices[1]), (), (OWNER,), (reserve(),)), [], NOW).actions == (), "it may be back soon"


def test_a_reserve_that_its_model_has_outgrown_is_replaced() -> None:
    """The footprint is more exact once the model was loaded."""
    grown = model("owner", 15, reserve=Reserve(1))
    made = plan(Cluster(ONE, (), (grown,), (reserve(),)), [], NOW)

    drop, grant = made.actions
    assert drop == DropReserve("r", "`owner` needs 13.97 GiB, and 13.04 GiB are reserved")
    assert isinstance(grant, GrantReserve)
    assert grant.bytes == {"g0": 15 * GB}
    smaller = (model("owner", 13, reserve=Reserve(1)),)
    assert plan(Cluster(ONE, (), smaller, (reserve(),)), [], NOW).actions == ()

    with_ram = Cluster((*ONE, ram(8)), (), (model("owner", 14, ram=2, reserve=Reserve(1)),))
    (granted,) = plan(with_ram, [], NOW).actions
    assert isinstance(granted, GrantReserve)
    settled = replace(with_ram, reserves=(ReservedCapacity("r", "owner", granted.bytes),))
    assert plan(settled, [], NOW).actions == ()
    assert len(plan(replace(with_ram, reserves=(reserve(),)), [], NOW).actions) == 2, "the RAM is missing"


def test_an_idle_reserve_is_lent_and_returned_by_preemption() -> None:
    cluster = Cluster(ONE, (), (model("other", 14), OWNER), (reserve(),))
    (lent,) = starts(plan(cluster, [waits("other")], NOW))
    assert lent.bytes == {"g0": 14 * GB}

    borrower = pool("p", "other", {"g0": 14}, busy=2, serving=Priority.INTERACTIVE, work_left=seconds(30))
    made = plan(replace(cluster, pools=(borrower,)), [waits("owner", priority=Priority.BATCH)], NOW)
    assert stops(made) == {"p": StopMode.PREEMPT}
    assert starts(made)[0].after == {"p"}

    kept = plan(cluster, [waits("other")], NOW, PlacementPolicy(lend=False))
    assert kept.actions == ()


def test_the_owner_of_a_reserve_takes_idle_pools_elsewhere_when_they_cost_less_than_what_it_lent() -> None:
    """Another pool loads on the host, so that the pressure is below their price."""
    borrower = pool("p", "other", {"g0": 14}, busy=2, serving=Priority.INTERACTIVE, work_left=seconds(30))
    loads = pool("w", "third", {"g2": 14}, state=PoolState.STARTING, loaded=None, expected=NOW + seconds(5))
    rates = {"idle": {Priority.INTERACTIVE: 0.01}}

    def stopped(**more: Any) -> dict[str, StopMode]:
        elsewhere = pool("q", "idle", {"g1": 14}, **more)
        models = (model("other", 14), model("idle", 14), model("third", 14), OWNER)
        cluster = Cluster((*TWO, gpu("g2")), (borrower, elsewhere, loads), models, (reserve(),), rates)
        return stops(plan(cluster, [waits("owner")], NOW))

    assert stopped() == {"q": StopMode.DRAIN}
    assert stopped(busy=1, serving=Priority.BATCH) == {"p": StopMode.PREEMPT}, "only idle pools"


def test_the_owner_of_a_reserve_takes_its_bytes_back_where_others_would_serve_it_later_or_are_reserved() -> None:
    """The borrower is idle, so that its bytes are free in seconds; others cost less regret."""
    borrower, idle = pool("p", "other", {"g0": 14}), pool("q", "idle", {"g1": 14})
    rates = {"other": {Priority.STANDARD: 0.5}, "idle": {Priority.STANDARD: 0.001}}
    models = (model("other", 14), model("idle", 14))
    third = ReservedCapacity("s", "third", {"g1": 14 * GB})

    def stopped(owner: Configuration, *more: Device, reserves: Sequence[ReservedCapacity] = ()) -> Sequence[str]:
        pools = (borrower, idle) if more else (borrower,)
        owns = model("third", 14, reserve=Reserve(1) if reserves else None)
        cluster = Cluster((*ONE, *more, ram(20)), pools, (*models, owns, owner), (reserve(), *reserves), rates)
        made = plan(cluster, [waits("owner")], NOW)
        return [action.pool for action in made.actions if isinstance(action, StopPool)]

    slow = KnownLayout("slow", "cpu", (14 * GB,), "measured", seconds(5), 0.02)
    assert stopped(OWNER, gpu("g1")) == ["q"]
    assert stopped(replace(OWNER, layouts=(*OWNER.layouts, slow))) == ["p"], "the processor is free"
    here = replace(OWNER, files={"box": seconds(0)}, fetch=seconds(600))
    assert stopped(here, gpu("g1", host="far")) == ["p"], "the file is not there"
    assert stopped(OWNER, gpu("g1"), reserves=[third]) == ["p"], "its bytes are reserved for another model"


def reclaimed(*, drained: float = 0, within: float = 10, **more: Any) -> Plan:
    """A plan for a borrower that has drained for so many seconds, and the owner's pool that waits for it."""
    owner = replace(OWNER, reserve=Reserve(1, within=seconds(within)))
    values = {"busy": 1, "serving": Priority.INTERACTIVE, "state": PoolState.DRAINING}
    borrower = pool("p", "other", {"g0": 14}, **values, stopping=NOW - seconds(drained), **more)
    coming = pool("q", "owner", {"g0": 14}, state=PoolState.WAITING, loaded=None, backing={"p": {"g0": 14 * GB}})
    cluster = Cluster(ONE, (borrower, coming), (model("other", 14), owner), (reserve(),))
    return plan(cluster, [waits("owner", priority=Priority.BATCH)], NOW)


def test_a_reserve_is_returned_within_its_time() -> None:
    """Steps that end in time finish; others are preempted, however often they were before."""
    short = pool("p", "other", {"g0": 14}, busy=1, serving=Priority.INTERACTIVE, work_left=seconds(3))
    cluster = Cluster(ONE, (short,), (model("other", 14), OWNER), (reserve(),))
    assert stops(plan(cluster, [waits("owner")], NOW)) == {"p": StopMode.DRAIN}

    assert stops(reclaimed(drained=8)) == {}
    (late,) = reclaimed(drained=8.5).actions
    assert late == StopPool(
        "p",
        StopMode.PREEMPT,
        "1 step still runs, and `owner` needs its reserve back within 10 s",
        "owner",
    )
    assert stops(reclaimed(drained=8.5, preemptions=3)) == {"p": StopMode.PREEMPT}
    assert stops(reclaimed(drained=8.5, preempting=True)) == {}
    assert stops(reclaimed(drained=8.5, within=60)) == {}


def test_a_waiting_owner_lends_nothing_and_grants_for_its_bytes_are_withdrawn() -> None:
    leaves = pool("p", "old", {"g0": 14}, state=PoolState.DRAINING, busy=1, serving=Priority.BATCH)
    waiting = pool("q", "other", {"g0": 14}, state=PoolState.WAITING, loaded=None, backing={"p": {"g0": 14 * GB}})
    configurations = (model("old", 14), model("other", 14), model("small", 3), OWNER)
    cluster = Cluster(ONE, (leaves, waiting), configurations, (reserve(),))
    demand = [waits("owner"), waits("other", age=30), waits("small", priority=Priority.INTERACTIVE)]

    first = plan(cluster, demand, NOW)
    assert [(one.pool, one.room_for) for one in first.actions if isinstance(one, StopPool)] == [("q", "owner")]
    assert "small" not in {start.configuration for start in starts(first)}
    second = plan(replace(cluster, pools=(leaves,)), demand, NOW)
    assert [(start.configuration, start.after) for start in starts(second)] == [("owner", {"p"})]


def test_a_pinned_pool_never_borrows_a_reserve() -> None:
    cluster = Cluster(ONE, (), (model("pinned", 9, pinned=True), OWNER), (reserve(),))

    assert plan(cluster, [waits("pinned", age=1000)], NOW).actions == ()


def test_targeted_pools_move_when_a_model_fits_nowhere_else() -> None:
    kept = tuple(pool(f"p{n}", f"k{n}", {f"g{n}": 8}) for n in range(2))
    configurations = (*(model(f"k{n}", 8, min_pools=1) for n in range(2)), model("large", 18))
    cluster = Cluster(TWO, kept, configurations)
    made = plan(cluster, [waits("large", age=10)], NOW)

    (move,) = [action for action in made.actions if isinstance(action, MovePool)]
    (start,) = starts(made)
    assert start.after == {move.pool}
    assert start.bytes.keys() != move.bytes.keys()
    busy = tuple(replace(one, busy=1, serving=Priority.BATCH) for one in kept)
    assert plan(replace(cluster, pools=busy), [waits("large", age=1000)], NOW).actions == ()


def test_a_model_that_one_device_cannot_hold_is_split_over_devices_of_one_host() -> None:
    devices = (gpu("g0", host="a"), gpu("g1", host="b"), gpu("g2", host="b"))

    (start,) = starts(plan(Cluster(devices, (), (model("large", 15, 15),)), [waits("large")], NOW))
    assert start.bytes == {"g1": 15 * GB, "g2": 15 * GB}


def test_a_pool_on_a_gpu_holds_ram_of_its_host_too() -> None:
    devices = (gpu("g0", host="a"), ram(2, "a"), gpu("g1", host="b"), ram(8, "b"))
    large = model("large", 5, ram=3)

    (start,) = starts(plan(Cluster(devices, (), (large,)), [waits("large")], NOW))
    assert start.bytes == {"g1": 5 * GB, "ram-b": 3 * GB}
    assert start.reason.endswith("4.66 GiB on g1 of b and 2.79 GiB on ram-b of b, which is free"), start.reason
    reason = refused(plan(Cluster(devices[:2], (), (large,)), [waits("large")], NOW)).reason
    assert reason == "needs 2.79 GiB of RAM in addition to GPUs, and no host can have that free"


def test_a_pool_in_the_ram_makes_room_for_a_pool_on_a_gpu() -> None:
    """The GPU is free, the RAM is not. A pool on a GPU does not slow down the processor."""
    on_cpu = replace(model("old", 6), layouts=(replace(model("old", 6).layouts[0], type="cpu"),))
    cluster = Cluster((gpu("g0"), ram(8)), (pool("p", "old", {"ram-box": 6}),), (on_cpu, model("new", 5, ram=3)))

    found = plan(cluster, [waits("new", age=60, steps=9)], NOW)
    assert stops(found) == {"p": StopMode.DRAIN}
    assert starts(found)[0].bytes == {"g0": 5 * GB, "ram-box": 3 * GB}
    assert starts(found)[0].after == {"p"}


def test_a_pool_moves_between_gpus_of_its_host_with_its_ram() -> None:
    kept = model("kept", 4, ram=2, min_pools=1)
    cluster = Cluster(
        (gpu("g0", 20), gpu("g1", 10), ram(9)),
        (pool("p", "kept", {"g0": 4, "ram-box": 2}),),
        (kept, model("large", 18, ram=3)),
    )

    found = plan(cluster, [waits("large", age=60, steps=9)], NOW)
    (move,) = [action for action in found.actions if isinstance(action, MovePool)]
    assert move.bytes == {"g1": 4 * GB, "ram-box": 2 * GB}
    assert starts(found)[0].bytes == {"g0": 18 * GB, "ram-box": 3 * GB}


def test_a_host_with_the_file_is_preferred() -> None:
    devices = (gpu("g0", host="a"), gpu("g1", host="b"))
    there = model("m", 9, files={"b": seconds(0)}, fetch=seconds(60))
    only = model("m", 9, files={"b": seconds(0)}, fetch=None)
    nowhere = model("m", 9, fetch=None, installation="run `arriero models pull m`")

    assert starts(plan(Cluster(devices, (), (there,)), [waits("m")], NOW))[0].bytes == {"g1": 9 * GB}
    assert starts(plan(Cluster(devices, (), (only,)), [waits("m")], NOW))[0].bytes == {"g1": 9 * GB}
    reason = refused(plan(Cluster(devices, (), (nowhere,)), [waits("m")], NOW)).reason
    assert reason == "no host has its file; run `arriero models pull m`"
    broken = replace(nowhere, unusable={"a": "it is empty", "b": "it is cut off"})
    reason = refused(plan(Cluster(devices, (), (broken,)), [waits("m")], NOW)).reason
    assert reason == "no host can use its file: on a, it is empty; on b, it is cut off"


@pytest.mark.parametrize(("a", "b"), [({}, {"anti_affinity": frozenset("a")}), ({"anti_affinity": frozenset("b")}, {})])
def test_models_that_are_kept_apart_share_no_device(a: dict[str, Any], b: dict[str, Any]) -> None:
    """It is enough that one of the two entries says so. One can make room for the other."""
    cluster = Cluster(TWO, (pool("p", "a", {"g0": 9}),), (model("a", 9, **a), model("b", 5, **b)))
    assert starts(plan(cluster, [waits("b")], NOW))[0].bytes == {"g1": 5 * GB}

    one = replace(cluster, devices=ONE)
    (start,) = starts(plan(one, [waits("b")], NOW))
    assert (start.bytes, start.after) == ({"g0": 5 * GB}, {"p"})
    busy = replace(one, pools=(replace(cluster.pools[0], busy=1, serving=Priority.INTERACTIVE, work_left=seconds(5)),))
    assert "it waits for `a` with 1 step in flight" in refused(plan(busy, [waits("b")], NOW)).reason
    pinned = replace(one, configurations=(model("a", 9, pinned=True, **a), model("b", 5, **b)))
    assert "models are kept apart" in refused(plan(pinned, [waits("b", age=1000)], NOW)).reason


def test_replicas_that_are_spread_take_another_host() -> None:
    devices = (gpu("g0", host="a"), gpu("g1", 40, host="a"), gpu("g2", host="b"))
    hot = model("hot", 9, packing=Packing.SPREAD)
    serving = pool("p", "hot", {"g0": 9}, busy=2, serving=Priority.STANDARD)
    queue = [waits("hot", steps=40, work=seconds(10))]

    assert starts(plan(Cluster(devices, (serving,), (hot,)), queue, NOW))[0].bytes == {"g2": 9 * GB}


def test_a_model_is_placed_only_where_its_entry_allows() -> None:
    devices = (gpu("g0", host="a"), gpu("g1", 10, host="b"), gpu("g2", host="b"))
    by_host, by_device = model("m", 9, only=frozenset({"b"})), model("m", 9, only=frozenset({"g2"}))
    gone = model("m", 9, only=frozenset({"c"}))

    assert starts(plan(Cluster(devices, (), (by_host,)), [waits("m")], NOW))[0].bytes == {"g1": 9 * GB}
    assert starts(plan(Cluster(devices, (), (by_device,)), [waits("m")], NOW))[0].bytes == {"g2": 9 * GB}
    assert (
        "no device set that its entry allows" in refused(plan(Cluster(devices, (), (gone,)), [waits("m")], NOW)).reason
    )


def test_evictions_on_disjoint_sets_are_planned_together() -> None:
    pools = (pool("p", "a", {"g0": 14}), pool("q", "b", {"g1": 14}))
    cluster = Cluster(TWO, pools, tuple(model(name, 14) for name in "abcd"))
    made = plan(cluster, [waits("c", age=30), waits("d", age=30)], NOW)

    assert {start.configuration: set(start.bytes) for start in starts(made)}.keys() == {"c", "d"}
    first, second = starts(made)
    assert not first.bytes.keys() & second.bytes.keys()
    assert not first.after & second.after
    assert stops(made) == {"p": StopMode.DRAIN, "q": StopMode.DRAIN}


def test_a_drained_device_is_evacuated_and_gets_no_pools() -> None:
    devices = (gpu("g0", state=HostState.DRAINING), gpu("g1"))
    cluster = Cluster(devices, (pool("p", "m", {"g0": 9}, busy=1, serving=Priority.STANDARD),), (model("m", 9),))
    made = plan(cluster, [], NOW)

    assert stops(made) == {"p": StopMode.DRAIN}
    assert [(start.purpose, start.bytes) for start in starts(made)] == [(Purpose.EVACUATION, {"g1": 9 * GB})]


def test_in_a_large_cluster_victims_are_looked_for_where_the_hosts_ram_would_suffice() -> None:
    """The device whose pools cost least is on a host without the RAM that the layout needs in addition."""
    devices = tuple(gpu(f"g{n}", host=f"h{n}") for n in range(5)) + tuple(
        ram(2 + 6 * (n > 0), f"h{n}") for n in range(5)
    )
    pools = tuple(pool(f"p{n}", f"old-{n}", {f"g{n}": 14}) for n in range(5))
    rates = {f"old-{n}": {Priority.STANDARD: 0.01 * n} for n in range(5)}
    models = (*(model(f"old-{n}", 14) for n in range(5)), model("new", 14, ram=4))
    cluster = Cluster(devices, pools, models, rates=rates)
    large = PlacementPolicy(max_sets=4)

    assert stops(plan(cluster, [waits("new", age=50)], NOW, large)) == {"p1": StopMode.DRAIN}


def on_five_hosts(gpus: Sequence[Pool], rams: Sequence[Pool], **more: Any) -> list[dict[str, StopMode]]:
    """The victims for a model of 14 GB and 4 GB of RAM, where all device sets are looked at, and where not all are."""
    devices = tuple(gpu(f"g{n}", host=f"h{n}") for n in range(5)) + tuple(ram(8, f"h{n}") for n in range(5))
    pools = (*gpus, *rams)
    models = (
        *(model(one.configuration, 14, **more.get(one.configuration, {})) for one in pools),
        model("new", 14, ram=4),
    )
    rates = {one.configuration: {Priority.STANDARD: 0.01 * int(one.id[1:])} for one in pools}
    cluster = Cluster(devices, pools, models, rates=rates)
    return [
        stops(plan(cluster, [waits("new", age=50)], NOW, PlacementPolicy(max_sets=max_sets))) for max_sets in (32, 4)
    ]


def test_in_a_large_cluster_a_device_without_pools_is_looked_at_where_idle_pools_hold_the_ram() -> None:
    rams = [pool(f"c{n}", f"on-cpu-{n}", {f"ram-h{n}": 6}) for n in range(5)]
    assert on_five_hosts([], rams) == [{"c0": StopMode.DRAIN}] * 2

    hot, gpus = pool("c9", "hot", {"ram-h0": 6}), [pool(f"p{n}", f"old-{n}", {f"g{n}": 14}) for n in range(1, 5)]
    assert on_five_hosts(gpus, [hot]) == [{"p1": StopMode.DRAIN}] * 2, "what is in the RAM counts"


def test_in_a_large_cluster_a_device_is_passed_by_where_the_ram_is_held_by_what_is_not_evicted() -> None:
    gpus = [pool(f"p{n}", f"old-{n}", {f"g{n}": 14}) for n in range(5)]
    pinned = pool("c0", "on-cpu-0", {"ram-h0": 6}, pinned=True)
    assert on_five_hosts(gpus, [pinned], **{"on-cpu-0": {"pinned": True}}) == [{"p1": StopMode.DRAIN}] * 2


def test_unmanaged_memory_is_not_used() -> None:
    cluster = Cluster((gpu("g0", unmanaged_bytes=12 * GB),), (), (model("m", 9),))

    assert (
        "the largest, g0, has 7.45 GiB without its unmanaged memory" in refused(plan(cluster, [waits("m")], NOW)).reason
    )


def test_a_namespace_below_its_share_comes_first() -> None:
    cluster = Cluster(ONE, (), (model("a", 14), model("b", 14)))
    accounts = {"heavy": Account(attained_seconds=900), "light": Account(attained_seconds=100)}
    demand = [waits("a", age=5, steps=2, namespace="heavy"), waits("b", age=5, namespace="light")]

    assert starts(plan(cluster, demand, NOW))[0].configuration == "a"
    assert starts(plan(replace(cluster, accounts=accounts), demand, NOW))[0].configuration == "b"


def test_nothing_is_moved_for_a_namespace_that_may_not_hold_it_twice() -> None:
    """For a moment both pools hold bytes; the ledger would refuse the second."""
    gpus = (gpu("g0", state=HostState.DRAINING), gpu("g1"))
    pools = (pool("p", "m", {"g0": 9}, namespace="x", busy=1),)
    for limit, starts in ((9, 0), (18, 1)):
        accounts = {"x": Account(max_bytes=limit * GB)}
        made = plan(Cluster(gpus, pools, (model("m", 9),), accounts=accounts), [], NOW)
        assert [type(action) for action in made.actions] == [StopPool] + [StartPool] * starts


def test_a_refusal_names_the_namespace_beyond_its_quota() -> None:
    cluster = Cluster(TWO, (pool("p", "a", {"g0": 9}, namespace="x"),), (model("a", 9), model("b", 9)))
    bytes_ = replace(cluster, accounts={"x": Account(max_bytes=10 * GB)})
    used = replace(cluster, accounts={"x": Account(exhausted_until=NOW + seconds(90))})
    demand = [waits("b", namespace="x")]

    found = refused(plan(bytes_, demand, NOW))
    assert found.reason == "needs 8.38 GiB, and namespace x holds 8.38 GiB of the 9.31 GiB that it may hold"
    assert found.estimate is None
    found = refused(plan(used, demand, NOW))
    assert (
        found.reason == "1 step waits, but namespace x has used up its device seconds; the next period begins in 90 s"
    )
    assert starts(plan(bytes_, [*demand, waits("b", namespace="y")], NOW))[0].namespace == "y"


def test_ram_in_addition_to_a_gpu_counts_for_the_quota() -> None:
    """As the ledger counts it, which would refuse the claim otherwise."""
    cluster = Cluster((*ONE, ram(8)), (), (model("m", 9, ram=3),), accounts={"x": Account(max_bytes=11 * GB)})

    found = refused(plan(cluster, [waits("m", namespace="x")], NOW))
    assert found.reason == "needs 11.18 GiB, and namespace x holds 0 B of the 10.24 GiB that it may hold"


def test_a_model_that_crashed_on_a_host_backs_off_there() -> None:
    backoff = Backoff("m", "box", NOW + seconds(40), "its process died 3 times")
    cluster = Cluster(ONE, (), (model("m", 9),), backoffs=(backoff,))

    found = refused(plan(cluster, [waits("m")], NOW))
    assert found.reason == "on box, its process died 3 times; tried again in 40 s"
    assert found.estimate == seconds(45)
    assert starts(plan(cluster, [waits("m")], NOW + seconds(41))) != []


@pytest.mark.parametrize("state", [PoolState.WAITING, PoolState.STARTING])
def test_nothing_is_started_twice(state: PoolState) -> None:
    coming = pool("p", "m", {"g0": 9}, state=state, loaded=None, last_used=None, expected=NOW + seconds(3))

    assert plan(Cluster(ONE, (coming,), (model("m", 9),)), [waits("m", age=100)], NOW) == Plan()


def refused(made: Plan) -> Refusal:
    (refusal,) = made.refusals
    return refusal


def test_demand_for_an_unknown_model_changes_nothing() -> None:
    assert plan(Cluster(ONE), [WaitingSteps("gone", Priority.BATCH, 1, NOW)], NOW) == Plan()


# ---- documentation ----


def test_every_number_of_the_policy_is_documented_with_its_default() -> None:
    def shown(value: object) -> str:
        if isinstance(value, Mapping):
            return ", ".join(f"{value[priority]:g}" for priority in Priority)
        return str(value).lower() if isinstance(value, bool) else f"{value:g}"

    page = (Path(__file__).parents[2] / "docs/scheduling.md").read_text().partition("## The policy\n")[2]
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", page, re.MULTILINE)

    assert dict(rows) == {field.name: shown(getattr(POLICY, field.name)) for field in fields(PlacementPolicy)}
