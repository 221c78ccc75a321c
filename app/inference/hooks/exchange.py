"""
What hooks are given and what they answer, as documents: the same for entry points, HTTP and shipped hooks.

A hook may replace texts and arguments of tool calls. It cannot add or remove messages, change roles, or name other
tools. An answer of another form is an error of the hook, never a change.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from app.inference.requests import ChatMessage, Generated, GenerateRequest, ToolCall

#: Most characters of all texts of an answer, of a reason, of an annotation and of a state as JSON.
MAX_TEXT, MAX_REASON, MAX_ANNOTATION, MAX_STATE = 8_000_000, 500, 200, 1_000_000
_MAX_ANNOTATIONS = 20
_MAX_DEPTH = 32


class HookMisbehaved(ValueError):
    """A hook has answered what it must not."""


class HookCallPart(BaseModel):
    """A tool call, with its arguments."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    arguments: dict[str, Any]


class HookText(BaseModel):
    """A message of the prompt, or a text of the result."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: str | None = None
    text: str
    tool_calls: list[HookCallPart] = []


class HookAnswer(BaseModel):
    """The answer of a hook. An empty one changes nothing."""

    model_config = ConfigDict(extra="forbid", strict=True)

    #: Why the request is refused; the client gets this text.
    refuse: str | None = Field(default=None, min_length=1, max_length=MAX_REASON)
    #: All texts, changed or not; None changes nothing.
    texts: list[HookText] | None = None
    #: What is recorded with the run: never put a secret here.
    annotations: Mapping[str, str | int | float | bool] = Field(default_factory=dict, max_length=_MAX_ANNOTATIONS)
    #: Given to the same hook at `post_result` of the same request.
    state: Any = None

    @field_validator("annotations")
    @classmethod
    def _are_short(cls, value: Mapping[str, str | int | float | bool]) -> Mapping[str, str | int | float | bool]:
        for name, one in value.items():
            if not 1 <= len(name) <= 64 or (isinstance(one, str) and len(one) > MAX_ANNOTATION):
                raise ValueError(f"a name has 1 to 64 characters, a value at most {MAX_ANNOTATION}")
            if "\0" in name or (isinstance(one, str) and "\0" in one):
                raise ValueError("no NUL characters")
            if isinstance(one, float) and not math.isfinite(one):
                raise ValueError("numbers are finite")
            if isinstance(one, int) and abs(one) >= 1 << 53:
                raise ValueError("whole numbers are below 2^53")
        return value


def answer_of(found: Any) -> HookAnswer:
    """Return the answer of a hook. Raises HookMisbehaved without quoting what it has answered."""
    if found is None:
        return HookAnswer()
    try:
        answer = HookAnswer.model_validate(found)
        if len(json.dumps(answer.state, allow_nan=False)) > MAX_STATE:
            raise HookMisbehaved(f"`state` has more than {MAX_STATE} characters")
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_input=False)[:3]
        problems = "; ".join(f"{'.'.join(map(str, one['loc']))[:80]}: {one['msg']}" for one in wrong)
        raise HookMisbehaved(f"its answer has another form: {problems}") from None
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, HookMisbehaved):
            raise
        raise HookMisbehaved("`state` is no JSON") from None
    return answer


def of_request(request: GenerateRequest) -> list[HookText]:
    """The texts of a request: its messages, or its prompt; then the beginning of the answer, if it has one."""
    if request.prompt is not None:
        found = [HookText(role="prompt", text=request.prompt)]
    else:
        found = [
            HookText(role=one.role, text=one.content, tool_calls=_calls(one.tool_calls)) for one in request.messages
        ]
    return [*found, HookText(role="prefill", text=request.prefill)] if request.prefill else found


def with_request(request: GenerateRequest, texts: Sequence[HookText]) -> GenerateRequest:
    """A request with the texts of a hook. Raises HookMisbehaved."""
    before = of_request(request)
    _require_same_shape(before, texts)
    rest = list(texts)
    prefill = rest.pop().text if request.prefill else ""
    if request.prompt is not None:
        return replace(request, prompt=rest[0].text, prefill=prefill)
    messages = tuple(
        ChatMessage(old.role, new.text, _with_calls(old.tool_calls, new.tool_calls))
        for old, new in zip(request.messages, rest, strict=True)
    )
    return replace(request, messages=messages, prefill=prefill)


def of_result(generated: Generated) -> list[HookText]:
    """The texts of a result."""
    return [
        HookText(role="assistant", text=one.text, tool_calls=_calls(one.tool_calls))
        for one in (generated, *generated.alternatives)
    ]


def with_result(generated: Generated, texts: Sequence[HookText]) -> Generated:
    """A result with the texts of a hook: what was changed has no log-probabilities. Raises HookMisbehaved."""
    before = of_result(generated)
    _require_same_shape(before, texts)
    first, *others = (
        old
        if was == new
        else replace(old, text=new.text, tool_calls=_with_calls(old.tool_calls, new.tool_calls), logprobs=())
        for old, was, new in zip((generated, *generated.alternatives), before, texts, strict=True)
    )
    return replace(first, alternatives=tuple(others))


def mapped(value: Any, change: Any, depth: int = 0) -> Any:
    """JSON with each text changed; keys stay. Raises HookMisbehaved for what is nested too deeply."""
    if depth > _MAX_DEPTH:
        raise HookMisbehaved(f"arguments of a tool call are nested more than {_MAX_DEPTH} deep")
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: mapped(inner, change, depth + 1) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [mapped(inner, change, depth + 1) for inner in value]
    return value


def changed(texts: Sequence[HookText], change: Any) -> list[HookText]:
    """Texts with each text and each argument changed by a function of texts."""
    return [
        HookText(
            role=one.role,
            text=change(one.text),
            tool_calls=[HookCallPart(name=c.name, arguments=mapped(c.arguments, change)) for c in one.tool_calls],
        )
        for one in texts
    ]


def _calls(calls: Sequence[ToolCall]) -> list[HookCallPart]:
    return [HookCallPart(name=call.name, arguments=dict(call.arguments)) for call in calls]


def _with_calls(old: Sequence[ToolCall], new: Sequence[HookCallPart]) -> tuple[ToolCall, ...]:
    return tuple(
        was if dict(was.arguments) == one.arguments else ToolCall(was.name, one.arguments)
        for was, one in zip(old, new, strict=True)
    )


def _require_same_shape(before: Sequence[HookText], after: Sequence[HookText]) -> None:
    if len(after) != len(before):
        raise HookMisbehaved(f"it answers {len(after)} texts; it was given {len(before)}")
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        if new.role not in (None, old.role):
            raise HookMisbehaved(f"it changes the role of text {index}")
        if [call.name for call in old.tool_calls] != [call.name for call in new.tool_calls]:
            raise HookMisbehaved(f"it changes which tools text {index} calls")
    if sum(len(one.text) for one in after) > MAX_TEXT:
        raise HookMisbehaved(f"its texts have more than {MAX_TEXT} characters")
