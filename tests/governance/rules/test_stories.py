"""What the built-in rules, and rules of the documentation, say to what goes wrong: once, and until it is over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from app.governance.rules import check, readings
from app.governance.rules.builtin import builtin_rules
from app.governance.rules.history import HistoryPoint, PastFiring, replay
from app.governance.rules.rule import Rule
from app.governance.signals.sample import Aggregate, Sample
from app.workflows.language.source import SourceDocument

START = datetime(2026, 3, 2, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


def story(rule: Rule, minutes: int, values: Callable[[str, int], Sequence[float]], group: str = "") -> list[PastFiring]:
    """Run a rule over a history: `values` are the observations of a signal in a minute."""
    points = {}
    for wanted in readings.queries(rule, "", known=False):
        points[wanted] = []
        for minute in range(minutes):
            aggregate = Aggregate()
            for value in values(wanted.signal, minute):
                aggregate.observe(Sample(wanted.signal, value))
            if aggregate.observations:
                at = START + minute * MINUTE
                points[wanted].append(HistoryPoint(at, group if wanted.by else "", aggregate))
    return list(replay(rule, "", points, START, START + minutes * MINUTE, MINUTE).firings)


def minutes_of(firing: PastFiring) -> tuple[float, float | None]:
    cleared = None if firing.cleared_at is None else (firing.cleared_at - START) / MINUTE
    return (firing.fired_at - START) / MINUTE, cleared


def test_a_leak_of_memory_fires_once_and_clears_after_the_clean_up() -> None:
    """It rises by two parts in a hundred a minute, wavers about the threshold, and is cleaned up after 40 minutes."""

    def leak(_: str, minute: int) -> list[float]:
        return [0.5 + 0.02 * minute + 0.03 * (minute % 2) if minute < 22 else 0.95 if minute < 40 else 0.5]

    (firing,) = story(builtin_rules()["memory-high"], 90, leak, "host-1")
    fired, cleared = minutes_of(firing)
    assert 14 <= fired <= 19
    assert cleared is not None
    assert 41 <= cleared <= 45
    assert firing.value == "host-1"
    assert "memory_utilisation" in firing.reason


def test_a_model_that_fails_one_call_in_five_fires_and_a_single_failure_does_not() -> None:
    def calls(_: str, minute: int) -> list[float]:
        if minute < 20:
            return [float(minute == 5)] + [0.0] * 9
        return [1.0, 1.0] + [0.0] * 8 if minute < 40 else [0.0] * 10

    (firing,) = story(builtin_rules()["errors-frequent"], 80, calls, "chat")
    fired, cleared = minutes_of(firing)
    assert 20 < fired <= 25
    assert cleared is not None
    assert 44 <= cleared <= 50


def test_two_models_that_take_turns_fire_a_rule_on_thrash() -> None:
    """Each load serves two steps; then one load serves them all."""
    rule = check.check(
        SourceDocument(
            {
                "rule": "thrash",
                "category": "performance",
                "all": [{"signal": "thrash_rate", "operator": ">", "threshold": 0.3, "clear": 0.1, "window": "10m"}],
                "cooldown": "1h",
            },
            {},
        )
    )

    def thrash(_: str, minute: int) -> list[float]:
        return [0.5, 0.5] if minute < 30 else [0.01, 0.01]

    (firing,) = story(rule, 60, thrash)
    fired, cleared = minutes_of(firing)
    assert fired < 5
    assert cleared is not None
    assert 38 <= cleared <= 41


def test_healthy_days_are_quiet() -> None:
    healthy: dict[str, Any] = {
        "memory_utilisation": [0.6],
        "response_time": [0.5, 1.0, 2.0] * 10,
        "error_rate": [0.0] * 30,
        "collaboration_score": [0.95],
        "thrash_rate": [0.0] * 30,
        "handoff_success": [1.0] * 5,
        "split_rollbacks": [],
    }
    for rule in builtin_rules().values():
        assert story(rule, 60, lambda signal, _: healthy[signal], "x") == [], rule.rule
