"""
The prompt of an extraction, the form of its answer, and how the answer is read.

The model sees messages and known memories by small numbers, never by ids: it cannot invent an id, and a wrong number is
found by the gate. A grammar forces the form of the answer. The messages are an input of the run and no part of its
definition, which is the same for all extractions by a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from app.memory.memories.gate import GateMessage, KnownMemory, ProposedMemory
from app.memory.memories.kinds import MemoryKind
from app.workflows.language import definition as definitions
from app.workflows.language.definition import Definition

#: The name of the workflow of extractions, and of its only step.
WORKFLOW, STEP = "memory-extraction", "memories"
#: Characters of the new messages of one extraction: with all else they fit a context of 2,048 tokens.
WINDOW_CHARACTERS = 2_400
#: Characters of a message that an extraction has read before and sees again, as context.
CONTEXT_CHARACTERS = 300
#: Known memories that the model sees, and characters of each.
MAX_KNOWN, KNOWN_CHARACTERS = 6, 140
#: Most memories of one extraction, and most characters of one.
MAX_MEMORIES, MAX_MEMORY = 6, 200
#: Tokens of the answer.
MAX_TOKENS = 500

_INSTRUCTION = """\
Find what is worth remembering about the user in a conversation. Write each memory as one short sentence in the third \
person, with the words of the messages. Copy names and numbers exactly. Leave out small talk, questions and what is \
known. If nothing is worth remembering, the list is empty.
kinds: fact, preference, decision, breakthrough (an insight that changed the work), pattern (what happens again).
replaces: the number of a known memory that is no longer true, or null.

Known:
0. The user works at Acme.
Conversation:
1. user: Hi! I left Acme and started at Globex in May.
2. assistant: Congratulations!
3. user: Thanks. I never drink coffee, tea is fine.
Memories: {"memories": [{"messages": [1], "text": "The user started at Globex in May.", "kind": "fact", \
"replaces": 0, "importance": 4}, {"messages": [3], "text": "The user never drinks coffee.", "kind": "preference", \
"replaces": null, "importance": 3}]}

Known:
Conversation:
1. user: Can you tell me the time?
2. assistant: I have no clock.
Memories: {"memories": []}

"""

#: The form of the answer.
ANSWER: Mapping[str, Any] = {
    "type": "object",
    "required": ["memories"],
    "additionalProperties": False,
    "properties": {
        "memories": {
            "type": "array",
            "maxItems": MAX_MEMORIES,
            "items": {
                "type": "object",
                "required": ["messages", "text", "kind", "replaces", "importance"],
                "additionalProperties": False,
                "properties": {
                    "messages": {
                        "type": "array",
                        "minItems": 1,
                        "maxItems": 3,
                        "items": {"type": "integer", "minimum": 1, "maximum": 99},
                    },
                    "text": {"type": "string", "minLength": 8, "maxLength": MAX_MEMORY},
                    "kind": {"enum": [kind.value for kind in MemoryKind]},
                    "replaces": {"enum": [None, *range(MAX_KNOWN)]},
                    "importance": {"type": "integer", "minimum": 1, "maximum": 5},
                },
            },
        }
    },
}


def definition_of(model: str, *, is_chat: bool) -> Definition:
    """The workflow of extractions by a model. A base model continues the prompt, without a chat template."""
    return definitions.from_document(
        {
            "workflow": WORKFLOW,
            "priority": "batch",
            "inputs": {"prompt": {"type": "string"}, "messages": {"type": "array"}, "known": {"type": "array"}},
            "steps": [
                {
                    "id": STEP,
                    "kind": "generate",
                    "model": model,
                    "chat": is_chat,
                    "prompt": "{{ inputs.prompt }}",
                    "max_tokens": MAX_TOKENS,
                    "on_length": "fail",
                    "sampling": {"temperature": 0.0},
                    "output": {"schema": ANSWER},
                    "retry": {"max_attempts": 2},
                }
            ],
            "outputs": {"memories": f"steps.{STEP}.output.memories"},
        }
    )


def prompt_of(messages: Sequence[GateMessage], known: Sequence[KnownMemory]) -> str:
    """Return the prompt for messages, with the known memories that have a number."""
    lines = ["Known:"]
    lines += (f"{one.number}. {_line(one.text)[:KNOWN_CHARACTERS]}" for one in known if one.number >= 0)
    lines.append("Conversation:")
    for message in messages:
        who = f"{message.role} ({message.speaker})" if message.speaker else message.role
        lines.append(f"{message.number}. {who}: {_line(message.content)}")
    return _INSTRUCTION + "\n".join(lines) + "\nMemories:"


def proposals(answer: Any) -> list[ProposedMemory]:
    """Return the memories of an answer, which has the form `ANSWER` or is that list of memories itself."""
    found = answer.get("memories") if isinstance(answer, dict) else answer
    return [
        ProposedMemory(
            one["text"].strip(),
            MemoryKind(one["kind"]),
            tuple(one["messages"]),
            one["replaces"],
            (one["importance"] - 1) / 4,
        )
        for one in found or []
    ]


def _line(text: str) -> str:
    return " ".join(text.split())
