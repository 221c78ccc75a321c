"""What is wrong with a rule is said before it is stored."""

from __future__ import annotations

from typing import Any

import pytest

from app.governance.rules import check
from app.governance.rules.builtin import builtin_rules
from app.governance.signals.names import SIGNALS
from app.kernel.errors import InvalidInput
from app.workflows.language import source
from app.workflows.language.source import SourceDocument

HIGH = {"signal": "error_rate", "operator": ">", "threshold": 0.2}


def problems(namespace: str = "", **fields: Any) -> list[str]:
    document = {"rule": "r", "category": "quality", "all": [HIGH], **fields}
    try:
        check.check(SourceDocument(document, {}), namespace)
    except InvalidInput as error:
        return [f"{problem.where}: {problem.message} | {problem.accepted}" for problem in error.problems]
    return []


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"all": []}, "all: a rule needs either 'all' or 'any'"),
        ({"any": [HIGH]}, "all: a rule needs either 'all' or 'any'"),
        ({"all": [{**HIGH, "signal": "error_rat"}]}, "did you mean 'error_rate'?"),
        ({"all": [{**HIGH, "statistic": "p95"}]}, "all[0].statistic: the signal 'error_rate' has no 'p95'"),
        ({"all": [{**HIGH, "threshold": 20}]}, "all[0].threshold: 20 is no ratio | from 0 to 1: 0.8 for 80 %"),
        ({"all": [{**HIGH, "clear": 0.5}]}, "all[0].clear: 0.5 is above the threshold | at most 0.2"),
        ({"all": [{"signal": "error_rate"}]}, "all[0].operator: this field is missing"),
        ({"all": [{"signal": "cost", "absent": True, "threshold": 1}]}, "all[0].threshold: a condition with 'absent'"),
        ({"all": [{**HIGH, "scope": {"device": "d"}}]}, "all[0].scope.device: the signal 'error_rate' has no label"),
        ({"all": [{**HIGH, "scope": {"pol": "d"}}]}, "all[0].scope.pol"),
        ({"all": [{**HIGH, "windw": "5m"}]}, "all[0].windw: unknown field | "),
        ({"all": [{**HIGH, "window": "5s"}]}, "all[0].window: '5s' is out of range | at least 1 minute"),
        ({"all": [{**HIGH, "threshold": float("nan")}]}, "all[0].threshold"),
        ({"by": "device"}, "by: no signal of the rule has the label 'device'"),
        ({"schedule": {"timezone": "Mars/Olympus"}}, "schedule.timezone: the time zone is unknown"),
        ({"schedule": {"hours": "8-18"}}, "schedule.hours"),
        ({"severity": "fatal"}, "severity: 'fatal' is not supported here"),
        ({"rule": "Not Valid"}, "rule: 'Not Valid' is not a name of a rule"),
        ({"all": [{"expression": "signals.error_rate.mean >"}]}, "all[0].expression"),
        ({"by": "model", "all": [{"expression": "signals.("}]}, "all[0].expression"),
        ({"all": [{"expression": "signals.nothing.mean > 1"}]}, "there is no signal 'nothing'"),
        ({"all": [{"expression": "signals.error_rate.p95 > 1"}]}, "the signal 'error_rate' has no 'p95'"),
        ({"all": [{"expression": "signals.error_rate.mean"}]}, ""),
        ({"all": [{"expression": "inputs.x > 1"}]}, "'inputs' is not defined here"),
        ({"all": [{"expression": "1 > 0"}]}, "the expression reads no signal"),
        ({"all": [HIGH] * 11}, "all: "),
    ],
)
def test_the_problem_is_named_with_its_field(fields: dict[str, Any], expected: str) -> None:
    found = problems(**fields)
    assert expected == "" or any(expected in one for one in found), found


def test_a_rule_of_a_namespace_sees_only_its_own() -> None:
    assert problems("a") == []
    memory = {"signal": "memory_utilisation", "operator": ">", "threshold": 0.8}
    assert "whole installation" in problems("a", all=[memory])[0]
    assert problems("a", all=[{**HIGH, "scope": {"namespace": "b"}}])


def test_problems_have_the_lines_of_the_file() -> None:
    text = "rules:\n  - rule: a\n    category: quality\n    all:\n      - signal: error_rat\n        absent: true\n"
    (document,) = check.parse(text)
    with pytest.raises(InvalidInput) as raised:
        check.check(document)
    assert [(problem.where, problem.line) for problem in raised.value.problems] == [("rules[0].all[0].signal", 5)]


def test_a_document_is_stored_as_it_was_written() -> None:
    text = "rule: a\ncategory: safety\nfor: 2m\nall: [{signal: error_rate, operator: '>', threshold: 0.2, for: 1m}]"
    rule = check.check(source.read(text))
    assert rule.document()["for"] == "2m"
    assert rule.document()["all"][0]["for"] == "1m"
    assert check.stored(rule.document()) == rule


def test_the_built_in_rules_have_the_promised_targets() -> None:
    rules = builtin_rules()
    found = {
        (condition.signal, condition.operator, condition.threshold)  # type: ignore[union-attr] # the rules have plain conditions alone
        for rule in rules.values()
        for condition in rule.conditions[:1]
    }
    assert found == {
        ("memory_utilisation", ">", 0.8),
        ("response_time", ">", 3.0),
        ("error_rate", ">", 0.05),
        ("collaboration_score", "<", 0.8),
        ("handoff_success", "<", 0.9),
        ("split_rollbacks", ">", 0.0),
    }
    assert len({rule.category for rule in rules.values()}) == 4
    assert {name for rule in rules.values() for name in rule.document()} & {"dry_run"} == set()


def test_every_signal_can_be_the_subject_of_a_rule() -> None:
    for name, definition in SIGNALS.items():
        condition = {"signal": name, "operator": ">", "threshold": 0.5}
        for statistic in definition.statistics:
            assert problems(all=[{**condition, "statistic": statistic.value}]) == [], (name, statistic)
