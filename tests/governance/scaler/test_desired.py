"""How many hosts are wanted: by demand, within limits and cool-downs, and never twice the same request."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.fleet.host import HostState
from app.governance.scaler.desired import ModelLoad, ScaledHost, ScalerLimits, ScalerState, decide, needed_hosts
from app.kernel.sections.scaler import ScaledClass, ScalerSettings

GIB = 2**30
CLASS = ScaledClass(name="l4", type="NVIDIA L4", bytes=22 * GIB, match="cloud-*", min=0, max=5)
LIMITS = ScalerLimits(timedelta(seconds=60), timedelta(seconds=30), timedelta(minutes=5))
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def load(steps: int = 0, work: float = 0.0, **more: int) -> ModelLoad:
    return ModelLoad("a:1", 10 * GIB, 4, steps=steps, work=work, **more)


def host(number: int, state: HostState = HostState.SCHEDULABLE, pools: int = 0, busy: int = 0) -> ScaledHost:
    return ScaledHost(f"cloud-{number}", state, pools, busy)


@pytest.mark.parametrize(
    ("loads", "expected"),
    [
        ([], 0),
        ([load(1, 1.0)], 1),
        ([load(48, 960.0)], 2),  # a host has 8 slots: 960 / 8 / 60
        ([load(48, 960.0, busy=8)], 3),
        ([load(10_000, 1e9)], 5),
        ([replace(load(3, 9.0), bytes=30 * GIB)], 0),
    ],
)
def test_so_many_hosts_that_steps_begin_within_the_target(loads: list[ModelLoad], expected: int) -> None:
    hosts, reasons = needed_hosts(CLASS, loads, LIMITS.target_wait)
    assert hosts == expected
    assert bool(reasons) == bool(loads)


def test_a_first_host_is_asked_for_at_once_and_only_once() -> None:
    first = decide(CLASS, [load(1, 1.0)], [], ScalerState(), LIMITS, NOW)
    assert (first.hosts, first.is_asked, first.state.number) == (1, True, 1)
    again = decide(CLASS, [load(1, 1.0)], [], first.state, LIMITS, NOW + timedelta(minutes=9))
    assert (again.hosts, again.is_asked) == (1, False)


def test_more_are_asked_for_after_the_cool_down() -> None:
    state = ScalerState(hosts=1, number=1, raised_at=NOW)
    demand = [load(48, 960.0)]
    held = decide(CLASS, demand, [host(1)], state, LIMITS, NOW + timedelta(seconds=29))
    assert (held.hosts, held.is_asked) == (1, False)
    assert "cool-down: 1 s" in held.reasons[0]
    assert decide(CLASS, demand, [host(1)], held.state, LIMITS, NOW + timedelta(seconds=30)).hosts == 2


def test_an_idle_host_is_drained_before_it_is_given_up_and_zero_is_reached() -> None:
    state = ScalerState(hosts=2)
    hosts = [host(1, pools=1, busy=1), host(2, pools=1)]
    waits = decide(CLASS, [load(busy=1)], hosts, state, LIMITS, NOW)
    assert (waits.drain, waits.is_asked) == ((), False)
    later = NOW + LIMITS.down_cooldown
    drained = decide(CLASS, [load(busy=1)], hosts, waits.state, LIMITS, later)
    assert (drained.drain, drained.hosts, drained.is_asked) == (("cloud-2",), 2, False)
    hosts[1] = host(2, HostState.DRAINING, pools=1)
    assert not decide(CLASS, [load(busy=1)], hosts, drained.state, LIMITS, later).release
    hosts[1] = host(2, HostState.DRAINING)
    given_up = decide(CLASS, [load(busy=1)], hosts, drained.state, LIMITS, later)
    assert (given_up.release, given_up.hosts, given_up.is_asked) == (("cloud-2",), 1, True)
    idle = decide(CLASS, [], [host(1)], given_up.state, LIMITS, later)
    last = decide(CLASS, [], [host(1)], idle.state, LIMITS, later + LIMITS.down_cooldown)
    zero = decide(CLASS, [], [host(1, HostState.DRAINING)], last.state, LIMITS, later + LIMITS.down_cooldown)
    assert (zero.hosts, zero.release) == (0, ("cloud-1",))


def test_a_draining_host_is_kept_when_it_is_needed_again() -> None:
    state = ScalerState(hosts=2, draining=("cloud-2",), raised_at=NOW)
    hosts = [host(1, pools=1, busy=8), host(2, HostState.DRAINING)]
    found = decide(CLASS, [load(48, 480.0, busy=8)], hosts, state, LIMITS, NOW)
    assert (found.keep, found.release, found.hosts, found.is_asked) == (("cloud-2",), (), 2, False)
    assert found.state.draining == ()


def test_hosts_of_other_names_are_not_given_up() -> None:
    hosts = [ScaledHost("rack-1", HostState.SCHEDULABLE)]
    found = decide(CLASS, [], hosts, ScalerState(), LIMITS, NOW)
    assert decide(CLASS, [], hosts, found.state, LIMITS, NOW + timedelta(days=1)).drain == ()


@given(st.lists(st.tuples(st.integers(0, 100), st.floats(0, 1e6), st.integers(0, 400)), min_size=1, max_size=30))
def test_requests_stay_within_the_limits_and_each_changes_the_number(demands: list[tuple[int, float, int]]) -> None:
    """Random demand on hosts that follow the requests: no request repeats the last one, none is out of the limits."""
    state, hosts, now = ScalerState(), list[ScaledHost](), NOW
    asked: list[int] = []
    for steps, work, seconds in demands:
        now += timedelta(seconds=seconds)
        found = decide(CLASS, [load(steps, work)] if steps else [], hosts, state, LIMITS, now)
        if found.is_asked:
            assert found.hosts != (asked[-1] if asked else len(hosts))
            asked.append(found.hosts)
        assert CLASS.min <= found.hosts <= CLASS.max
        assert found.state.number == len(asked)
        assert not set(found.release) & {one.name for one in hosts if one.state is not HostState.DRAINING}
        hosts = [one for one in hosts if one.name not in found.release]
        hosts = [
            replace(one, state=HostState.DRAINING)
            if one.name in found.drain
            else replace(one, state=HostState.SCHEDULABLE)
            if one.name in found.keep
            else one
            for one in hosts
        ]
        names = {one.name for one in hosts}
        new = (name for name in (f"cloud-{n}" for n in range(99)) if name not in names)
        hosts += [ScaledHost(next(new), HostState.SCHEDULABLE) for _ in range(found.hosts - len(hosts))]
        hosts = hosts[: max(found.hosts, len(hosts))]
        state = found.state


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mode": "on"}, "needs a url or a command"),
        ({"url": "https://a.example"}, "needs secret"),
        ({"url": "https://a.example", "secret": "s", "command": ["x"]}, "both set"),
        ({"classes": [CLASS, CLASS]}, "the same name"),
    ],
)
def test_settings_that_cannot_work_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScalerSettings.model_validate(given)
