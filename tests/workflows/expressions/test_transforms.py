"""Transforms: CEL and JMESPath over the data of a run; they are checked, limited, and return plain JSON."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from app.kernel.errors import FailureReason, StepFailure
from app.workflows.expressions import plain, transforms
from app.workflows.expressions.cel.values import MAX_WORK, Budget
from app.workflows.expressions.templates import Scope
from app.workflows.language.steps import TransformStep

SCOPE = Scope({"orders": {"type": "array"}, "n": {"type": "integer"}}, ("draft",), extra=("run",))
DATA: dict[str, Any] = {
    "inputs": {
        "n": 3,
        "orders": [
            {"id": 1, "who": "Ada", "total": 10.5, "tags": ["a", "b"]},
            {"id": 2, "who": "Bo", "total": 4, "tags": []},
            {"id": 3, "who": "Ada", "total": 1, "tags": ["b"]},
        ],
    },
    "steps": {"draft": {"output": {"z": None, "a": "ü"}, "state": "succeeded", "error": None}},
}


def of(**language: str) -> TransformStep:
    return TransformStep.model_validate({"id": "t", "kind": "transform", **language})


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("inputs.orders[?who == 'Ada'].id", [1, 3]),
        ("sort_by(inputs.orders, &total)[0].{who: who, id: id}", {"who": "Ada", "id": 3}),
        ("sum(inputs.orders[].total)", 15.5),
        ("inputs.orders[].tags[]", ["a", "b", "b"]),
        ("join(', ', inputs.orders[?total > `2`].who)", "Ada, Bo"),
        ("inputs.orders[-1].tags | [0]", "b"),
        ("{n: inputs.n, draft: steps.draft.output}", {"n": 3, "draft": {"z": None, "a": "ü"}}),
        ("inputs.orders[?contains(tags, 'b')] | length(@)", 2),
        ("inputs.orders[0].nothing", None),
    ],
)
def test_jmespath_values(expression: str, value: Any) -> None:
    assert transforms.check_jmespath(expression, "steps[0].jmespath", SCOPE) == []
    assert evaluated(of(jmespath=expression), DATA) == value


def test_cel_keeps_the_written_order_of_keys() -> None:
    made = evaluated(of(cel="{'who': inputs.orders.map(o, o.who), 'draft': steps.draft.output}"), DATA)

    assert made == {"who": ["Ada", "Bo", "Ada"], "draft": {"z": None, "a": "ü"}}
    assert [*made, *made["draft"]] == ["who", "draft", "z", "a"]


@pytest.mark.parametrize(
    ("expression", "message", "accepted"),
    [
        ("", "ends too early", ""),
        ("inputs.orders[", "ends too early", ""),
        ("inputs..orders", "character 8 of the expression: '.' is not expected here", ""),
        ("inputs.orders[?who='Ada']", "character 19 of the expression: '=' is not expected here", ""),
        ("orders[0]", "'orders' is not defined here", "inputs.orders"),
        ("inputs.order[0]", "'inputs.order' is not an input", "inputs.orders"),
        ("{a: steps.final.output}", "'steps.final' is not a step that this one needs", "steps.draft.output"),
        ("steps.draft.result", "a step has no 'result'", "steps.draft.output"),
        ("inputs.n == `3` && run.status", "'run' has no 'status'", "run.state"),
        ("lenght(inputs.orders)", "no function 'lenght'", "did you mean 'length'?"),
        ("length(inputs.orders, inputs.n)", "length() has 2 arguments", "1"),
        ("[" * 3000 + "inputs" + "]" * 3000, "nested too deep", ""),
        ("inputs" + ".n" * 20_000, "longer than", ""),
    ],
)
def test_invalid_jmespath_is_found_at_submission(expression: str, message: str, accepted: str) -> None:
    found = transforms.check_jmespath(expression, "steps[0].jmespath", SCOPE)

    assert len(found) == 1, found
    assert found[0].where == "steps[0].jmespath"
    assert message in found[0].message
    assert accepted in found[0].accepted


@pytest.mark.parametrize("expression", ["inputs.orders[?nobody == 'x'].foo", "map(&foo, inputs.orders)", "@", "*.*"])
def test_names_that_cannot_be_checked_are_accepted(expression: str) -> None:
    assert transforms.check_jmespath(expression, "steps[0].jmespath", SCOPE) == []


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("length(inputs.n)", "length() takes string or array or object, not number"),
        ("inputs.orders[?who > `1`]", "not supported between"),
        ("inputs.orders[::0]", "slice step cannot be zero"),
        ("to_number('1e999')", "infinity"),
        ("`123456789012345678901234567890`", "beyond 64 bits"),
        ("&who", "which JSON cannot represent"),
        ("inputs.orders[?", "ends too early"),
    ],
)
def test_a_failed_evaluation_fails_the_step_with_the_reason(expression: str, message: str) -> None:
    with pytest.raises(StepFailure) as caught:
        evaluated(of(jmespath=expression), DATA)

    assert caught.value.reason is FailureReason.TEMPLATE_ERROR
    assert f"`{expression}` cannot be evaluated" in caught.value.message
    assert message in caught.value.message


FOUR = "[@, @, @, @]"


@pytest.mark.parametrize(
    "expression",
    [
        " | ".join([FOUR] * 20),
        " | ".join([f"{FOUR}[]"] * 20),
        " | ".join([*[FOUR] * 20, "to_string(@)"]),
        " | ".join([*[FOUR] * 20, "@ == @"]),
        " | ".join([*[FOUR] * 20, "contains([@], @)"]),
        " | ".join(["inputs.text", *["join('', [@, @, @, @])"] * 20]),
        "join(inputs.text, inputs.texts)",
        "inputs.texts[*].[" + ", ".join(["@"] * 30) + "][] | [*].[" + ", ".join(["@"] * 30) + "][]",
    ],
)
def test_work_and_memory_are_limited(expression: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without limits, each would run for hours or exhaust the memory. A small budget reaches the limit sooner."""
    monkeypatch.setattr(transforms, "Budget", partial(Budget, MAX_WORK // 10))
    data = {"inputs": {"text": "x" * 50_000, "texts": ["y"] * 1_000}, "steps": {}}
    with pytest.raises(StepFailure, match=r"units of work|longer than \d+ characters"):
        evaluated(of(jmespath=expression), data)


@pytest.mark.parametrize("language", ["cel", "jmespath"])
def test_the_result_limit_applies_to_values_passed_through(language: str) -> None:
    data = {"inputs": {"text": "x" * (plain.MAX_RESULT + 1)}, "steps": {}}
    with pytest.raises(StepFailure, match=f"longer than {plain.MAX_RESULT} characters"):
        evaluated(of(**{language: "inputs.text"}), data)


def evaluated(step: TransformStep, data: dict[str, Any]) -> Any:
    return transforms.evaluate(data, cel=step.cel, jmespath=step.jmespath)
