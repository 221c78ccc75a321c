"""Answers: whether what a model wrote is what it was asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from app import json_schema
from app.inference.requests import GenerateRequest, ToolCall
from app.kernel.errors import FailureReason, StepFailure


def require_calls(calls: Sequence[ToolCall], request: GenerateRequest, text: str) -> None:
    """
    Raises StepFailure with the reason `invalid_output`, and the text kept, unless the calls are of the request's tools
    and their arguments conform.
    """
    schemas = {tool.name: tool.parameters for tool in request.tools}
    for call in calls:
        if call.name not in schemas:
            message = f"the model asked for {call.name!r}; the tools are {', '.join(schemas)}"
            raise StepFailure(FailureReason.INVALID_OUTPUT, message, text=text)
        problem = next(json_schema.deviations(schemas[call.name], dict(call.arguments), formats=True), None)
        if problem is not None:
            message = f"the call of {call.name!r} does not conform at ${problem.where}: {problem.message}"
            raise StepFailure(FailureReason.INVALID_OUTPUT, message, text=text)


def require(text: str, schema: Mapping[str, Any]) -> None:
    """Raises StepFailure with the reason `invalid_output`, and the text kept, unless it is JSON that conforms."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StepFailure(FailureReason.INVALID_OUTPUT, f"the text is no JSON: {error}", text=text) from None
    problem = next(json_schema.deviations(schema, value, formats=True), None)
    if problem is not None:
        message = f"the JSON does not conform to the schema at ${problem.where}: {problem.message}"
        raise StepFailure(FailureReason.INVALID_OUTPUT, message, text=text)
