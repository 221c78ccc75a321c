"""When a rule fires and clears, by what its conditions see."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.governance.rules import active_hours, check
from app.governance.rules.evaluation import FiringChange, Reading, RuleMemory, RulePhase, decide
from app.governance.rules.rule import ActiveHours, Rule
from app.workflows.language.source import SourceDocument

START = datetime(2026, 3, 2, 12, tzinfo=UTC)  # a Monday
HIGH = {"signal": "error_rate", "operator": ">", "threshold": 0.2}


def rule(**fields: Any) -> Rule:
    document = {"rule": "r", "category": "quality", "all": [HIGH], "cooldown": 0, **fields}
    return check.check(SourceDocument(document, {}))


def changes(
    wanted: Rule, values: Iterable[Any], *, each: int = 60, since: datetime = START
) -> list[tuple[int, FiringChange]]:
    """Evaluate once each minute; `values` are those of all conditions, alone or in tuples."""
    memory, found = RuleMemory(1), []
    for place, seen in enumerate(values):
        readings = [
            one if isinstance(one, Reading) else Reading(one, 0 if one is None else 100)
            for one in (seen if isinstance(seen, tuple) else (seen,))
        ]
        now = START + timedelta(seconds=place * each)
        decision = decide(wanted, 1, memory, readings, now, since)
        # What is remembered is stored and read in between.
        memory = RuleMemory.of_json(decision.memory.as_json())
        if decision.change is not None:
            found.append((place, decision.change))
    return found


def test_it_fires_once_and_clears_once() -> None:
    assert changes(rule(), [0.1, 0.3, 0.4, 0.3, 0.1, 0.1]) == [(1, FiringChange.FIRED), (4, FiringChange.CLEARED)]


def test_without_observations_nothing_holds() -> None:
    assert changes(rule(), [None, None]) == []
    assert changes(rule(), [0.3, None]) == [(0, FiringChange.FIRED), (1, FiringChange.CLEARED)]


def test_it_waits_for_as_long_as_it_says() -> None:
    for wanted in (rule(**{"for": "3m"}), rule(all=[{**HIGH, "for": "3m"}])):
        assert changes(wanted, [0.3, 0.3, 0.3, 0.3, 0.3]) == [(0, FiringChange.BEGAN), (3, FiringChange.FIRED)]
        broken = [0.3, 0.3, 0.1, 0.3, 0.3, 0.3, 0.3]
        assert changes(wanted, broken) == [
            (0, FiringChange.BEGAN),
            (2, FiringChange.CEASED),
            (3, FiringChange.BEGAN),
            (6, FiringChange.FIRED),
        ]


def test_a_value_that_wavers_about_the_threshold_fires_once() -> None:
    wavering = [0.21, 0.19, 0.21, 0.19, 0.21, 0.04]
    assert len(changes(rule(), wavering)) == 6
    steady = rule(all=[{**HIGH, "clear": 0.05}])
    assert changes(steady, wavering) == [(0, FiringChange.FIRED), (5, FiringChange.CLEARED)]
    late = rule(clear_for="2m")
    assert changes(late, [*wavering, 0.04, 0.04]) == [(0, FiringChange.FIRED), (7, FiringChange.CLEARED)]


def test_no_firing_begins_in_the_cooldown() -> None:
    wanted = rule(cooldown="5m")
    assert changes(wanted, [0.3, 0.1, 0.3, 0.3, 0.3, 0.3, 0.3]) == [
        (0, FiringChange.FIRED),
        (1, FiringChange.CLEARED),
        (2, FiringChange.BEGAN),
        (5, FiringChange.FIRED),
    ]


def test_all_and_any() -> None:
    other = {"signal": "queue_wait", "operator": ">", "threshold": 5}
    both = [(0.3, 1), (0.1, 9), (0.3, 9), (0.1, 1)]
    assert changes(rule(all=[HIGH, other]), both) == [(2, FiringChange.FIRED), (3, FiringChange.CLEARED)]
    either = rule(all=[], any=[HIGH, other])
    assert changes(either, both) == [(0, FiringChange.FIRED), (3, FiringChange.CLEARED)]


def test_each_condition_of_all_may_hold_for_a_time_of_its_own() -> None:
    other = {"signal": "queue_wait", "operator": ">", "threshold": 5}
    wanted = rule(all=[{**HIGH, "for": "2m"}, other])
    assert changes(wanted, [(0.3, 1), (0.3, 1), (0.3, 9)]) == [(2, FiringChange.FIRED)]


def test_too_few_observations_do_not_fire() -> None:
    wanted = rule(all=[{**HIGH, "at_least": 20}])
    assert changes(wanted, [Reading(1.0, 19), Reading(1.0, 20)]) == [(1, FiringChange.FIRED)]


def test_a_time_without_evaluation_counts_for_nothing() -> None:
    """The control workers were away for an hour: what held before and holds now need not have held between."""
    wanted, memory = rule(**{"for": "10m"}), RuleMemory(1)
    memory = decide(wanted, 1, memory, [Reading(0.3, 100)], START, START).memory
    back = START + timedelta(hours=1)
    assert decide(wanted, 1, memory, [Reading(0.3, 100)], back, since=back).change is None
    assert decide(wanted, 1, memory, [Reading(0.3, 100)], back, since=START).change is FiringChange.FIRED


def test_a_changed_rule_begins_anew_and_one_that_is_not_active_clears() -> None:
    seen, memory = [Reading(0.3, 100)], RuleMemory(1, RulePhase.FIRING, (START,), START, None, START)
    changed = decide(rule(), 2, memory, seen, START, START)
    assert (changed.change, changed.reason) == (FiringChange.CLEARED, "the rule was changed")
    inactive = decide(rule(), 1, memory, seen, START, START, active=False)
    assert inactive.change is FiringChange.CLEARED
    assert decide(rule(), 2, changed.memory, seen, START, START).memory.version == 2


def test_the_reason_names_signal_value_and_threshold() -> None:
    decision = decide(rule(), 1, RuleMemory(1), [Reading(0.31, 100)], START, START)
    assert decision.reason == "error_rate is 31 % (mean in 5m), > 20 %"


@given(
    values=st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=60),
    wait=st.integers(0, 4),
    clear_for=st.integers(0, 4),
    cooldown=st.integers(0, 9),
    clear=st.sampled_from([None, 0.05, 0.2]),
)
def test_whatever_is_measured_the_changes_follow_each_other(
    values: list[float | None], wait: int, clear_for: int, cooldown: int, clear: float | None
) -> None:
    """A firing fires once and is cleared once; a pending one fires or ceases; the cooldown is kept."""
    condition = HIGH if clear is None else {**HIGH, "clear": clear}
    wanted = rule(all=[condition], clear_for=f"{clear_for}m", cooldown=f"{cooldown}m", **{"for": f"{wait}m"})
    follows = {
        FiringChange.BEGAN: {FiringChange.FIRED, FiringChange.CEASED},
        FiringChange.FIRED: {FiringChange.CLEARED},
        FiringChange.CEASED: {FiringChange.BEGAN, FiringChange.FIRED},
        FiringChange.CLEARED: {FiringChange.BEGAN, FiringChange.FIRED},
    }
    found = changes(wanted, values)
    for (_, before), (_, after) in pairwise(found):
        assert after in follows[before]
    fired = [place for place, change in found if change is FiringChange.FIRED]
    assert all(after - before >= cooldown for before, after in pairwise(fired))
    for place in fired:
        held = values[max(0, place - wait) : place + 1]
        assert len(held) == wait + 1
        assert all(value is not None and value > (clear or 0.2) for value in held)


@pytest.mark.parametrize(
    ("hours", "at", "active"),
    [
        ({"days": ["mon"]}, "2026-03-02T23:00+00:00", True),
        ({"days": ["tue"]}, "2026-03-02T23:00+00:00", False),
        ({"hours": "08:00-18:00"}, "2026-03-02T18:00+00:00", False),
        ({"hours": "08:00-18:00", "timezone": "Europe/Madrid"}, "2026-03-02T07:00+00:00", True),
        ({"hours": "22:00-06:00"}, "2026-03-02T23:00+00:00", True),
        ({"hours": "22:00-06:00", "days": ["mon"]}, "2026-03-03T05:59+00:00", True),
        ({"hours": "22:00-06:00", "days": ["mon"]}, "2026-03-02T05:59+00:00", False),
    ],
)
def test_a_schedule_is_that_of_its_time_zone(hours: dict[str, Any], at: str, active: bool) -> None:
    assert active_hours.is_active(ActiveHours(**hours), datetime.fromisoformat(at)) is active
