"""
What the models are asked about a cluster, and the workflow that asks.

Two passes state the pattern of a cluster independently: with different prompts, about different turns where there are
enough, and with different models where two are named. How near their answers are says how sure the pattern is. A model
that is asked whether a statement is right mostly agrees; one that has to state it itself cannot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from app.workflows.language import definition as definitions
from app.workflows.language.definition import Definition

#: The name of the workflow, and its steps.
WORKFLOW = "memory-consolidation"
FIRST, SECOND, VECTORS = "patterns", "reviews", "vectors"
#: Turns of a cluster that a pass sees, and characters of each.
SHOWN_TURNS, SHOWN_CHARACTERS = 8, 220
#: Most characters of a pattern, and tokens of an answer.
MAX_PATTERN, MAX_TOKENS = 160, 80
#: What takes the place of a pattern that a model does not see, where vectors are made.
NOTHING = "nothing in common"

#: The form of an answer.
ANSWER: Mapping[str, Any] = {
    "type": "object",
    "required": ["pattern"],
    "additionalProperties": False,
    "properties": {
        "pattern": {"anyOf": [{"type": "string", "minLength": 8, "maxLength": MAX_PATTERN}, {"type": "null"}]}
    },
}

#: The examples have different answers, because a small model repeats what it has seen last.
_FIRST_EXAMPLES = """\
Messages of a user, and the pattern in them: one sentence about what the user does, wants or asks again and again, in \
the words of the messages. Messages that have nothing in common: null.

Message: Can you translate this letter to French?
Message: Please translate the contract into French.
Message: I need the menu in French, translate it.
Answer: {"pattern": "The user wants texts translated into French."}

Message: What is the capital of Peru?
Message: My printer is out of paper.
Message: Thanks, see you!
Answer: {"pattern": null}

Message: My back hurts again after sitting all day.
Message: Sitting at the desk gives me back pain.
Message: Back pain again, I sat for nine hours.
Answer: {"pattern": "The user has back pain after sitting."}

"""
_SECOND_EXAMPLES = """\
Notes about a person. What do the notes have in common? One sentence, with the words of the notes; null if nothing.

- The train to Graz was late this morning
- late again, the train stood in Graz for an hour
- Why is the train to Graz always late?
Answer: {"pattern": "The user's train to Graz is late."}

- I bought a blue lamp
- How do I boil an egg?
- The meeting is over
Answer: {"pattern": null}

- We ran out of coffee beans on Monday
- no coffee beans left, it is Monday
- Monday: somebody order coffee beans
Answer: {"pattern": "The user runs out of coffee beans on Mondays."}

"""


def definition_of(model: str, review_model: str, embedding_model: str, max_parallel: int) -> Definition:
    """The workflow of a consolidation. It continues the examples, so base models can do it as well."""

    def of(step: str, name: str) -> dict[str, Any]:
        return {
            "id": step,
            "kind": "map",
            "over": f"inputs.{step}",
            "max_parallel": max_parallel,
            # A cluster that a model cannot answer takes no other with it.
            "on_error": "collect",
            "step": {
                "kind": "generate",
                "model": name,
                "chat": False,
                "prompt": f"{{{{ inputs.{step}_examples }}}}{{{{ item }}}}",
                "max_tokens": MAX_TOKENS,
                "on_length": "fail",
                "sampling": {"temperature": 0.0},
                "output": {"schema": ANSWER},
                "retry": {"max_attempts": 3},
            },
        }

    texts = (
        f"(steps.{FIRST}.output + steps.{SECOND}.output)"
        f'.map(a, a == null || a.pattern == null ? "{NOTHING}" : a.pattern)'
    )
    return definitions.from_document(
        {
            "workflow": WORKFLOW,
            "priority": "batch",
            "inputs": {
                f"{FIRST}_examples": {"type": "string"},
                f"{SECOND}_examples": {"type": "string"},
                FIRST: {"type": "array"},
                SECOND: {"type": "array"},
            },
            "steps": [
                of(FIRST, model),
                of(SECOND, review_model),
                {
                    "id": VECTORS,
                    "kind": "embed",
                    "needs": [FIRST, SECOND],
                    "model": embedding_model,
                    "texts": texts,
                    "retry": {"max_attempts": 5},
                },
            ],
            "outputs": {"clusters": f"size(inputs.{FIRST})"},
        }
    )


def inputs_of(clusters: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Return the inputs of the workflow for the texts of clusters, those nearest to the middle of each first."""
    return {
        f"{FIRST}_examples": _FIRST_EXAMPLES,
        f"{SECOND}_examples": _SECOND_EXAMPLES,
        FIRST: [first_prompt(_first_turns(texts)) for texts in clusters],
        SECOND: [second_prompt(_second_turns(texts)) for texts in clusters],
    }


def first_prompt(texts: Sequence[str]) -> str:
    """What follows the examples of the first pass."""
    return "".join(f"Message: {_line(text)}\n" for text in texts) + "Answer:"


def second_prompt(texts: Sequence[str]) -> str:
    """What follows the examples of the second pass."""
    return "".join(f"- {_line(text)}\n" for text in texts) + "Answer:"


def _first_turns(texts: Sequence[str]) -> list[str]:
    return list(texts[::2][:SHOWN_TURNS]) if len(texts) >= 2 * SHOWN_TURNS else list(texts[:SHOWN_TURNS])


def _second_turns(texts: Sequence[str]) -> list[str]:
    """Other turns than those of the first pass, as far as there are enough; else the same in the other order."""
    if len(texts) >= 2 * SHOWN_TURNS:
        return list(texts[1::2][:SHOWN_TURNS])
    return list(reversed(texts))[:SHOWN_TURNS]


def _line(text: str) -> str:
    return " ".join(text.split())[:SHOWN_CHARACTERS]
