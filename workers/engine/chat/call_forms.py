"""
The forms of tool calls: how each style writes a call, as data, with its parser and its writer.

In most styles a call is a JSON object with its name and its arguments; in others the name stands before the arguments.
The style `coder` writes each argument by itself (see `coder_calls`).

What cannot be parsed raises ValueError; the caller decides what becomes of the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.catalog.profiles.family import ToolCallStyle
from app.inference.requests import Tool, ToolCall
from workers.engine.chat import coder_calls
from workers.engine.chat.call_scanner import CallScanner, NamedCallScanner, ToolCallScanner, arguments_of

_WHITE = " \t\r\n"
#: DeepSeek's control tokens have a full-width bar, and blocks instead of spaces.
_BAR, _BLOCK = "\uff5c", "\u2581"


def _deepseek(name: str) -> str:
    return f"<{_BAR}{name.replace(' ', _BLOCK)}{_BAR}>"


@dataclass(frozen=True, slots=True)
class CallForm:
    """The form of one style."""

    #: Before all calls, and after them.
    before: str = ""
    after: str = ""
    #: Before each call, and after it.
    opening: str = ""
    closing: str = ""
    #: Between two calls.
    between: str = ""
    #: The key of the arguments in the object of a call.
    key: str = "arguments"
    #: Between the name and the arguments, where the name is not in an object.
    name_end: str = ""
    #: What a model may write there, as a GBNF term and as a pattern.
    name_end_rule: str = ""
    name_end_pattern: str = ""
    #: The calls are the items of a JSON list.
    is_list: bool = False
    #: Whether a text can have several calls.
    repeats: bool = True

    @property
    def marker(self) -> str:
        """The text with which calls begin; empty for a call that can only be at the beginning of the text."""
        return self.before or self.opening


FORMS: Mapping[ToolCallStyle, CallForm] = {
    "hermes": CallForm(opening="<tool_call>", closing="</tool_call>", between="\n"),
    "llama3": CallForm(key="parameters", repeats=False),
    "mistral": CallForm(before="[TOOL_CALLS]", is_list=True),
    "mistral-args": CallForm(
        opening="[TOOL_CALLS]",
        name_end="[ARGS]",
        name_end_rule='("[CALL_ID]" [a-zA-Z0-9]{9})? "[ARGS]"',
        name_end_pattern=r"(?:\[CALL_ID\]\w{1,64})?\[ARGS\]",
    ),
    "phi4": CallForm(before="<|tool_call|>", after="<|/tool_call|>", is_list=True),
    "deepseek": CallForm(
        before=_deepseek("tool calls begin"),
        after=_deepseek("tool calls end"),
        opening=f"{_deepseek('tool call begin')}function{_deepseek('tool sep')}",
        closing=f"\n```{_deepseek('tool call end')}",
        between="\n",
        name_end="\n```json\n",
        name_end_rule='"\\n```json\\n"',
        name_end_pattern=r"\n```json\n",
    ),
    "harmony": CallForm(
        opening="<|channel|>commentary to=functions.",
        name_end=" <|constrain|>json<|message|>",
        name_end_rule='(" "? "<|channel|>commentary")? (" "? "<|constrain|>json" | " json")? "<|message|>"',
        name_end_pattern=r"(?:\s*<\|channel\|>\w{1,20})?(?:\s*<\|constrain\|>\w{0,20}|\s+\w{1,20})?\s*<\|message\|>",
        repeats=False,
    ),
    "coder": CallForm(opening="<tool_call>", closing="</tool_call>", between="\n"),
}
#: Control tokens that are a part of calls: models write them, so texts have them.
TAGS = tuple(
    sorted(
        {form.marker for form in FORMS.values() if form.marker}
        | {form.closing for form in FORMS.values() if form.closing.startswith("<")}
        | {form.after for form in FORMS.values() if form.after}
        | {"[ARGS]", "[CALL_ID]", *map(_deepseek, ("tool call begin", "tool sep", "tool call end"))}
    )
)
#: The beginning of a call of the style `llama3`; whitespace may come between the parts.
OBJECT_BEGINNING = ("{", '"name"', ":")


def scanner(style: ToolCallStyle, tools: Sequence[Tool]) -> CallScanner:
    """Return a scanner of calls that are being written."""
    form = FORMS[style]
    if style == "coder":
        return coder_calls.CoderCallScanner(tools)
    if form.name_end:
        return NamedCallScanner(form.opening, re.compile(form.name_end_pattern))
    return ToolCallScanner(form.key)


def parse(text: str, style: ToolCallStyle, tools: Sequence[Tool] = ()) -> tuple[ToolCall, ...]:
    """
    Parse the calls of a text. `tools` are needed for the types of arguments, in the style `coder`.

    Raises ValueError when one is incomplete or other text is between them.
    """
    form, rest = FORMS[style], text.strip(_WHITE)
    if style == "coder":
        return coder_calls.parse(rest, tools)
    if form.is_list:
        return _listed(rest, form)
    if form.before:
        rest = _without(rest, form.before).lstrip(_WHITE)
    found = []
    while rest and not (form.after and rest.startswith(form.after)):
        call, rest = _named(rest, form) if form.name_end else _object(rest, form)
        found.append(call)
        rest = rest.lstrip(_WHITE)
    if rest.removeprefix(form.after).strip(_WHITE):
        raise ValueError(f"{rest[:40]!r} follows the tool calls")
    return tuple(found)


def render(calls: Sequence[ToolCall], style: ToolCallStyle) -> str:
    """Return the calls as the model would write them."""
    form = FORMS[style]
    if style == "coder":
        return coder_calls.render(calls)
    if form.is_list:
        listed = to_json([{"name": call.name, form.key: dict(call.arguments)} for call in calls])
        return f"{form.before}{listed}{form.after}"
    texts = [_written(call, form) for call in calls]
    return f"{form.before}{form.between.join(texts)}{form.after}"


def to_json(value: Any) -> str:
    """Return JSON as models write it."""
    return json.dumps(value, ensure_ascii=False)


def _written(call: ToolCall, form: CallForm) -> str:
    if form.name_end:
        return f"{form.opening}{call.name}{form.name_end}{to_json(dict(call.arguments))}{form.closing}"
    text = to_json({"name": call.name, form.key: dict(call.arguments)})
    return f"{form.opening}\n{text}\n{form.closing}" if form.opening else text


def _without(text: str, prefix: str) -> str:
    if not text.startswith(prefix):
        raise ValueError(f"{text[:40]!r} is not a tool call; it must begin with {prefix}")
    return text[len(prefix) :]


def _decoded(text: str) -> tuple[Any, int]:
    try:
        return json.JSONDecoder().raw_decode(text)
    except RecursionError:
        raise ValueError("the arguments of a tool call are nested too deeply") from None


def _object(text: str, form: CallForm) -> tuple[ToolCall, str]:
    rest = _without(text, form.opening).lstrip(_WHITE)
    value, end = _decoded(rest)
    written, rest = rest[:end], rest[end:].lstrip(_WHITE)
    if not rest.startswith(form.closing):
        raise ValueError(f"a tool call does not end with {form.closing}")
    return _call(value, form.key, written), rest[len(form.closing) :]


def _named(text: str, form: CallForm) -> tuple[ToolCall, str]:
    rest = _without(text, form.opening)
    end = re.search(form.name_end_pattern, rest)
    name = "" if end is None else rest[: end.start()].strip()
    if end is None or not name:
        raise ValueError(f"the name of a tool call does not end with {form.name_end.strip()}")
    rest = rest[end.end() :].lstrip(_WHITE)
    value, size = _decoded(rest)
    if not isinstance(value, dict):
        raise ValueError(f"the arguments of {name[:40]!r} are not a JSON object")  # noqa: TRY004 one error of the parser
    written, rest = rest[:size], rest[size:].lstrip(_WHITE)
    return ToolCall(name, value, written), _without(rest, form.closing.lstrip(_WHITE)) if form.closing else rest


def _listed(text: str, form: CallForm) -> tuple[ToolCall, ...]:
    rest = _without(text, form.before).lstrip(_WHITE)
    value, end = _decoded(rest)
    if not isinstance(value, list):
        raise ValueError(f"{rest[:40]!r} is not a list of tool calls")  # noqa: TRY004 one error of the parser
    after = rest[end:].strip(_WHITE)
    if after and after != form.after:
        raise ValueError(f"{after[:40]!r} follows the tool calls")
    arguments = ToolCallScanner(form.key).all_arguments(rest[:end])
    return tuple(
        ToolCall(call.name, call.arguments, arguments.get(place, ""))
        for place, call in enumerate(_call(item, form.key, "") for item in value)
    )


def _call(value: Any, key: str, written: str) -> ToolCall:
    if isinstance(value, dict) and isinstance(value.get("name"), str) and isinstance(value.get(key), dict):
        return ToolCall(value["name"], value[key], arguments_of(written, key))
    raise ValueError(f"{json.dumps(value)[:80]} is not an object with a text `name` and an object `{key}`")
