"""
Tool calls as text: detecting where an answer turns into calls, parsing them, and rendering them for a prompt.

Each model family has a style. `hermes` writes any number of `<tool_call>{"name": …, "arguments": …}</tool_call>`;
`llama3` answers with one `{"name": …, "parameters": …}` and nothing else.
Text that may begin a call is held back until that is decided, so no reader sees a part of a call as text.

This module does not know tokens or grammars.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from app.inference.requests import ChatMessage, Tool, ToolCall
from workers.engine.chat.call_scanner import arguments_of

ToolCallStyle = Literal["hermes", "llama3"]

#: The tags around a call of the style `hermes`.
OPENING, CLOSING = "<tool_call>", "</tool_call>"
#: The key of the arguments in each style.
ARGUMENTS: Mapping[ToolCallStyle, str] = {"hermes": "arguments", "llama3": "parameters"}
#: The beginning of a call of the style `llama3`; whitespace may come between the parts.
_BEGINNING = ("{", '"name"', ":")
_WHITE = " \t\r\n"


@dataclass(slots=True)
class ToolCallDetector:
    """Detects, piece by piece, where a text turns into tool calls."""

    style: ToolCallStyle
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
        at, keep = _in_tags(text) if self.style == "hermes" else _at_the_beginning(text)
        if at is not None:
            self.calls, self._held = text[at:], ""
            return text[:at]
        self._held = text[len(text) - keep :]
        self.ruled_out = self.style == "llama3" and not keep
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


def _in_tags(text: str) -> tuple[int | None, int]:
    """Return where an opening tag begins, or None, and how many characters at the end may begin one."""
    at = text.find(OPENING)
    if at >= 0:
        return at, 0
    return None, next(
        (size for size in range(min(len(OPENING) - 1, len(text)), 0, -1) if OPENING[:size] == text[-size:]), 0
    )


def _at_the_beginning(text: str) -> tuple[int | None, int]:
    """As `_in_tags`, for a call that can only be at the beginning of the text."""
    rest = text.lstrip(_WHITE)
    at = len(text) - len(rest)
    for part in _BEGINNING:
        rest = rest.lstrip(_WHITE)
        if not rest.startswith(part):
            return None, len(text) if part.startswith(rest) else 0
        rest = rest[len(part) :]
    return at, 0


def normalise_start(calls: str, style: ToolCallStyle) -> str:
    """Return the calls as written until detection, with whitespace that the grammar does not accept removed."""
    if style == "hermes":
        return calls
    rest = calls
    for part in _BEGINNING:
        rest = rest.lstrip(_WHITE)[len(part) :]
    return "".join(_BEGINNING) + rest


def parse(text: str, style: ToolCallStyle) -> tuple[ToolCall, ...]:
    """Parse the calls of a text. Raises ValueError when one is incomplete or other text is between them."""
    found = []
    rest = text.strip(_WHITE)
    while rest:
        if style == "hermes":
            if not rest.startswith(OPENING):
                raise ValueError(f"{rest[:40]!r} is not a tool call; it must begin with {OPENING}")
            rest = rest[len(OPENING) :].lstrip(_WHITE)
        value, end = json.JSONDecoder().raw_decode(rest)
        written, rest = rest[:end], rest[end:].lstrip(_WHITE)
        if style == "hermes":
            if not rest.startswith(CLOSING):
                raise ValueError(f"a tool call does not end with {CLOSING}")
            rest = rest[len(CLOSING) :].lstrip(_WHITE)
        found.append(_call(value, ARGUMENTS[style], written))
    return tuple(found)


def _call(value: Any, key: str, written: str) -> ToolCall:
    if isinstance(value, dict) and isinstance(value.get("name"), str) and isinstance(value.get(key), dict):
        return ToolCall(value["name"], value[key], arguments_of(written, key))
    raise ValueError(f"{json.dumps(value)[:80]} is not an object with a text `name` and an object `{key}`")


def render(calls: Sequence[ToolCall], style: ToolCallStyle) -> str:
    """Return the calls as the model would write them."""
    texts = [_to_json({"name": call.name, ARGUMENTS[style]: dict(call.arguments)}) for call in calls]
    return "\n".join(f"{OPENING}\n{text}\n{CLOSING}" if style == "hermes" else text for text in texts)


def template_tool(tool: Tool) -> dict[str, Any]:
    """Return a tool in the form that chat templates expect."""
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}


def describe_tools(
    messages: Sequence[ChatMessage], tools: Sequence[Tool], style: ToolCallStyle
) -> tuple[ChatMessage, ...]:
    """
    Return the messages for a chat template that does not support tools.

    A system message describes the tools. Calls and their results become plain text.
    """
    rewritten = [_plain(message, style) for message in messages]
    if not tools:
        return tuple(rewritten)
    form = _to_json({"name": "the function's name", ARGUMENTS[style]: {"an argument": "its value"}})
    how = f"for each call, write {OPENING}\n{form}\n{CLOSING}" if style == "hermes" else f"answer with {form} alone"
    listed = "\n".join(_to_json(template_tool(tool)) for tool in tools)
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


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
