"""The comparison of pairs, and what many of them say."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest

from app.inference.shadows import comparison, definition, pairing
from app.inference.shadows.comparison import JudgePreference, PairMetric, PairSide
from app.inference.splits.evidence import SplitVerdict
from app.kernel.errors import InvalidInput

SCHEMA = {"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}}
FORM = {"response_format": {"type": "json_schema", "json_schema": {"name": "c", "schema": SCHEMA}}}


def side(text: str = "abcd", **more: Any) -> PairSide:
    values: dict[str, Any] = {
        "tools": [],
        "tokens_in": 10,
        "tokens_out": 4,
        "seconds": 1.0,
        "first_token": 0.1,
        "cost": None,
        "score": None,
        "finish": "stop",
    }
    return PairSide(text, **{**values, **more})


def test_ratios_of_what_both_have() -> None:
    found = comparison.compared(side(), side("abcdefgh", tokens_out=8, seconds=0.5, cost=1.0), {}, None)

    assert found == {
        PairMetric.ERROR: 0.0,
        PairMetric.LENGTH: pytest.approx(math.log(2)),
        PairMetric.TOKENS_OUT: pytest.approx(math.log(2)),
        PairMetric.SECONDS: pytest.approx(-math.log(2)),
        PairMetric.FIRST_TOKEN: 0.0,
    }
    assert comparison.compared(side(), None, {}, None) == {PairMetric.ERROR: 1.0}


@pytest.mark.parametrize(
    ("text", "request_", "valid"),
    [
        ('{"city": "Graz"}', FORM, True),
        ('{"town": "Graz"}', FORM, False),
        ("Graz", FORM, False),
        ("[" * 100_000, FORM, False),
        ("{}", {"response_format": {"type": "json_object"}}, True),
        ("[]", {"response_format": {"type": "json_object"}}, False),
        ("x", {}, None),
        ("x", {"response_format": "json"}, None),
        ("{}", {"response_format": {"type": "json_schema", "json_schema": 7}}, True),
    ],
)
def test_the_form_that_a_request_asks_for(text: str, request_: Any, valid: bool | None) -> None:
    assert comparison.is_valid(text, request_) is valid


def test_tools_are_compared_by_their_arguments() -> None:
    def call(arguments: str) -> list[tuple[str, str]]:
        function = {"name": "weather", "arguments": arguments}
        document = {"choices": [{"message": {"content": None, "tool_calls": [{"function": function}]}}]}
        text, tools, _ = comparison.side_of_answer(document)
        assert text == ""
        return tools

    one, same = call('{"city": "Graz", "days": 2}'), call('{"days":2,"city":"Graz"}')
    assert one == same
    assert comparison.compared(side(tools=one), side(tools=same), {}, None)[PairMetric.SAME_TOOLS] == 0
    assert comparison.compared(side(tools=one), side(), {}, None)[PairMetric.SAME_TOOLS] == -1
    assert call("{broken") == [("weather", "{broken")]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("A", "B", JudgePreference.ORIGINAL),
        ("B", "A", JudgePreference.CANDIDATE),
        ("A", "A", JudgePreference.POSITION_A),
        ("B", "B", JudgePreference.POSITION_B),
        ("tie", "tie", JudgePreference.TIE),
        ("tie", "A", JudgePreference.UNSURE),
        ("A", None, None),
    ],
)
def test_a_preference_holds_in_both_orders(
    first: str | None, second: str | None, expected: JudgePreference | None
) -> None:
    assert comparison.preference(first, second) is expected


def test_similarity_is_the_cosine() -> None:
    assert comparison.cosine([[1.0, 0.0], [1.0, 0.0]]) == pytest.approx(1.0)
    assert comparison.cosine([[1.0, 0.0], [0.0, 2.0]]) == 0.0
    assert comparison.cosine([[0.0], [1.0]]) is None
    assert comparison.cosine(None) is None


@pytest.mark.parametrize(
    ("wins", "losses", "expected"),
    [(0.5, 0.2, SplitVerdict.BETTER), (0.2, 0.5, SplitVerdict.WORSE), (0.3, 0.3, SplitVerdict.EQUAL)],
)
def test_verdicts_of_judged_pairs_are_right(wins: float, losses: float, expected: SplitVerdict) -> None:
    """A look after every 100 pairs, until there is a verdict."""

    def first(seed: int) -> SplitVerdict:
        chance, pairs = random.Random(seed), list[dict[str, float]]()
        for at in range(1, 3_001):
            drawn = chance.random()
            pairs.append({PairMetric.JUDGE: 1.0 if drawn < wins else -1.0 if drawn < wins + losses else 0.0})
            if at % 100 == 0:
                (found,) = comparison.evidence_of(pairs, 0.15, 0.05)
                if found.verdict is not SplitVerdict.UNDECIDED:
                    return found.verdict
        return SplitVerdict.UNDECIDED

    assert [first(seed) for seed in range(40)].count(expected) >= 38


def test_relative_metrics_are_shown_as_parts() -> None:
    (found,) = comparison.evidence_of([{PairMetric.SECONDS: math.log(2)}] * 30, 0.1, 0.05)

    assert (found.metric, found.difference) == (PairMetric.SECONDS, pytest.approx(1.0))
    assert found.verdict is SplitVerdict.WORSE
    (few,) = comparison.evidence_of([{PairMetric.SECONDS: 0.1}], 0.1, 0.05)
    assert (few.low, few.verdict) == (None, SplitVerdict.UNDECIDED)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"candidate": {}}, "candidate"),
        ({"candidate": {"name": "x", "model": "m"}}, ""),
        ({"candidate": {"set": {"messages": []}}}, "candidate.set.messages"),
        ({"model": None}, "model"),
        ({"share": 0}, "share"),
        ({"model": None, "workflow": "w", "candidate": {"version": 1, "models": {"*": "m"}}}, "candidate.models"),
        ({"compare": {"judge_share": 2}}, "compare.judge_share"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], field: str) -> None:
    plain = {"shadow": "s", "model": "smollm2:135m", "candidate": {"model": "gemma3:270m"}}
    if not field:
        assert definition.parse({**plain, **change}).tried.name == definition.CANDIDATE
        return
    with pytest.raises(InvalidInput) as caught:
        definition.parse({**plain, **change})
    assert caught.value.problems[0].where == field


def test_the_workflows_of_candidates_are_valid() -> None:
    call = pairing.definition_of_call("smollm2:135m", "all-minilm:33m", "gemma3:270m")
    run = pairing.definition_of_run("report", 2, ("text", "it's"), None, None)

    assert [step.id for step in call.all_steps()] == ["answer", "vectors", "first", "second"]
    assert json.loads(json.dumps(run.document()))["steps"][0]["version"] == 2
