"""The outputs of `generate` steps: a text or its JSON value, or an object where the step asks for more than that."""

from __future__ import annotations

import json
from typing import Any

from app.inference.openai import logprobs
from app.inference.requests import FinishReason, Generated
from app.workflows.language.generate_fields import GenerateFields


def output_of(step: GenerateFields, generated: Generated) -> Any:
    """
    Return the output of a step.

    With `n` > 1 it is an object with `choices`; otherwise, with `logprobs` or `tools`, it is the one choice.
    """
    if not step.has_object:
        return _value(step, generated)
    choices = [_choice(step, text) for text in (generated, *generated.alternatives)]
    return choices[0] if step.n == 1 else {"choices": choices}


def was_cut(generated: Generated) -> bool:
    """Whether one of the texts was cut at `max_tokens`."""
    return any(text.finish is FinishReason.LENGTH for text in (generated, *generated.alternatives))


def finish_reason(generated: Generated) -> str:
    """The finish reason of the first text."""
    return "tool_calls" if generated.tool_calls else generated.finish.value


def _choice(step: GenerateFields, text: Generated) -> dict[str, Any]:
    found: dict[str, Any] = {"text": text.text, "finish_reason": finish_reason(text)}
    if step.output is not None:
        found["value"] = _value(step, text)
    if step.tools:
        found["tool_calls"] = [{"name": call.name, "arguments": dict(call.arguments)} for call in text.tool_calls]
    if step.logprobs:
        found["logprobs"] = logprobs.of_chat(text.logprobs)
    return found


def _value(step: GenerateFields, text: Generated) -> Any:
    return text.text if step.output is None else json.loads(text.text)
