"""
Tool calls as text: detecting where an answer turns into calls, and tools for a prompt.

Each model family has a style, whose form is in `call_forms`.
Text that may begin a call is held back until that is decided, so no reader sees a part of a call as text.

This module does not know tokens or grammars.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from app.catalog.profiles.family import ToolCallStyle
from app.inference.requests import ChatMessage, Tool, ToolCall
from workers.engine.chat.call_forms import FORMS, OBJECT_BEGINNING, render, to_json

_WHITE = " \t\r\n"


def as_bytes(text: str) -> str:
    """Return the text with a character for each of its bytes."""
    return text.encode().decode("latin-1")


@dataclass(slots=True)
class ToolCallDetector:
    """Detects, piece by piece, where a text turns into tool calls."""

    style: ToolCallStyle
    #: The text comes `as_bytes`.
    is_encoded: bool = False
    #: The text from the first call on; None before a call has begun.
    calls: str | None = None
    #: No call can follow any more.
    ruled_out: bool = False
    _held: str = ""

    def feed(self, new: str) -> str:
        """Add new text. Returns the text that is certainly not part of a call."""
        if self.calls is not None:
            self.calls += new
            return ""
        if self.ruled_out or not new:
            return new
        text = self._held + new
        marker = FORMS[self.style].marker
        if marker:
            at, keep = _in_tags(text, as_bytes(marker) if self.is_encoded else marker)
        else:
            at, keep = _at_the_beginning(text)
        if at is not None:
            self.calls, self._held = text[at:], ""
            return text[:at]
        self._held = text[len(text) - keep :]
        self.ruled_out = not marker and not keep
        return text[: len(text) - keep]

    def finish(self) -> str:
        """End the text. Returns what was held back."""
        held, self._held = self._held, ""
        return held

    def peek(self, new: str) -> ToolCallDetector:
        """Return a copy to which `new` was added; this detector is unchanged."""
        other = replace(self)
        other.feed(new)
        return other


def _in_tags(text: str, tag: str) -> tuple[int | None, int]:
    """Return where an opening tag begins, or None, and how many characters at the end may begin one."""
    at = text.find(tag)
    if at >= 0:
        return at, 0
    return None, next((size for size in range(min(len(tag) - 1, len(text)), 0, -1) if tag.startswith(text[-size:])), 0)


def _at_the_beginning(text: str) -> tuple[int | None, int]:
    """As `_in_tags`, for a call that can only be at the beginning of the text."""
    rest = text.lstrip(_WHITE)
    at = len(text) - len(rest)
    for part in OBJECT_BEGINNING:
        rest = rest.lstrip(_WHITE)
        if not rest.startswith(part):
            return None, len(text) if part.startswith(rest) else 0
        rest = rest[len(part) :]
    return at, 0


def normalise_start(calls: str, style: ToolCallStyle) -> str:
    """Return the calls as written until detection, with whitespace that the grammar does not accept removed."""
    if FORMS[style].marker:
        return calls
    rest = calls
    for part in OBJECT_BEGINNING:
        rest = rest.lstrip(_WHITE)[len(part) :]
    return "".join(OBJECT_BEGINNING) + rest


def template_tool(tool: Tool) -> dict[str, Any]:
    """Return a tool in the form that chat templates expect."""
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}


def describe_tools(
    messages: Sequence[ChatMessage], tools: Sequence[Tool], style: ToolCallStyle, *, keeps_turns: bool = False
) -> tuple[ChatMessage, ...]:
    """
    Return the messages for a chat template that does not support tools.

    A system message describes the tools. Calls and their results become plain text, unless the template has them.
    """
    rewritten = list(messages) if keeps_turns else _merged([_plain(message, style) for message in messages])
    if not tools:
        return tuple(rewritten)
    form = render([ToolCall("the function's name", {"an argument": "its value"})], style)
    how = f"for each call, write {form}" if FORMS[style].marker else f"answer with {form} alone"
    listed = "\n".join(to_json(template_tool(tool)) for tool in tools)
    text = f"You may call these functions, given as JSON Schema:\n{listed}\n\nTo call one, {how}"
    first = next((index for index, message in enumerate(rewritten) if message.role == "system"), None)
    if first is None:
        return (ChatMessage("system", text), *rewritten)
    rewritten[first] = replace(rewritten[first], content=f"{rewritten[first].content}\n\n{text}")
    return tuple(rewritten)


def _plain(message: ChatMessage, style: ToolCallStyle) -> ChatMessage:
    if message.role == "tool":
        before = "<tool_response>\n"
        images = tuple(replace(image, at=image.at + len(before)) for image in message.images)
        return ChatMessage("user", f"{before}{message.content}\n</tool_response>", images=images)
    if not message.tool_calls:
        return message
    parts = (message.content, render(message.tool_calls, style))
    return ChatMessage(message.role, "\n".join(part for part in parts if part))


def _merged(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Return the messages with those of the user joined that follow each other: such templates need turns."""
    found: list[ChatMessage] = []
    for message in messages:
        if found and message.role == found[-1].role == "user":
            found[-1] = ChatMessage("user", f"{found[-1].content}\n{message.content}")
        else:
            found.append(message)
    return found


def rebase(schema: Any, path: str) -> Any:
    """Return the schema for embedding in another one at `path`: its local references are prefixed with `path`."""
    if isinstance(schema, Mapping):
        return {
            key: re.sub("^#", lambda _: path, value)
            if key == "$ref" and isinstance(value, str)
            else rebase(value, path)
            for key, value in schema.items()
        }
    return [rebase(item, path) for item in schema] if isinstance(schema, list | tuple) else schema
