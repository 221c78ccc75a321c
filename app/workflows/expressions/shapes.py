"""
Shapes: the static types of the names that an expression can use.

The shapes of `inputs` come from their JSON Schemas. A finished step has an output, a state, an error and a
finish reason. Some places of a workflow define further names. `name_problems` finds the names that will not exist at
run time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from app.kernel.errors import Problem
from app.workflows.expressions.cel.tree import TYPES
from app.workflows.expressions.templates import STEP_FIELDS, Scope


@dataclass(frozen=True, slots=True)
class Shape:
    """The static type of a value."""

    #: A key of `TYPES`. A JSON number is `dyn`, because it may be an int or a double.
    type: str = "dyn"
    #: The shapes of the known fields of a map.
    fields: Mapping[str, Shape] = field(default_factory=dict)
    #: Whether the map has no other fields than these.
    closed: bool = False


DYN, BOOL, INT, STRING = Shape(), Shape("bool"), Shape("int"), Shape("string")
#: The fields of a finished step. A missing output, error or finish reason is null; a map has a list of finish reasons.
_STEP: Mapping[str, Shape] = {"output": DYN, "state": STRING, "error": DYN, "finish_reason": DYN}
assert tuple(_STEP) == STEP_FIELDS
#: The shapes of the names that a scope may have in addition to `inputs` and `steps`.
_EXTRA: Mapping[str, Shape] = {
    "run": Shape("map", {"id": STRING, "workflow": STRING, "state": STRING}, closed=True),
    "error": Shape("map", {"reason": STRING, "message": STRING, "attempt": INT}, closed=True),
    "index": INT,
}


def roots_of(scope: Scope) -> dict[str, Shape]:
    """Return the shapes of the top-level names that an expression can use."""
    return dict.fromkeys(scope.roots, Shape("map")) | {name: _EXTRA.get(name, DYN) for name in scope.extra}


def shape_of(schema: Any) -> Shape:
    """Return the shape of the values that a JSON Schema accepts."""
    if not isinstance(schema, Mapping):
        return DYN
    match schema.get("type"):
        case "boolean":
            return BOOL
        case "integer":
            return INT
        case "string":
            return STRING
        case "array":
            of = shape_of(schema.get("items")).type
            return Shape(f"list of {of}" if f"list of {of}" in TYPES else "list")
        case "object":
            fields = {name: shape_of(inner) for name, inner in schema.get("properties", {}).items()}
            return Shape("map", fields, closed=schema.get("additionalProperties") is False)
    return DYN


def name_problems(paths: Iterable[tuple[str, ...]], where: str, scope: Scope) -> Iterator[Problem]:
    """Yield a problem for each path (`('inputs', 'order', 'id')`) whose root or field does not exist."""
    roots = roots_of(scope)
    for path in dict.fromkeys(paths):
        root, first, second = (*path, None, None)[:3]
        if root not in roots:
            yield Problem(where, f"{root!r} is not defined here", scope.names())
        elif root == "inputs" and first is not None and first not in scope.inputs:
            yield Problem(where, f"'inputs.{first}' is not an input of the workflow", scope.names())
        elif root == "steps" and first is not None and first not in scope.steps:
            yield scope.unknown_step(first, where)
        elif root == "steps" and second is not None and second not in _STEP:
            accepted = ", ".join(f"steps.{first}.{name}" for name in _STEP)
            yield Problem(where, f"'steps.{first}.{second}': a step has no {second!r}", accepted)
        else:
            yield from _field_problems(path, where, scope, roots[root])


def _field_problems(path: tuple[str, ...], where: str, scope: Scope, shape: Shape) -> Iterator[Problem]:
    """Yield a problem for a field that a closed map does not have."""
    for i, name in enumerate(path[1:], 1):
        inner = field_shape(path[:i], name, shape, scope)
        if inner is None:
            before = ".".join(path[:i])
            accepted = ", ".join(f"{before}.{known}" for known in shape.fields)
            yield Problem(where, f"{before!r} has no {name!r}", accepted)
            return
        shape = inner


def field_shape(path: tuple[str, ...], name: str, shape: Shape, scope: Scope) -> Shape | None:
    """Return the shape of the field `name` of the value at `path`; None when the field cannot exist."""
    if path == ("inputs",):
        return shape_of(scope.inputs[name]) if isinstance(scope.inputs, Mapping) else DYN
    if path == ("steps",):
        return Shape("map")
    if len(path) == 2 and path[0] == "steps":
        return _STEP[name]
    return shape.fields.get(name) or (None if shape.closed else DYN)
