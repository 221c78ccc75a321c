"""
The input and the output of a compression as plain data: a text, or messages in the form of chat completions.

Everything is checked, and bounded, before anything is computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from app.memory.compression.conversation import Turn
from app.memory.compression.report import Compressed

#: Most characters of an input, and most messages.
MAX_CHARACTERS, MAX_MESSAGES = 2 * 1024 * 1024, 10_000
#: Most characters of a role, a speaker or a time.
_MAX_NAME = 200
_PINNED_ROLES = frozenset({"system", "developer"})


class UnusableInput(ValueError):
    """The input is neither a text nor a list of messages, or too long; the message has its path."""


@dataclass(frozen=True, slots=True)
class Given:
    """An input, and what earlier phases of its compression have found."""

    turns: Sequence[Turn]
    #: Whether it is a text.
    is_text: bool
    #: The document, without the findings.
    document: Any
    #: The vectors of the passages and of the query.
    vectors: Sequence[Sequence[float]] | None = None
    query_vector: Sequence[float] | None = None
    #: The similarity of each passage to the query.
    scores: Sequence[float] | None = None
    #: The text of the summary; None before one was made. Empty if it could not be made.
    summary: str | None = None


def given(value: Any, keep_recent: int) -> Given:
    """Return the input of a document. Raises UnusableInput."""
    if isinstance(value, str):
        _require_length(len(value))
        return Given([Turn(value)], True, value)
    if isinstance(value, list):
        return Given(_turns(value, keep_recent), False, value)
    if isinstance(value, dict) and "of" in value:
        inner = given(value["of"], keep_recent)
        summary = value.get("summary")
        return replace(
            inner,
            vectors=value.get("vectors"),
            query_vector=value.get("query_vector"),
            scores=value.get("scores"),
            summary=summary if summary is None or isinstance(summary, str) else "",
        )
    raise UnusableInput("the input is neither a text nor a list of messages, objects with 'role' and 'content'")


def _turns(value: Sequence[Any], keep_recent: int) -> list[Turn]:
    if len(value) > MAX_MESSAGES:
        raise UnusableInput(f"the input has {len(value)} messages; at most {MAX_MESSAGES} are accepted")
    turns: list[Turn] = []
    characters = calls = 0
    for number, message in enumerate(value):
        if not isinstance(message, dict):
            raise UnusableInput(f"[{number}] is no message: an object with 'role' and 'content' is required")
        content = message.get("content")
        has_calls = bool(message.get("tool_calls"))
        if not isinstance(content, str) and not (content is None and has_calls):
            raise UnusableInput(f"[{number}].content is no text; parts such as images cannot be compressed")
        role, speaker, at = (_name(message, number, *keys) for keys in (("role",), ("speaker", "name"), ("at",)))
        characters += len(content or "")
        _require_length(characters)
        calls += has_calls
        bundle = calls if has_calls or (role == "tool" and calls) else None
        pinned = role in _PINNED_ROLES or number >= len(value) - keep_recent
        turns.append(Turn(content or "", role, speaker, at, message, bundle, pinned))
    # A call and its results stay or go together.
    kept = {turn.bundle for turn in turns if turn.pinned and turn.bundle is not None}
    return [replace(turn, pinned=True) if turn.bundle in kept else turn for turn in turns]


def result(of: Given, done: Compressed, summary: str = "") -> Any:
    """Return the compressed text, or the compressed messages in their order with their other fields."""
    if of.is_text:
        text = "".join(done.contents)
        return f"{summary}\n\n{text}" if summary else text
    kept_bundles = {
        turn.bundle
        for turn, content in zip(of.turns, done.contents, strict=True)
        if turn.bundle is not None and content
    }
    messages: list[Mapping[str, Any]] = []
    said = not summary
    for turn, content in zip(of.turns, done.contents, strict=True):
        if not content and turn.content and not said:
            messages.append({"role": "system", "content": summary})
            said = True
        if content or turn.pinned or turn.bundle in kept_bundles:
            messages.append(
                {**turn.fields, "content": turn.fields.get("content") if content == turn.content else content}
            )
    return messages if said else [{"role": "system", "content": summary}, *messages]


def _name(message: Mapping[str, Any], number: int, *keys: str) -> str:
    value = next((message[key] for key in keys if message.get(key) is not None), "")
    if not isinstance(value, str) or len(value) > _MAX_NAME:
        raise UnusableInput(f"[{number}].{keys[0]} is no text of at most {_MAX_NAME} characters")
    return value


def _require_length(characters: int) -> None:
    if characters > MAX_CHARACTERS:
        raise UnusableInput(f"the input has more than {MAX_CHARACTERS} characters")
