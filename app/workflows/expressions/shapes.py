"""
Shapes: what is known of the data of expressions before there is any.

`inputs` have the shapes that their JSON Schemas tell, steps that are finished have an output, a state and an error,
and in some places there are further names. `name_problems` finds the names that nothing will have.
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
    """What is known of a value before there is one."""

    #: A key of `TYPES`; a number of JSON is `dyn`, for it may be an int or a double.
    type: str = "dyn"
    #: What is known of the fields of a map.
    fields: Mapping[str, Shape] = field(default_factory=dict)
    #: Whether there can be no other fields.
    closed: bool = False


DYN, BOOL, INT, STRING = Shape(), Shape("bool"), Shape("int"), Shape("string")
#: What is known of a step that has ended. What there is not is null.
_STEP: Mapping[str, Shape] = {"output": DYN, "state": STRING, "error": DYN}
assert tuple(_STEP) == STEP_FIELDS
#: What is known of the names that a scope may have besides `inputs` and `steps`, by name.
_MORE: Mapping[str, Shape] = {
    "run": Shape("map", {"id": STRING, "workflow": STRING, "state": STRING}, closed=True),
    "error": Shape("map", {"reason": STRING, "message": STRING, "attempt": INT}, closed=True),
    "index": INT,
}


def roots_of(scope: Scope) -> dict[str, Shape]:
    """What an expression sees, by name."""
    return dict.fromkeys(scope.roots, Shape("map")) | {name: _MORE.get(name, DYN) for name in scope.more}


def shape_of(schema: Any) -> Shape:
    """What a JSON Schema tells of its values."""
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
    """For each path (`('inputs', 'order', 'id')`) whose root or field nothing has, the problem."""
    roots = roots_of(scope)
    for path in dict.fromkeys(paths):
        root, first, second = (*path, None, None)[:3]
        if root not in roots:
            yield Problem(where, f"{root!r} names nothing", scope.names())
        elif root == "inputs" and first is not None and first not in scope.inputs:
            yield Problem(where, f"'inputs.{first}' names no input of the workflow", scope.names())
        elif root == "steps" and first is not None and first not in scope.steps:
            yield Problem(where, f"'steps.{first}' is no {scope.of}", scope.names())
        elif root == "steps" and second is not None and second not in _STEP:
            accepted = ", ".join(f"steps.{first}.{name}" for name in _STEP)
            yield Problem(where, f"'steps.{first}.{second}': a step has no {second!r}", accepted)
        else:
            yield from _field_problems(path, where, scope, roots[root])


def _field_problems(path: tuple[str, ...], where: str, scope: Scope, shape: Shape) -> Iterator[Problem]:
    """A field that a map cannot have, where all of its fields are known."""
    for i, name in enumerate(path[1:], 1):
        inner = below(path[:i], name, shape, scope)
        if inner is None:
            before = ".".join(path[:i])
            accepted = ", ".join(f"{before}.{known}" for known in shape.fields)
            yield Problem(where, f"{before!r} has no {name!r}", accepted)
            return
        shape = inner


def below(path: tuple[str, ...], name: str, shape: Shape, scope: Scope) -> Shape | None:
    """What is known of the field `name` of what stands at `path`; None when there can be no such field."""
    if path == ("inputs",):
        return shape_of(scope.inputs[name]) if isinstance(scope.inputs, Mapping) else DYN
    if path == ("steps",):
        return Shape("map")
    if len(path) == 2 and path[0] == "steps":
        return _STEP[name]
    return shape.fields.get(name) or (None if shape.closed else DYN)
