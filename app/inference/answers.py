"""Answers: whether what a model wrote is what it was asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.protocols import Validator

from app.inference.requests import GenerateRequest, ToolCall
from app.kernel.errors import FailureReason, StepFailure


def validator_of(schema: Mapping[str, Any]) -> Validator:
    """Checks values against a JSON Schema, formats too."""
    return Draft202012Validator(dict(schema), format_checker=Draft202012Validator.FORMAT_CHECKER)


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
        problem = next(iter(validator_of(schemas[call.name]).iter_errors(dict(call.arguments))), None)
        if problem is not None:
            message = f"the call of {call.name!r} does not conform at {problem.json_path}: {problem.message[:500]}"
            raise StepFailure(FailureReason.INVALID_OUTPUT, message, text=text)


def require(text: str, validator: Validator) -> None:
    """Raises StepFailure with the reason `invalid_output`, and the text kept, unless it is JSON that conforms."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise StepFailure(FailureReason.INVALID_OUTPUT, f"the text is no JSON: {error}", text=text) from None
    problem = next(iter(validator.iter_errors(value)), None)
    if problem is not None:
        message = f"the JSON does not conform to the schema at {problem.json_path}: {problem.message[:500]}"
        raise StepFailure(FailureReason.INVALID_OUTPUT, message, text=text)
