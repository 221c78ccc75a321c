"""Verifiers, grounding and the comparison of outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from pydantic import TypeAdapter

from app.kernel.errors import StepFailure
from app.workflows.language.verification import Verifier
from workers.refinement import outputs, verifiers
from workers.refinement.code_tests import CodeRun
from workers.refinement.grounding import GroundingSources, grounded
from workers.refinement.outputs import NoValue
from workers.refinement.verdict import Verdicts
from workers.refinement.verifiers import VerifierInputs

ORDER = "Hello, Ana Ruiz from Graz here. Last year I had 5 lamps; now send twelve blue lamps for 1,200.50 euros."


def no_code(*_: object) -> CodeRun:
    raise AssertionError("no code is run here")


def verify(value: Any, *of: dict[str, Any], **data: Any) -> Verdicts:
    checks: list[Verifier] = [TypeAdapter(Verifier).validate_python(one) for one in of]
    names = {"inputs": {"message": ORDER} | data, "steps": {}}
    as_json = any(one["kind"] == "schema" for one in of)
    return verifiers.verify(verifiers.candidate(value, as_json=as_json), checks, VerifierInputs(names, no_code, names))


SCHEMA = {"kind": "schema", "schema": {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}}


def test_the_score_is_the_weighted_share_of_passed_checks() -> None:
    checks = {
        "kind": "checks",
        "weight": 3,
        "checks": [
            {"name": "even", "that": "output.n % 2 == 0", "weight": 1},
            {"name": "small", "that": "output.n < 10", "weight": 3, "message": "n must be below 10"},
        ],
    }
    found = verify({"n": 12}, SCHEMA, checks)

    assert found.score == pytest.approx((1 * 1 + 3 * 0.25) / 4)
    assert found.passed is False
    assert found.feedback == "- n must be below 10"
    assert verify({"n": 4}, SCHEMA, checks).score == 1.0
    assert verify({"n": 4}).score is None, "without verifiers nothing is known"


def test_a_text_without_json_fails_every_verifier() -> None:
    found = verify("I cannot do that.", SCHEMA, {"kind": "grounding", "sources": "inputs.message"})

    assert found.score == 0.0
    assert "is not JSON" in found.feedback


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"n": 1}', {"n": 1}),
        ('```json\n{"n": 1}\n```', {"n": 1}),
        ('Here it is:\n{"n": [1, 2]}\nThat is all.', {"n": [1, 2]}),
        ("12", 12),
    ],
)
def test_json_is_found_in_texts(text: str, value: Any) -> None:
    assert outputs.parsed(text) == value


@pytest.mark.parametrize("text", ["", "{", '{"n": }', "[" * 100_000, "x" * 500_000, '{"a": 1' + "0" * 400 + "}"])
def test_what_is_no_json_is_refused_with_a_reason(text: str) -> None:
    with pytest.raises(NoValue):
        outputs.parsed(text)


def test_a_condition_that_cannot_be_evaluated_has_failed() -> None:
    found = verify({"m": 1}, {"kind": "checks", "checks": [{"name": "n", "that": "output.n > 0"}]})

    assert found.passed is False
    assert "cannot be evaluated" in found.feedback


def test_values_must_occur_in_the_source() -> None:
    value = {"name": "ana ruiz", "item": "blue lamps", "count": 12, "price": 1200.5, "city": "Linz", "gift": False}
    found = {one.name: one.found for one in grounded(value, GroundingSources([ORDER]))}

    assert found == {"name": True, "item": True, "count": True, "price": True, "city": False}
    part = grounded({"name": "na Rui"}, GroundingSources([ORDER]))
    assert not part[0].found, "parts of words do not count"
    only = grounded({"a": {"b": "Linz"}, "c": ["Oslo"]}, GroundingSources([ORDER]), ignore=["a"])
    assert [one.name for one in only] == ["c.0"]


def test_numbers_names_and_quotes_of_a_text_must_occur() -> None:
    text = 'Ana Ruiz said "send twelve blue lamps" for 1200.50 euros and 7 cents, to Linz.'
    found = {one.name: one.found for one in grounded(text, GroundingSources([ORDER]))}

    assert found["name Ana Ruiz"]
    assert not found["name Linz"]
    assert found["number 1200.50"]
    assert not found["number 7"]
    assert [value for name, value in found.items() if name.startswith("quote")] == [True]


def test_a_sentence_needs_the_words_of_a_part_of_the_source() -> None:
    text = "Ana Ruiz wants twelve blue lamps. The lamps were broken by the postman. Ana had 6 lamps last year."
    found = [one.found for one in grounded(text, GroundingSources([ORDER]), ["sentences"])]

    assert found == [True, False, False]


@pytest.mark.parametrize(
    ("samples", "passed"),
    [(["42.", " 42", "41"], True), (["41", "42", "40"], False), ({"choices": [{"text": "42"}, {"text": "x"}]}, True)],
)
def test_samples_vote_on_an_output(samples: Sequence[str], passed: bool) -> None:
    vote = {"kind": "vote", "samples": "inputs.samples", "agree": 0.5}

    assert verify("42", vote, samples=samples).passed is passed


def test_a_vote_compares_single_fields() -> None:
    vote = {"kind": "vote", "samples": "inputs.samples", "fields": ["total"], "agree": 1.0}
    samples = [{"total": "7.0", "note": "a"}, {"total": 7}]

    assert verify({"total": 7, "note": "b"}, vote, samples=samples).passed
    assert not verify({"total": 8}, vote, samples=samples).passed
    assert not verify({"total": 8}, vote, samples=[]).passed, "no samples agree"


def test_sources_that_are_no_texts_are_the_fault_of_the_step() -> None:
    with pytest.raises(StepFailure, match="a text or a list of texts"):
        verify("x", {"kind": "grounding", "sources": "5"})
