"""
The run of a candidate: its workflow, which also makes what the comparison needs.

The judge sees the texts as A and B in both orders, because models prefer one place whatever it holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from app.workflows.language import definition as definitions
from app.workflows.language.definition import Definition

#: The name of the workflow, and its steps.
WORKFLOW = "shadow"
ANSWER, VECTORS, FIRST, SECOND = "answer", "vectors", "first", "second"
#: Labels of its run: the name of the shadow, and the run that was done again.
SHADOW_LABEL, SOURCE_LABEL = "shadow", "shadow_of"
#: Most characters of a text that a judge sees.
_SHOWN = 6_000

_PREFERENCE: Mapping[str, Any] = {
    "type": "object",
    "required": ["better"],
    "additionalProperties": False,
    "properties": {"better": {"enum": ["A", "B", "tie"]}},
}
_QUESTION = """\
Two answers to the same request. Which one is better? Criteria: {{{{ inputs.criteria }}}}

Request:
{{{{ inputs.question }}}}

Answer A:
{{{{ {a} }}}}

Answer B:
{{{{ {b} }}}}

Reply with "A", "B", or "tie" when neither is better."""
_OF_CANDIDATE = {
    "calls": "steps.answer.output.choices[0].message.content",
    "runs": "steps.answer.output",
}


@lru_cache(maxsize=256)
def definition_of_call(model: str, similarity: str | None, judge: str | None) -> Definition:
    """The workflow that does a call again."""
    answer = {"id": ANSWER, "kind": "openai", "model": model, "request": "inputs.request", "retry": {"max_attempts": 1}}
    return _definition(answer, "calls", similarity, judge)


@lru_cache(maxsize=256)
def definition_of_run(
    workflow: str, version: int, inputs: tuple[str, ...], similarity: str | None, judge: str | None
) -> Definition:
    """The workflow that does a run with these inputs again, with a version of its workflow."""
    answer = {
        "id": ANSWER,
        "kind": "workflow",
        "workflow": workflow,
        "version": version,
        "inputs": {name: f"inputs.request[{name!r}]" for name in inputs},
    }
    return _definition(answer, "runs", similarity, judge)


def _definition(answer: dict[str, Any], kind: str, similarity: str | None, judge: str | None) -> Definition:
    steps = [answer]
    if similarity is not None:
        # A model can answer with nothing but calls of tools.
        text = f"string({_OF_CANDIDATE[kind]})"
        if kind == "calls":
            text = f'{_OF_CANDIDATE[kind]} == null ? " " : {_OF_CANDIDATE[kind]} + " "'
        texts = f'[inputs.text + " ", {text}]'
        steps.append({"id": VECTORS, "kind": "embed", "model": similarity, "texts": texts, "needs": [ANSWER]})
    if judge is not None:
        shown = f"({_OF_CANDIDATE[kind]} or '') | string | truncate({_SHOWN}, true, '…')"
        own = f"inputs.text | truncate({_SHOWN}, true, '…')"
        for name, a, b in ((FIRST, own, shown), (SECOND, shown, own)):
            steps.append(
                {
                    "id": name,
                    "kind": "generate",
                    "model": judge,
                    "prompt": _QUESTION.format(a=a, b=b),
                    "max_tokens": 16,
                    "sampling": {"temperature": 0.0},
                    "output": {"schema": _PREFERENCE},
                    "needs": [ANSWER],
                }
            )
    return definitions.from_document(
        {
            "workflow": WORKFLOW,
            "priority": "batch",
            "inputs": {
                "request": {"type": "object"},
                "created": {"type": "integer"},
                "text": {"type": "string"},
                "question": {"type": "string"},
                "criteria": {"type": "string"},
            },
            "steps": steps,
        }
    )
