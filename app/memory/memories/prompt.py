"""
The prompts of an extraction, the form of their answers, and how the answers are read.

A small model is asked about a sentence or two of one user at a time, after examples that are the same for all: it then
copies less of the examples, and the pool computes them once. It sees known memories by small numbers, never by ids:
it cannot invent an id, and a wrong number is found by the gate. A grammar forces the form of the answer.
The texts are inputs of the run and no part of its definition, which is the same for all extractions by a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.memory.compression import texts
from app.memory.memories import gate
from app.memory.memories.gate import GateMessage, KnownMemory, ProposedMemory
from app.memory.memories.kinds import MemoryKind
from app.workflows.language import definition as definitions
from app.workflows.language.definition import Definition

#: The name of the workflow of extractions, and of its only step.
WORKFLOW, STEP = "memory-extraction", "memories"
#: Characters of the new messages of one extraction.
WINDOW_CHARACTERS = 4_000
#: Characters of a message that an extraction has read before and sees again, as context.
CONTEXT_CHARACTERS = 300
#: Characters that the model is asked about at once, in whole sentences, and of a question that they answer.
PIECE_CHARACTERS, QUESTION_CHARACTERS = 200, 160
#: A message with at most so many words may be the answer to a question before it.
ANSWER_WORDS = 6
#: Known memories that the model sees, and characters of each.
MAX_KNOWN, KNOWN_CHARACTERS = 6, 140
#: Most characters of a memory, and tokens of an answer.
MAX_MEMORY, MAX_TOKENS = 200, 120
#: Roles whose messages are read; what only the assistant said is nobody's memory.
READ_ROLES = frozenset({"user"})
_IMPORTANCE = {MemoryKind.BREAKTHROUGH: 0.9, MemoryKind.DECISION: 0.7}

#: The examples have different answers, because a small model repeats what it has seen last.
_EXAMPLES = """\
What a user writes, and what to remember of it: one sentence about the user, with the same names and numbers. \
Small talk, thanks and questions: null. "replaces" is the number of a known memory that is no longer true.

Message: Hello, how is it going?
Answer: {"memory": null}
Message: My brother Tom works at Acme in Berlin.
Answer: {"memory": "The user's brother Tom works at Acme in Berlin.", "kind": "fact", "replaces": null}
Message: What is a semaphore?
Answer: {"memory": null}
Message: I don't drink coffee at all.
Answer: {"memory": "The user does not drink coffee at all.", "kind": "preference", "replaces": null}
Known 0: The user's cat is called Minka.
Known 1: The user drives a Volvo.
Message: I sold the Volvo, I drive a Fiat now.
Answer: {"memory": "The user drives a Fiat now.", "kind": "fact", "replaces": 1}
Message: Great, thank you!
Answer: {"memory": null}
Message: We agreed to deploy with Ansible from now on.
Answer: {"memory": "They agreed to deploy with Ansible from now on.", "kind": "decision", "replaces": null}
Message: Can you make a table of it?
Answer: {"memory": null}
Asked: Which sport do you like?
Message: Tennis, most of all.
Answer: {"memory": "The user likes tennis most of all.", "kind": "preference", "replaces": null}
Message: Every Friday I visit my aunt.
Answer: {"memory": "Every Friday the user visits their aunt.", "kind": "pattern", "replaces": null}
Message: The fix that saved us: moving the index to memory halved the time.
Answer: {"memory": "Moving the index to memory halved the time.", "kind": "breakthrough", "replaces": null}
"""

#: The form of an answer.
ANSWER: Mapping[str, Any] = {
    "anyOf": [
        {
            "type": "object",
            "required": ["memory", "kind", "replaces"],
            "additionalProperties": False,
            "properties": {
                "memory": {"type": "string", "minLength": 8, "maxLength": MAX_MEMORY},
                "kind": {"enum": [kind.value for kind in MemoryKind]},
                "replaces": {"enum": [None, *range(MAX_KNOWN)]},
            },
        },
        {
            "type": "object",
            "required": ["memory"],
            "additionalProperties": False,
            "properties": {"memory": {"type": "null"}},
        },
    ]
}


@dataclass(frozen=True, slots=True)
class ExtractionPiece:
    """A part of a message that the model is asked about."""

    #: The number of the message.
    message: int
    text: str
    #: The question before it, if it may be the answer to one.
    asked: str = ""


def definition_of(model: str) -> Definition:
    """The workflow of extractions by a model. It continues the examples, so base models can do it as well."""
    return definitions.from_document(
        {
            "workflow": WORKFLOW,
            "priority": "batch",
            "inputs": {
                "examples": {"type": "string"},
                "pieces": {"type": "array"},
                "numbers": {"type": "array"},
                "messages": {"type": "array"},
                "known": {"type": "array"},
            },
            "steps": [
                {
                    "id": STEP,
                    "kind": "map",
                    "over": "inputs.pieces",
                    "max_parallel": 8,
                    # One sentence that a model cannot answer takes no other with it.
                    "on_error": "collect",
                    "step": {
                        "kind": "generate",
                        "model": model,
                        "chat": False,
                        "prompt": "{{ inputs.examples }}{{ item }}",
                        "max_tokens": MAX_TOKENS,
                        "on_length": "fail",
                        "sampling": {"temperature": 0.0},
                        "output": {"schema": ANSWER},
                        "retry": {"max_attempts": 2},
                    },
                }
            ],
            "outputs": {"asked": "size(inputs.pieces)"},
        }
    )


def examples() -> str:
    """Return what comes before each piece."""
    return _EXAMPLES


def pieces_of(messages: Sequence[GateMessage], new: Sequence[int]) -> list[ExtractionPiece]:
    """Return what the model is asked about: the sentences of those messages, by number, whose roles are read."""
    found: list[ExtractionPiece] = []
    before = ""
    for message in messages:
        if message.number in new and message.role in READ_ROLES:
            short = len(texts.words(message.content)) <= ANSWER_WORDS
            asked = before if short and before.endswith("?") else ""
            found += (ExtractionPiece(message.number, part, asked) for part in _parts(message.content))
        before = _line(message.content)[-QUESTION_CHARACTERS:] if message.role == "assistant" else ""
    return found


def prompt_of(piece: ExtractionPiece, known: Sequence[KnownMemory]) -> str:
    """Return what follows the examples: a piece, and the known memories that have to do with it."""
    about = gate.content_words(piece.text) | gate.frame_words(piece.text)
    lines = [
        f"Known {one.number}: {_line(one.text)[:KNOWN_CHARACTERS]}"
        for one in known
        if about & (gate.content_words(one.text) | gate.frame_words(one.text))
    ]
    if piece.asked:
        lines.append(f"Asked: {piece.asked}")
    return "\n".join([*lines, f"Message: {piece.text}", "Answer:"])


def proposals(answers: Sequence[Any], numbers: Sequence[int]) -> list[ProposedMemory]:
    """Return the memories of answers, each of which is about the message of that number; None is no answer."""
    found = []
    for answer, number in zip(answers, numbers, strict=True):
        if answer is not None and answer["memory"] is not None:
            kind = MemoryKind(answer["kind"])
            importance = _IMPORTANCE.get(kind, 0.5)
            found.append(ProposedMemory(answer["memory"].strip(), kind, (number,), answer["replaces"], importance))
    return found


def _parts(text: str) -> list[str]:
    """The sentences of a text, short ones together."""
    found: list[str] = []
    for place in texts.sentences(text):
        part = _line(text[place.start : place.end])
        while part:
            head, part = part[:PIECE_CHARACTERS], part[PIECE_CHARACTERS:]
            found.append(head)
    return found


def _line(text: str) -> str:
    return " ".join(text.split())
