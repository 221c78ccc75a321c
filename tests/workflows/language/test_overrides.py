"""Other models for the steps of a definition."""

from __future__ import annotations

from typing import Any

import pytest

from app.kernel.errors import InvalidInput
from app.workflows.language import source
from app.workflows.language.overrides import with_models

FLOW = """
workflow: flow
defaults: {model: m:1}
steps:
  - {id: say, kind: generate, prompt: hi}
  - {id: each, kind: map, over: '[1]', step: {kind: embed, model: e:1, texts: item}}
  - {id: shape, kind: transform, expression: '1'}
on_failure:
  - {id: sorry, kind: generate, model: m:2, prompt: sorry}
"""


def models(given: dict[str, str], text: str = FLOW) -> dict[str, Any]:
    data = with_models(source.read(text), given).data
    steps = [*data.get("steps", ()), *data.get("on_failure", ())]
    return {step["id"]: (step.get("step") or step).get("model") for step in steps}


def test_a_model_replaces_those_of_all_steps_or_of_one() -> None:
    assert models({}) == {"say": None, "each": "e:1", "shape": None, "sorry": "m:2"}
    assert models({"*": "x:1"}) == {"say": "x:1", "each": "x:1", "shape": None, "sorry": "x:1"}
    assert models({"*": "x:1", "each": "y:1"}) == {"say": "x:1", "each": "y:1", "shape": None, "sorry": "x:1"}
    assert models({"sorry": "y:1"}) == {"say": None, "each": "e:1", "shape": None, "sorry": "y:1"}


def test_the_document_itself_does_not_change_and_lines_stay() -> None:
    document = source.read(FLOW)
    changed = with_models(document, {"say": "x:1"})
    assert "model" not in document.data["steps"][0]
    assert changed.line("steps[1].step.texts") == document.line("steps[1].step.texts") == 6


@pytest.mark.parametrize(
    ("given", "text", "message"),
    [
        ({"nope": "x:1"}, FLOW, r"models\.nope: no step 'nope' uses a model; accepted: say, each, sorry, \* \(all"),
        ({"shape": "x:1"}, FLOW, r"models\.shape: no step 'shape' uses a model"),
        (
            {"*": "x:1"},
            "workflow: f\nsteps: [{id: a, kind: noop}]",
            r"models\.\*: no step of the workflow uses a model",
        ),
        ({"a": "x:1"}, "[1, 2]", "no step of the workflow uses a model"),
        ({"a": "x:1"}, "{steps: {a: 1}, on_failure: [1, {id: [1]}, {id: a, kind: map, step: 3}]}", "no step of"),
    ],
)
def test_an_override_that_has_no_effect_is_refused(given: dict[str, str], text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        with_models(source.read(text), given)
