"""The inputs of a run: validation of the client's values against the schemas of the workflow."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from app import json_schema
from app.kernel.errors import InvalidInput, Problem
from app.workflows.language.definition import Definition

#: Maximum characters of a schema, and of its description, in a message.
_MAX_SCHEMA_TEXT = 1_000


def resolve(definition: Definition, given: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return the inputs of a run: the given values, and the defaults of the other inputs.

    Raises InvalidInput with a problem for each input that is missing, unknown or does not conform to its schema.
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
                problems.append(Problem(f"inputs.{name}", "this input is missing", _schema_text(schema)))
            continue
        resolved[name] = given[name]
        problems += json_schema.value_problems(schema, given[name], f"inputs.{name}", _schema_text(schema))
    if problems:
        raise InvalidInput(problems, "inputs")
    return resolved


def _schema_text(schema: Mapping[str, Any]) -> str:
    shown = {key: value for key, value in schema.items() if key not in {"description", "title", "examples"}}
    text = json.dumps(shown, ensure_ascii=False)
    if len(text) > _MAX_SCHEMA_TEXT:
        text = f"{text[: _MAX_SCHEMA_TEXT - 1]}…"
    return f"{text}{' - ' + schema['description'][:_MAX_SCHEMA_TEXT] if 'description' in schema else ''}"
