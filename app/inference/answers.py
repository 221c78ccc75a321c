"""Validation of model output: JSON against its schema, and tool calls against the tools of the request."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from app import json_schema
from app.inference.requests import FinishReason, GenerateRequest, ToolCall
from app.kernel.errors import FailureReason, StepFailure


def require_calls(calls: Sequence[ToolCall], request: GenerateRequest, text: str) -> None:
    """
    Checks that each call names a tool of the request, and that its arguments conform to the tool's schema.

    Raises StepFailure with the reason `invalid_output`, which keeps the text.
    """
    schemas = {tool.name: tool.parameters for tool in request.tools}
    for call in calls:
        if call.name not in schemas:
            message = f"the model called {call.name!r}, which is not a tool; the tools are {', '.join(schemas)}"
            raise StepFailure(FailureReason.INVALID_OUTPUT, message, text=text)
        problem = next(json_schema.deviations(schemas[call.name], dict(call.arguments), formats=True), None)
        if problem is not None:
            message = f"the call of {call.name!r} does not conform at ${problem.where}: {problem.message}"
            raise StepFailure(FailureReason.INVALID_OUTPUT, message, text=text)


def cut(request: GenerateRequest, text: str) -> StepFailure:
    """The failure of a text that must be JSON and was cut at `max_tokens`."""
    message = f"the text was cut at max_tokens ({request.max_tokens}) before its JSON was complete"
    return StepFailure(FailureReason.INVALID_OUTPUT, message, text=text, finish_reason=FinishReason.LENGTH.value)


def require(text: str, schema: Mapping[str, Any]) -> None:
    """
    Checks that the text is JSON that conforms to the schema.

    Raises StepFailure with the reason `invalid_output`, which keeps the text.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StepFailure(FailureReason.INVALID_OUTPUT, f"the text is not JSON: {error}", text=text) from None
    problem = next(json_schema.deviations(schema, value, formats=True), None)
    if problem is not None:
        message = f"the JSON does not conform to the schema at ${problem.where}: {problem.message}"
        raise StepFailure(FailureReason.INVALID_OUTPUT, message, text=text)
