"""Placement: what a plan may never do, whatever the fleet; and what it does in fleets that can be read."""

from __future__ import annotations

import re
from dataclasses import replace

from hypothesis import given, settings

from app.fleet.fleet import (
    COMING,
    Account,
    Bar,
    DeviceState,
    Fleet,
    Packing,
    PoolState,
    Priority,
    Reserve,
    SetAside,
    Usage,
    charges,
)
from app.fleet.placement import GrantReserve, MovePool, Plan, Purpose, StartPool, Stop, StopPool, plan
from app.fleet.policy import Policy
from tests.fleet.fleets import NOW, Case, applied, cases, gpu, model, pool, seconds, waits

POLICY = Policy()
ONE, TWO = (gpu("g0"),), (gpu("g0"), gpu("g1"))


def starts(made: Plan) -> list[StartPool]:
    return [action for action in made.actions if isinstance(action, StartPool)]


def stops(made: Plan) -> dict[str, Stop]:
    return {action.pool: action.how for action in made.actions if isinstance(action, StopPool)}


def reasons(made: Plan) -> list[str]:
    return [one.reason for one in (*made.actions, *made.refusals)]


# ---- whatever the fleet ----


@settings(max_examples=400, deadline=None)
@given(cases())
def test_no_plan_charges_a_device_above_its_capacity(case: Case) -> None:
    fleet = case.fleet
    made = plan(fleet, case.demand, NOW)
    after = applied(fleet, made)

    charged = charges(after)
    assert [d.id for d in fleet.devices if charged[d.id] > d.capacity_bytes] == []
    before = charges(fleet)
    for device in fleet.devices:  # what strangers use is left to them
        if charged[device.id] > before[device.id]:
            assert charged[device.id] <= device.capacity_bytes - device.stranger_bytes
    for action in starts(made):
        there = {d.id: d for d in fleet.devices}
        assert all(there[device].state is DeviceState.OPEN for device in action.bytes)
        assert len({there[device].host for device in action.bytes}) == 1


@settings(max_examples=300, deadline=None)
@given(cases())
def test_nobody_loses_work_to_an_equal_or_lower_class(case: Case) -> None:
    """But for bytes that are set aside for another, and on devices that are drained."""
    fleet, demand = case.fleet, case.demand
    made = plan(fleet, demand, NOW)
    owners = {one.configuration for one in fleet.reserves}
    going = {d.id for d in fleet.devices if d.state is DeviceState.DRAINING}
    of = {one.id: one for one in fleet.pools}
    for action in made.actions:
        if not isinstance(action, StopPool) or not of[action.pool].busy or of[action.pool].bytes.keys() & going:
            continue
        victim, asking = of[action.pool], [one for one in demand if one.configuration == action.room_for]
        if action.room_for in owners:
            continue
        assert victim.serving is not None
        urgent = min(one.priority.rank for one in asking if one.ready is None)
        late = any((NOW - one.oldest).total_seconds() >= POLICY.bound[one.priority] for one in asking)
        assert urgent < victim.serving.rank or (late and action.how is Stop.DRAIN)
        if action.how is Stop.PREEMPT:
            assert urgent < victim.serving.rank
            assert victim.preemptions < POLICY.max_preemptions


@settings(max_examples=300, deadline=None)
@given(cases())
def test_what_is_pinned_or_kept_up_is_not_stopped_for_others(case: Case) -> None:
    fleet = case.fleet
    made = plan(fleet, case.demand, NOW)
    going = {d.id for d in fleet.devices if d.state is DeviceState.DRAINING}
    of = {one.id: one for one in fleet.pools}
    configurations = {one.id: one for one in fleet.configurations}
    for id_ in stops(made):
        if not of[id_].bytes.keys() & going:
            configuration = configurations[of[id_].configuration]
            others = [p for p in fleet.pools if p.configuration == configuration.id and p.state in COMING]
            assert not configuration.pinned
            assert len(others) - len([p for p in others if p.id in stops(made)]) >= min(
                configuration.min_pools, len(others)
            )


@settings(max_examples=300, deadline=None)
@given(cases())
def test_whoever_waits_has_a_pool_coming_or_a_reason_with_figures(case: Case) -> None:
    fleet, demand = case.fleet, case.demand
    made = plan(fleet, demand, NOW)
    stopped, moved = stops(made), {a.pool for a in made.actions if isinstance(a, MovePool)}
    served = {p.configuration for p in fleet.pools if p.state in COMING and p.id not in stopped}
    served |= {action.configuration for action in starts(made)}
    served |= {p.configuration for p in fleet.pools if p.id in moved}
    refused = {one.configuration: one for one in made.refusals}
    for one in demand:
        if one.ready is None and one.configuration not in served:
            assert one.configuration in refused
    assert all(len(text) > 10 and re.search(r"\d|`|nobody|no host|no device", text) for text in reasons(made))
    assert len(refused) == len(made.refusals)


@settings(max_examples=200, deadline=None)
@given(cases())
def test_the_same_arguments_give_the_same_plan(case: Case) -> None:
    fleet, demand = case.fleet, case.demand
    other = replace(
        fleet,
        devices=tuple(reversed(fleet.devices)),
        pools=tuple(reversed(fleet.pools)),
        accounts=dict(reversed(fleet.accounts.items())),
    )

    assert plan(fleet, demand, NOW) == plan(fleet, list(demand), NOW)
    assert set(map(repr, plan(fleet, demand, NOW).actions)) == set(map(repr, plan(other, demand, NOW).actions))


@settings(max_examples=200, deadline=None)
@given(cases())
def test_bytes_are_promised_once(case: Case) -> None:
    """Whoever waits for a pool gets bytes of it that no other was promised, so that all can start when it is gone."""
    fleet = case.fleet
    after = applied(fleet, plan(fleet, case.demand, NOW))
    named = {id_ for one in after.pools for id_ in one.after}
    gone = replace(after, pools=tuple(p for p in after.pools if not (p.id in named and p.state is PoolState.DRAINING)))

    charged = charges(gone)
    assert [d.id for d in fleet.devices if charged[d.id] > d.capacity_bytes] == []


@settings(max_examples=200, deadline=None)
@given(cases())
def test_a_second_plan_does_nothing_when_nothing_has_changed(case: Case) -> None:
    """No oscillation at rest: what was granted settles it."""
    fleet, demand = case.fleet, case.demand
    for _ in range(30):
        made = plan(fleet, demand, NOW)
        if not made.actions:
            return
        fleet = applied(fleet, made)
    raise AssertionError(f"it goes on and on: {made.actions}")
