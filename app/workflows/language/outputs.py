"""The output of a run: computed by its expressions and validated against their schemas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app import json_schema
from app.kernel.errors import FailureReason, StepFailure
from app.workflows.expressions import conditions
from app.workflows.language.definition import Output


def compute(parts: Mapping[str, Output], data: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return the output of a run, by name.

    Raises StepFailure when an expression cannot be evaluated, or when its value does not conform to its schema.
    """
    found = {name: conditions.evaluate(part.value, data) for name, part in parts.items()}
    for name, part in parts.items():
        for broken in json_schema.deviations(part.schema_, found[name]):
            raise StepFailure(
                FailureReason.INVALID_OUTPUT, f"{name}{broken.where} does not conform to its schema: {broken.message}"
            )
    return found
