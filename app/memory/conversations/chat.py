"""Stored messages in the form of chat templates."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Literal

from app.inference.requests import ChatMessage, ToolCall
from app.memory.conversations.message import MessageRole, StoredCall, StoredMessage

_ROLES: dict[MessageRole, Literal["system", "user", "assistant", "tool"]] = {
    MessageRole.SYSTEM: "system",
    MessageRole.DEVELOPER: "system",
    MessageRole.USER: "user",
    MessageRole.ASSISTANT: "assistant",
    MessageRole.TOOL: "tool",
}


def chat_messages(messages: Iterable[StoredMessage]) -> list[ChatMessage]:
    """
    Return the messages for a chat template.

    Calls that follow each other, and the text before them, are one message, as chat templates expect.
    """
    found: list[ChatMessage] = []
    for message in messages:
        calls = tuple(ToolCall(call.name, _arguments(call), call.arguments) for call in message.calls)
        last = found[-1] if found else None
        role = _ROLES[message.role]
        if last is not None and last.role == role == "assistant" and not message.content:
            found[-1] = ChatMessage(role, last.content, (*last.tool_calls, *calls))
        else:
            found.append(ChatMessage(role, message.content, calls))
    return found


def _arguments(call: StoredCall) -> dict[str, Any]:
    """The arguments of a call; none where the model wrote no JSON object."""
    try:
        value = json.loads(call.arguments)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
