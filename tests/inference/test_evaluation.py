"""Datasets, checks, and what evaluated cases say together."""

from __future__ import annotations

import json
from typing import Any

import pytest

from app.inference import evaluation
from app.inference.evaluation import EvaluatedCase, EvaluationCase
from app.inference.shadows.comparison import PairMetric
from app.kernel.errors import InvalidInput

SHORT = [{"name": "short", "that": "text.size() < 5"}, {"name": "same", "that": "output == expected"}]


def case(**more: Any) -> EvaluationCase:
    (found,) = evaluation.cases_of([json.dumps({"inputs": {"text": "x"}, **more})])
    return found


def done(given: EvaluationCase, output: Any) -> EvaluatedCase:
    return EvaluatedCase(given, "run", None, output, checks=evaluation.checked(given, output))


@pytest.mark.parametrize(
    ("line", "where"),
    [
        ("no json", "line 1"),
        ("[" * 100_000, "line 1"),
        ("[]", "line 1"),
        ('{"inputs": {}, "request": {}}', "line 1"),
        ('{"inputs": 3}', "line 1"),
        ('{"inputs": {}, "other": 1}', "line 1.other"),
        ('{"inputs": {}, "id": ""}', "line 1.id"),
        ('{"inputs": {}, "checks": {}}', "line 1.checks"),
        ('{"inputs": {}, "checks": [{"name": "n"}]}', "line 1.checks[0]"),
        ('{"inputs": {}, "checks": [{"name": "n", "that": "1 +"}]}', "line 1.checks[0].that"),
    ],
)
def test_wrong_lines_are_named(line: str, where: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        evaluation.cases_of([line])
    assert caught.value.problems[0].where == where
    assert caught.value.problems[0].accepted


def test_empty_lines_are_passed_over_and_checks_are_added() -> None:
    more = evaluation.checks_of([{"name": "all", "that": "true"}])
    found = evaluation.cases_of(["", json.dumps({"request": {"messages": []}, "checks": SHORT}), "  "], more)

    assert [(one.id, one.kind) for one in found] == [("line 2", "request")]
    assert [check.name for check in found[0].checks] == ["short", "same", "all"]


def test_checks_see_text_output_and_what_was_expected() -> None:
    answer = {"choices": [{"message": {"content": "Hi"}}]}
    assert evaluation.checked(case(checks=SHORT, output=answer), answer) == {"short": True, "same": True}
    assert evaluation.checked(case(checks=SHORT), {"a": "long enough"}) == {"short": False, "same": False}
    wrong = case(checks=[{"name": "n", "that": "output.missing > 1"}])
    assert evaluation.checked(wrong, {}) == {"n": None}


def test_a_report_has_rates_failures_and_differences() -> None:
    good, bad = case(id="good", checks=SHORT, output="Hi"), case(id="bad", checks=SHORT, output="Hello there")
    lost = EvaluatedCase(case(id="lost", output="x"), None, "no pool")
    found = evaluation.report_of([done(good, "Hi"), done(bad, "Ho"), lost], 0.05, 0.05)

    assert [one.case.id for one in found.failed] == ["bad", "lost"]
    assert found.pass_rate == pytest.approx(1 / 3)
    assert [(one.name, one.passed, one.cases, one.before) for one in found.checks] == [
        ("short", 2, 2, 1),
        ("same", 1, 2, 2),
    ]
    assert {one.metric: one.pairs for one in found.metrics} == {PairMetric.ERROR: 3, PairMetric.LENGTH: 2}
    assert evaluation.report_of([], 0.05, 0.05).pass_rate == 1.0
