"""
Calls of tools, as texts: where an answer turns into calls, what they say, and how they are told to a model.

Each family of models has its style: `hermes` writes `<tool_call>{"name": …, "arguments": …}</tool_call>`, any number of
them; `llama3` answers with one `{"name": …, "parameters": …}` and nothing else.
What may be the beginning of a call is held back until that is known: no reader ever sees half a call as text.

Nothing here knows tokens or grammars.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from app.inference.requests import ChatMessage, Tool, ToolCall

Style = Literal["hermes", "llama3"]

#: What goes around a call of the style `hermes`.
OPENING, CLOSING = "<tool_call>", "</tool_call>"
#: The name of the arguments in each style.
ARGUMENTS: Mapping[Style, str] = {"hermes": "arguments", "llama3": "parameters"}
#: What a call of the style `llama3` begins with, whitespace aside.
_BEGINNING = ("{", '"name"', ":")
_WHITE = " \t\r\n"


@dataclass(slots=True)
class ToolCallWatch:
    """Looks for the place where a text turns into calls, piece by piece."""

    style: Style
    #: What was written from that place on; None before.
    calls: str | None = None
    #: It is known that no call comes any more.
    over: bool = False
    _held: str = ""

    def feed(self, new: str) -> str:
        """Take what was written, and give what is known to be no call."""
        if self.calls is not None:
            self.calls += new
            return ""
        if self.over or not new:
            return new
        text = self._held + new
        at, keep = _in_tags(text) if self.style == "hermes" else _at_the_beginning(text)
        if at is not None:
            self.calls, self._held = text[at:], ""
            return text[:at]
        self._held = text[len(text) - keep :]
        self.over = self.style == "llama3" and not keep
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The text ends here: give what was held back."""
        held, self._held = self._held, ""
        return held

    def after(self, new: str) -> ToolCallWatch:
        """As it would stand after `new`; this one stays as it is."""
        other = replace(self)
        other.feed(new)
        return other


def _in_tags(text: str) -> tuple[int | None, int]:
    """Where a tag opens, and how many characters of the end may begin one."""
    at = text.find(OPENING)
    if at >= 0:
        return at, 0
    return None, next(
        (size for size in range(min(len(OPENING) - 1, len(text)), 0, -1) if OPENING[:size] == text[-size:]), 0
    )


def _at_the_beginning(text: str) -> tuple[int | None, int]:
    """As `_in_tags`, for a call that can only stand at the beginning."""
    rest = text.lstrip(_WHITE)
    at = len(text) - len(rest)
    for part in _BEGINNING:
        rest = rest.lstrip(_WHITE)
        if not rest.startswith(part):
            return None, len(text) if part.startswith(rest) else 0
        rest = rest[len(part) :]
    return at, 0


def entrance(calls: str, style: Style) -> str:
    """What was written of calls when they were noticed, in the words of the grammar that takes over from there."""
    if style == "hermes":
        return calls
    rest = calls
    for part in _BEGINNING:
        rest = rest.lstrip(_WHITE)[len(part) :]
    return "".join(_BEGINNING) + rest


def read(text: str, style: Style) -> tuple[ToolCall, ...]:
    """The calls that were written. Raises ValueError when something else stands between them, or one is not whole."""
    found = []
    rest = text.strip(_WHITE)
    while rest:
        if style == "hermes":
            if not rest.startswith(OPENING):
                raise ValueError(f"{rest[:40]!r} is no call")
            rest = rest[len(OPENING) :].lstrip(_WHITE)
        value, end = json.JSONDecoder().raw_decode(rest)
        rest = rest[end:].lstrip(_WHITE)
        if style == "hermes":
            if not rest.startswith(CLOSING):
                raise ValueError("a call does not end")
            rest = rest[len(CLOSING) :].lstrip(_WHITE)
        found.append(_call(value, ARGUMENTS[style]))
    return tuple(found)


def _call(value: Any, key: str) -> ToolCall:
    if isinstance(value, dict) and isinstance(value.get("name"), str) and isinstance(value.get(key), dict):
        return ToolCall(value["name"], value[key])
    raise ValueError(f"{json.dumps(value)[:80]} names no function and its {key}")


def written(calls: Sequence[ToolCall], style: Style) -> str:
    """The text of calls."""
    texts = [_to_json({"name": call.name, ARGUMENTS[style]: dict(call.arguments)}) for call in calls]
    return "\n".join(f"{OPENING}\n{text}\n{CLOSING}" if style == "hermes" else text for text in texts)


def described(tool: Tool) -> dict[str, Any]:
    """A tool as chat templates want it."""
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}


def in_words(messages: Sequence[ChatMessage], tools: Sequence[Tool], style: Style) -> tuple[ChatMessage, ...]:
    """The messages for a template that knows no tools: what they are, were asked and gave is told in plain text."""
    told = [_plain(message, style) for message in messages]
    if not tools:
        return tuple(told)
    form = _to_json({"name": "the function's name", ARGUMENTS[style]: {"an argument": "its value"}})
    how = f"for each call, write {OPENING}\n{form}\n{CLOSING}" if style == "hermes" else f"answer with {form} alone"
    listed = "\n".join(_to_json(described(tool)) for tool in tools)
    text = f"You may call these functions, given as JSON Schema:\n{listed}\n\nTo call one, {how}"
    first = next((index for index, message in enumerate(told) if message.role == "system"), None)
    if first is None:
        return (ChatMessage("system", text), *told)
    told[first] = replace(told[first], content=f"{told[first].content}\n\n{text}")
    return tuple(told)


def _plain(message: ChatMessage, style: Style) -> ChatMessage:
    if message.role == "tool":
        return ChatMessage("user", f"<tool_response>\n{message.content}\n</tool_response>")
    if not message.tool_calls:
        return message
    parts = (message.content, written(message.tool_calls, style))
    return ChatMessage(message.role, "\n".join(part for part in parts if part))


def under(schema: Any, path: str) -> Any:
    """The schema for a place in another one: its references to itself begin at `path`."""
    if isinstance(schema, Mapping):
        return {
            key: re.sub("^#", lambda _: path, value) if key == "$ref" and isinstance(value, str) else under(value, path)
            for key, value in schema.items()
        }
    return [under(item, path) for item in schema] if isinstance(schema, list | tuple) else schema


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
