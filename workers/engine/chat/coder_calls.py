"""
Tool calls of the style `coder` (Qwen3-Coder): a function with its arguments one by one, each as its text.

An argument of the type string is the text as it is; every other one is JSON. The types are those of the tool's schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from app.inference.requests import Tool, ToolCall, ToolCallPiece

_WHITE = " \t\r\n"
_OPENING, _CLOSING = "<tool_call>", "</tool_call>"
_FUNCTION = re.compile(r"<function=([^>\n]{1,200})>")
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]{1,200})>")
_END, _PARAMETER_END = "</function>", "</parameter>"
_FUNCTION_END = re.compile(rf"\s*{_END}")


class CoderCallScanner:
    """The scanner of one text: the name of a call, and each argument when it is complete."""

    __slots__ = ("_at", "_place", "_schema", "_tools", "_written")

    def __init__(self, tools: Sequence[Tool]) -> None:
        self._tools = {tool.name: tool.parameters for tool in tools}
        self._at, self._place = 0, -1
        #: The schema of the call that is being written, and how many of its arguments were; None between two calls.
        self._schema: Mapping[str, Any] | None = None
        self._written = 0

    def feed(self, calls: str) -> tuple[ToolCallPiece, ...]:
        """Return what is new in the calls of the text, which are given whole each time."""
        return tuple(self._read(calls))

    def _read(self, text: str) -> Iterator[ToolCallPiece]:
        while True:
            if self._schema is None:
                found = _FUNCTION.search(text, self._at)
                if found is None:
                    return
                self._place, self._at, self._written = self._place + 1, found.end(), 0
                self._schema = self._tools.get(found[1], {})
                yield ToolCallPiece(self._place, found[1])
            elif (ended := _FUNCTION_END.match(text, self._at)) is not None:
                yield ToolCallPiece(self._place, None, "}" if self._written else "{}")
                self._schema, self._at = None, ended.end()
            else:
                named = _PARAMETER.match(text, self._at)
                end = -1 if named is None else text.find(_PARAMETER_END, named.end())
                if named is None or end < 0:
                    return
                value = json.dumps(_value(text[named.end() : end], named[1], self._schema), ensure_ascii=False)
                before = ", " if self._written else "{"
                yield ToolCallPiece(self._place, None, f"{before}{json.dumps(named[1], ensure_ascii=False)}: {value}")
                self._written, self._at = self._written + 1, end + len(_PARAMETER_END)


def parse(text: str, tools: Sequence[Tool]) -> tuple[ToolCall, ...]:
    """Parse the calls of a text. Raises ValueError when one is incomplete or other text is between them."""
    schemas = {tool.name: tool.parameters for tool in tools}
    found, rest = [], text
    while rest:
        if not rest.startswith(_OPENING):
            raise ValueError(f"{rest[:40]!r} is not a tool call; it must begin with {_OPENING}")
        rest = rest[len(_OPENING) :].lstrip(_WHITE)
        named = _FUNCTION.match(rest)
        if named is None:
            raise ValueError(f"{rest[:40]!r} does not begin with <function=")
        arguments, rest = _arguments(rest[named.end() :], schemas.get(named[1], {}))
        found.append(ToolCall(named[1], arguments, json.dumps(arguments, ensure_ascii=False)))
        rest = rest.lstrip(_WHITE)
        if not rest.startswith(_CLOSING):
            raise ValueError(f"a tool call does not end with {_CLOSING}")
        rest = rest[len(_CLOSING) :].lstrip(_WHITE)
    return tuple(found)


def render(calls: Sequence[ToolCall]) -> str:
    """Return the calls as the model would write them."""
    return "\n".join(
        f"{_OPENING}\n<function={call.name}>\n"
        + "".join(
            f"<parameter={name}>\n{value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}\n"
            f"{_PARAMETER_END}\n"
            for name, value in call.arguments.items()
        )
        + f"{_END}\n{_CLOSING}"
        for call in calls
    )


def is_text(schema: Any) -> bool:
    """Whether an argument with this schema is written as it is."""
    if not isinstance(schema, Mapping):
        return False
    kind = schema.get("type")
    if isinstance(kind, list | tuple):
        return "string" in kind
    if kind is None and (listed := schema.get("enum") or ([schema["const"]] if "const" in schema else [])):
        return all(isinstance(value, str) for value in listed)
    return kind == "string"


def _arguments(text: str, schema: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the arguments of a call, and what follows its function."""
    found: dict[str, Any] = {}
    at = 0
    while (ended := _FUNCTION_END.match(text, at)) is None:
        named = _PARAMETER.match(text, at)
        end = -1 if named is None else text.find(_PARAMETER_END, named.end())
        if named is None or end < 0:
            raise ValueError(f"a tool call does not end with {_END}")
        if named[1] in found:
            raise ValueError(f"the argument {named[1][:40]!r} is given twice")
        found[named[1]] = _value(text[named.end() : end], named[1], schema)
        at = end + len(_PARAMETER_END)
    return found, text[ended.end() :]


def _value(text: str, name: str, schema: Mapping[str, Any]) -> Any:
    """Return the value of an argument. What is not the JSON that its type needs stays a text."""
    text = text.removeprefix("\n").removesuffix("\n")
    properties = schema.get("properties")
    of_name = properties.get(name, {}) if isinstance(properties, Mapping) else {}
    if is_text(of_name) and not (text == "null" and "null" in _types(of_name)):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _types(schema: Mapping[str, Any]) -> Sequence[Any]:
    kind = schema.get("type")
    return kind if isinstance(kind, list | tuple) else (kind,)
