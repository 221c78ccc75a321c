"""
Checks: whether a definition can run.

A definition that passes has unique ids, needs that exist and form no circle, templates that name what is there when
they are rendered, and schemas that are schemas and that a grammar can force.
Every problem is found in one reading, each with its path, its line where the source has lines, and what would do.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jsonschema import Draft202012Validator, SchemaError
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from app.kernel import grammar
from app.kernel.errors import InvalidDefinition, InvalidInput, Problem
from app.workflows import definition as definitions
from app.workflows import expressions, source
from app.workflows.definition import (
    KINDS,
    Defaults,
    Definition,
    GenerateStep,
    JoinStep,
    MessageTemplate,
    NoopStep,
    OutputFields,
    Part,
    Retry,
    SamplingFields,
)
from app.workflows.source import Source


@dataclass(frozen=True, slots=True)
class Catalogued:
    """What is known of the models: the names, so that a wrong one is found at submission."""

    names: frozenset[str]


def parse(text: str, models: Catalogued | None = None) -> Definition:
    """A definition from YAML or JSON text. Raises InvalidDefinition with every problem found."""
    return check(source.read(text), models)


def check(document: Source, models: Catalogued | None = None) -> Definition:
    """A definition from plain data. Raises InvalidDefinition with every problem found."""
    try:
        definition = Definition.model_validate(document.data)
    except ValidationError as error:
        items = error.errors()
        raise InvalidDefinition(
            [_shape_problem(item, document) for item in items if not _follows(item, items)]
        ) from None
    problems = [
        *_graph_problems(definition),
        *_input_schema_problems(definition),
        *_step_problems(definition, models),
    ]
    if problems:
        placed = [Problem(p.where, p.message, p.accepted, document.line(p.where)) for p in problems]
        raise InvalidDefinition(sorted(placed, key=lambda p: p.line or 0))
    return definition


def _graph_problems(definition: Definition) -> list[Problem]:
    problems: list[Problem] = []
    places: dict[str, int] = {}
    for i, step in enumerate(definition.steps):
        if step.id in places:
            problems.append(
                Problem(f"steps[{i}].id", f"{step.id!r} is the id of steps[{places[step.id]}] too", "unique ids")
            )
        places.setdefault(step.id, i)
    for i, step in enumerate(definition.steps):
        for j, need in enumerate(step.needs):
            where = f"steps[{i}].needs[{j}]"
            if need == step.id:
                problems.append(Problem(where, "a step cannot need itself", "another step's id, or nothing"))
            elif need not in places:
                problems.append(Problem(where, f"there is no step {need!r}", _nearest(need, places)))
            elif need in step.needs[:j]:
                problems.append(Problem(where, f"{need!r} is needed twice", "each id once"))
    if not problems and (circle := _circle({step.id: step.needs for step in definition.steps})):
        where = f"steps[{places[circle[0]]}].needs"
        problems.append(
            Problem(where, f"the steps need each other in a circle: {' → '.join(circle)}", "an acyclic graph")
        )
    return problems


def _circle(needs: Mapping[str, Sequence[str]]) -> list[str]:
    """One circle of needs, its first step again at its end; empty when there is none."""
    stuck = set(needs) - set(definitions.in_order(needs))
    if not stuck:
        return []
    walk: list[str] = []
    key = min(stuck)
    while key not in walk:
        walk.append(key)
        key = next(need for need in needs[key] if need in stuck)
    return [*walk[walk.index(key) :], key]


def _input_schema_problems(definition: Definition) -> list[Problem]:
    problems = []
    for name, schema in definition.inputs.items():
        where = f"inputs.{name}"
        if not name.isidentifier():
            problems.append(Problem(where, f"{name!r} cannot be named in a template", "letters, digits, underscores"))
        found = schema_problems(schema, where)
        if not found and "default" in schema:
            errors = sorted(Draft202012Validator(schema).iter_errors(schema["default"]), key=str)
            found = [Problem(f"{where}.default", f"the default breaks its own schema: {e.message}") for e in errors]
        problems += found
    return problems


def schema_problems(schema: Mapping[str, Any], where: str) -> list[Problem]:
    """Empty when the value is a JSON Schema of the draft 2020-12."""
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        inner = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path)
        return [Problem(f"{where}{inner}", f"this is no JSON Schema: {error.message}", "JSON Schema, draft 2020-12")]
    return []


def _step_problems(definition: Definition, models: Catalogued | None) -> list[Problem]:
    problems: list[Problem] = []
    needs = {step.id: step.needs for step in definition.steps}
    sound = all(need in needs for of in needs.values() for need in of)
    before = definitions.ancestors(definition) if sound else {}
    for i, step in enumerate(definition.steps):
        where = f"steps[{i}]"
        scope = expressions.Scope(tuple(definition.inputs), sorted(before.get(step.id, needs)))
        match step:
            case GenerateStep():
                problems += _generate_problems(definition, step, where, scope, models)
            case JoinStep(template=template):
                if not step.needs:
                    problems.append(Problem(f"{where}.needs", "a join with nothing to wait for", "ids of steps"))
                if template is not None:
                    problems += expressions.check(template, f"{where}.template", scope)
            case NoopStep():
                pass
    return problems


def _generate_problems(
    definition: Definition, step: GenerateStep, where: str, scope: expressions.Scope, models: Catalogued | None
) -> list[Problem]:
    problems: list[Problem] = []
    place = f"{where}.model" if step.model else "defaults.model"
    model = step.model or definition.defaults.model
    if model is None:
        accepted = "a model here, or one for all steps under defaults.model"
        problems.append(Problem(where, "the step names no model", accepted))
    elif models is not None and model not in models.names:
        problems.append(Problem(place, f"there is no model {model!r} in the catalogue", _nearest(model, models.names)))
    if step.prompt is not None:
        problems += expressions.check(step.prompt, f"{where}.prompt", scope)
    if step.system is not None:
        problems += expressions.check(step.system, f"{where}.system", scope)
    for j, message in enumerate(step.messages):
        problems += expressions.check(message.content, f"{where}.messages[{j}].content", scope)
    if step.output is not None:
        inside = f"{where}.output.schema"
        found = schema_problems(step.output.schema_, inside)
        problems += found or _grammar_problems(step.output.schema_, inside)
    return problems


def _grammar_problems(schema: Mapping[str, Any], where: str) -> list[Problem]:
    try:
        grammar.to_gbnf(schema)
    except InvalidInput as error:
        return [Problem(f"{where}.{p.where}".rstrip("."), p.message, p.accepted) for p in error.problems]
    return []


def _nearest(name: str, known: Sequence[str] | Mapping[str, Any] | frozenset[str]) -> str:
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    listed = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    return f"{listed}; did you mean {close[0]!r}?" if close else listed


#: Messages of pydantic that say less than we can.
_PLAIN: Mapping[str, str] = {
    "extra_forbidden": "there is no such field here",
    "missing": "this field is missing",
    "union_tag_not_found": "the step has no 'kind'",
}


def _follows(item: ErrorDetails, items: Sequence[ErrorDetails]) -> bool:
    """A list whose items are all wrong is called too short as well."""
    depth = len(item["loc"])
    return item["type"] == "too_short" and any(
        other["loc"][:depth] == item["loc"] and len(other["loc"]) > depth for other in items
    )


def _shape_problem(item: ErrorDetails, document: Source) -> Problem:
    parts = [part for part in item["loc"] if part not in KINDS]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")
    kind = item["type"]
    message = _PLAIN.get(kind) or item["msg"].removeprefix("Value error, ")
    accepted = ""
    if kind == "extra_forbidden":
        accepted = _fields_beside(item)
    elif kind in {"union_tag_not_found", "union_tag_invalid"}:
        accepted = f"kind: {' | '.join(KINDS)}"
    elif kind == "model_attributes_type" or kind == "model_type":
        message = "this must be a mapping of fields"
    elif kind == "string_pattern_mismatch":
        message = f"{item['input']!r} is not written as a name here"
        accepted = "lower-case letters, digits and " + ("hyphens" if where == "workflow" else "underscores")
    elif not isinstance(item["input"], dict | list):
        message = f"{item['input']!r}: {message}"
    return Problem(where, message, accepted, document.line(where))


def _fields_beside(item: ErrorDetails) -> str:
    """The fields that stand where an unknown one was written."""
    place: type[BaseModel] | None = Definition
    location = list(item["loc"])[:-1]
    kinds: Mapping[str, type[Part]] = {"generate": GenerateStep, "join": JoinStep, "noop": NoopStep}
    inner: Mapping[str, type[Part]] = {
        "defaults": Defaults,
        "retry": Retry,
        "sampling": SamplingFields,
        "messages": MessageTemplate,
        "output": OutputFields,
    }
    for part in location:
        if isinstance(part, str):
            place = kinds.get(part) or inner.get(part) or place
    fields = [field.alias or name for name, field in (place or Definition).model_fields.items()]
    return _nearest(str(item["loc"][-1]), fields)
