"""Inputs: what a client gives for a run, against what the workflow asks for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from app import json_schema
from app.kernel.errors import InvalidInput, Problem
from app.workflows.language.definition import Definition

#: Characters of a schema that a message shows.
_LONGEST = 1_000


def resolve(definition: Definition, given: Mapping[str, Any]) -> dict[str, Any]:
    """
    The inputs of a run: those given, and the defaults of the others.

    Raises InvalidInput with a problem for each that is missing, unknown or breaks its schema.
    """
    problems: list[Problem] = []
    names = ", ".join(definition.inputs) or "none: the workflow takes no inputs"
    problems.extend(
        Problem(f"inputs.{name}", "the workflow has no such input", names)
        for name in given
        if name not in definition.inputs
    )
    resolved: dict[str, Any] = {}
    for name, schema in definition.inputs.items():
        if name not in given:
            if "default" in schema:
                resolved[name] = schema["default"]
            else:
                problems.append(Problem(f"inputs.{name}", "this input is missing", _told(schema)))
            continue
        resolved[name] = given[name]
        problems += json_schema.value_problems(schema, given[name], f"inputs.{name}", _told(schema))
    if problems:
        raise InvalidInput(problems, "inputs")
    return resolved


def _told(schema: Mapping[str, Any]) -> str:
    told = {key: value for key, value in schema.items() if key not in {"description", "title", "examples"}}
    text = json.dumps(told, ensure_ascii=False)
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST - 1]}…"
    return f"{text}{' - ' + schema['description'][:_LONGEST] if 'description' in schema else ''}"
