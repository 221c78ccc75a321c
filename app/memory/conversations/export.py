"""Conversations as files: JSON Lines, which `append` reads again, and Markdown for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import StrEnum

from app.files.file import shown_id
from app.memory.conversations.conversation import CONVERSATION_PREFIX, StoredConversation
from app.memory.conversations.message import MESSAGE_PREFIX, StoredMessage


class ExportFormat(StrEnum):
    """The form of an exported conversation."""

    JSONL = "jsonl"
    MARKDOWN = "markdown"


def head(conversation: StoredConversation, form: ExportFormat) -> str:
    """Return what precedes the messages: a title in Markdown, nothing in JSON Lines."""
    if form is ExportFormat.JSONL:
        return ""
    id_ = shown_id(conversation.id, CONVERSATION_PREFIX)
    title = " ".join((conversation.title or id_).split())
    user = "" if conversation.user is None else f" with {' '.join(conversation.user.split())}"
    began = f"{conversation.created_at:%Y-%m-%d %H:%M} UTC"
    return f"# {title}\n\n{id_}{user}, since {began}\n"


def lines(messages: Sequence[StoredMessage], form: ExportFormat) -> str:
    """Return a part of the messages."""
    written = (_json(one) if form is ExportFormat.JSONL else _markdown(one) for one in messages)
    return "".join(written)


def document(message: StoredMessage) -> dict[str, object]:
    """A message in the form of chat completions, with what is known of its origin."""
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in message.calls
    ]
    found: dict[str, object] = {"role": message.role.value, "content": message.content}
    known = {
        "name": message.speaker,
        "tool_calls": calls or None,
        "tool_call_id": message.call_id,
        "model": message.model,
        "tokens": message.tokens,
        "run_id": None if message.run_id is None else str(message.run_id),
        "step": message.step_key,
    }
    found |= {name: value for name, value in known.items() if value is not None}
    place = {"id": shown_id(message.id, MESSAGE_PREFIX), "seq": message.seq}
    return {**found, **place, "created_at": message.created_at.isoformat()}


def _json(message: StoredMessage) -> str:
    return json.dumps(document(message), ensure_ascii=False) + "\n"


def _markdown(message: StoredMessage) -> str:
    speaker = message.role.value if message.speaker is None else f"{message.speaker} ({message.role.value})"
    model = "" if message.model is None else f", {message.model}"
    parts = [f"\n## {' '.join(speaker.split())}{model}, {message.created_at:%Y-%m-%d %H:%M}\n"]
    if message.content:
        parts.append(f"\n{message.content}\n")
    for call in message.calls:
        fence = "`" * max(3, _longest_run(call.arguments) + 1)
        parts.append(f"\nCalls `{call.name}`:\n\n{fence}json\n{call.arguments}\n{fence}\n")
    return "".join(parts)


def _longest_run(text: str) -> int:
    """The length of the longest run of backticks, so that a fence is longer."""
    longest = run = 0
    for character in text:
        run = run + 1 if character == "`" else 0
        longest = max(longest, run)
    return longest
