"""
Constraints: the flat form of a schema, with references, allOf, anyOf and oneOf resolved.

`alternatives` converts a schema to flat sets of constraints; a value conforms when it satisfies one of them.
No schema refers to itself for the same value: `to_gbnf` has rejected such schemas before.
Nothing is narrowed here: an alternative means exactly what Draft 2020-12 means. Unsatisfiable alternatives are left
out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from app.kernel.errors import Problem

#: Keywords that describe a value without constraining it.
ANNOTATIONS = frozenset(
    {"$schema", "$id", "$comment", "$defs", "definitions", "title", "description", "default", "examples"}
) | frozenset({"deprecated", "readOnly", "writeOnly", "nullable"})

#: Keywords that constrain only values of one type, by that type.
TYPE_KEYWORDS: Mapping[str, frozenset[str]] = {
    "object": frozenset({"properties", "required", "additionalProperties", "minProperties", "maxProperties"}),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems", "uniqueItems"}),
    "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
    "number": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}),
}

COMBINERS = frozenset(("$ref", "allOf", "anyOf", "oneOf"))

SUPPORTED = ANNOTATIONS | COMBINERS | {"type", "enum", "const"} | frozenset().union(*TYPE_KEYWORDS.values())

TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")

#: Maximum alternatives of one value after anyOf and oneOf are multiplied out.
MAX_ALTERNATIVES = 200

#: Maximum work: each reading of a schema is one step.
MAX_STEPS = 20_000

#: Steps that one comparison of two alternatives of a oneOf counts.
_PAIR_STEPS = 10

#: A schema and its path from the root, such as `properties.age`.
LocatedSchema: TypeAlias = tuple[Any, str]
#: Schemas that all apply to one value.
LocatedSchemas: TypeAlias = tuple[LocatedSchema, ...]


@dataclass(frozen=True, slots=True)
class Constraints:
    """Constraints that all apply. A constraint of one type does not affect values of another type."""

    where: str = ""
    #: None means every type.
    types: frozenset[str] | None = None
    #: The allowed values; None means all.
    values: tuple[Any, ...] | None = None
    #: The schemas from which these constraints were read, without the keywords that `alternatives` resolves.
    sources: tuple[Mapping[str, Any], ...] = ()

    properties: Mapping[str, LocatedSchemas] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    #: Schemas of all other properties; empty when unconstrained.
    additional: LocatedSchemas = ()
    min_properties: int = 0
    max_properties: int | None = None

    prefix: tuple[LocatedSchemas, ...] = ()
    #: Schemas of the items after the prefix; empty when unconstrained.
    items: LocatedSchemas = ()
    min_items: int = 0
    max_items: int | None = None
    unique: bool = False

    #: Patterns and formats: keyword, value and path of each.
    patterns: tuple[tuple[str, str, str], ...] = ()
    min_length: int = 0
    max_length: int | None = None

    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    below: float | None = None
    multiple_of: tuple[float, ...] = ()

    @property
    def keywords(self) -> frozenset[str]:
        """The keywords of all sources."""
        return frozenset(keyword for source in self.sources for keyword in source)


def canonical(value: Any) -> Hashable:
    """Returns a hashable form that is equal for equal JSON values: 1 equals 1.0, and neither equals true."""
    if isinstance(value, list):
        return ("array", *map(canonical, value))
    if isinstance(value, dict):
        return frozenset((name, canonical(item)) for name, item in value.items())
    return (isinstance(value, bool), value)


def schema_key(parts: LocatedSchemas) -> str:
    """Returns a text that is equal for equal schemas."""
    return json.dumps([schema for schema, _ in parts])


def subschemas(schema: Mapping[str, Any], where: str) -> Iterator[LocatedSchema]:
    """Yields the direct subschemas, without following references."""
    for keyword in ("items", "additionalProperties"):
        if keyword in schema:
            yield schema[keyword], subpath(where, keyword)
    for keyword in ("allOf", "anyOf", "oneOf", "prefixItems"):
        for i, item in enumerate(schema.get(keyword, ())):
            yield item, f"{subpath(where, keyword)}[{i}]"
    for name, item in schema.get("properties", {}).items():
        yield item, subpath(where, f"properties.{name}")


def subpath(where: str, step: str) -> str:
    """Returns the path of a step below `where`."""
    return f"{where}.{step}" if where else step


class ConstraintReader:
    """Reads alternatives from the schemas of one root, and collects the problems that it finds."""

    def __init__(self, root: Mapping[str, Any], valid: Callable[[Any, Mapping[str, Any]], bool]) -> None:
        self._root = root
        #: Returns whether a value conforms to a schema of this root.
        self._valid = valid
        self.problems: list[Problem] = []
        self._steps = 0

    def refuse(self, where: str, message: str, accepted: str = "") -> None:
        problem = Problem(where, message, accepted)
        if problem not in self.problems:
            self.problems.append(problem)

    @staticmethod
    def constraining_keywords(schema: Mapping[str, Any]) -> set[str]:
        """Returns the keywords of a schema that are constraints."""
        return set(schema) - ANNOTATIONS

    def target(self, reference: str, where: str) -> LocatedSchema | None:
        """Returns the schema that a reference points to, or adds a problem and returns None."""
        if not reference.startswith("#"):
            self.refuse(where, f"$ref {reference!r} leads out of the schema", "a reference such as '#/$defs/name'")
            return None
        node: Any = self._root
        path = ""
        for raw in reference[1:].split("/")[1:]:
            step = raw.replace("~1", "/").replace("~0", "~").replace("%25", "%")
            if isinstance(node, list) and step.isdigit() and int(step) < len(node):
                node, path = node[int(step)], f"{path}[{step}]"
            elif isinstance(node, dict) and step in node:
                node, path = node[step], subpath(path, step)
            else:
                node = None
                break
        if not isinstance(node, dict | bool) or (reference != "#" and not reference.startswith("#/")):
            self.refuse(where, f"$ref {reference!r} points to nothing", "a reference such as '#/$defs/name'")
            return None
        return node, path

    def alternatives(self, parts: LocatedSchemas) -> list[Constraints]:
        """Returns the alternatives that satisfy all the schemas; empty when these contradict one another."""
        return self._combine_all(parts, parts[0][1] if parts else "")

    def _combine_all(self, parts: LocatedSchemas, where: str) -> list[Constraints]:
        found = [Constraints(where)]
        for part in parts:
            found = self._product(found, self._read(part), where)
        return [item for item in found if self._satisfiable(item)]

    def _read(self, part: LocatedSchema) -> list[Constraints]:
        schema, where = part
        self._steps += 1
        if self._steps > MAX_STEPS:
            self.refuse(
                "", "its references and unions refer to one another in too many ways", f"up to {MAX_STEPS} steps"
            )
            return []
        if isinstance(schema, bool):
            return [Constraints(where)] if schema else []
        found = [_own_constraints(schema, where)]
        if "$ref" in schema:
            target = self.target(schema["$ref"], where)
            if target is not None:
                found = self._product(found, self._combine_all((target,), where), where)
        if "allOf" in schema:
            inner = tuple((item, f"{subpath(where, 'allOf')}[{i}]") for i, item in enumerate(schema["allOf"]))
            found = self._product(found, self._combine_all(inner, where), where)
        for keyword in ("anyOf", "oneOf"):
            if keyword in schema:
                branches = [
                    self._combine_all(((item, place),), place)
                    for i, item in enumerate(schema[keyword])
                    for place in [f"{subpath(where, keyword)}[{i}]"]
                ]
                if keyword == "oneOf":
                    self.check_disjoint(branches, subpath(where, keyword))
                found = self._product(found, [item for branch in branches for item in branch], where)
        return found

    def _product(self, ones: list[Constraints], others: list[Constraints], where: str) -> list[Constraints]:
        if len(ones) * len(others) > MAX_ALTERNATIVES:
            self.refuse(
                where, f"anyOf and oneOf make {len(ones) * len(others)} alternatives here", f"up to {MAX_ALTERNATIVES}"
            )
            return ones
        return [_intersection(one, other) for one in ones for other in others]

    def _satisfiable(self, item: Constraints) -> bool:
        return item.types != frozenset() and (item.values is None or bool(self.conforming(item)))

    def conforming(self, item: Constraints) -> list[Any]:
        """Returns the allowed values that also satisfy the other constraints."""
        different = {canonical(value): value for value in reversed(item.values or ())}
        return [value for value in reversed(different.values()) if self._satisfies(value, item)]

    def _satisfies(self, value: Any, item: Constraints) -> bool:
        """Returns whether a value satisfies the constraints, apart from enum and const."""
        rest = [{k: v for k, v in source.items() if k not in ("enum", "const")} for source in item.sources]
        return all(self._valid(value, source) for source in rest if source)

    def check_disjoint(self, branches: list[list[Constraints]], where: str) -> None:
        """Rejects a oneOf unless its branches are provably disjoint."""
        for i, one in enumerate(branches):
            for j, other in enumerate(branches[:i]):
                self._steps += _PAIR_STEPS
                if self._steps > MAX_STEPS:
                    self.refuse(where, f"oneOf: {len(branches)} alternatives are too many to compare", "anyOf")
                    return
                if not all(self._disjoint(a, b, 3) for a in one for b in other):
                    self.refuse(
                        where,
                        f"oneOf: it cannot be proved that no value satisfies both [{j}] and [{i}]",
                        "anyOf, or alternatives that differ in type, in their values, in bounds, "
                        "or in a required property",
                    )

    def _disjoint(self, one: Constraints, other: Constraints, depth: int) -> bool:
        for a, b in ((one, other), (other, one)):
            if a.values is not None:
                listed = None if b.values is None else set(map(canonical, b.values))
                return not any(
                    self._satisfies(value, b) and (listed is None or canonical(value) in listed)
                    for value in self.conforming(a)
                )
        shared = _types_of(one) & _types_of(other)
        if "integer" in shared and ("number" in _types_of(one) or "number" in _types_of(other)):
            shared |= {"number"}
        return all(self._disjoint_in_type(kind, one, other, depth) for kind in shared)

    def _disjoint_in_type(self, kind: str, one: Constraints, other: Constraints, depth: int) -> bool:
        both = _intersection(one, other)
        if kind in ("number", "integer"):
            low = max((b for b in (both.minimum, both.above) if b is not None), default=None)
            high = min((b for b in (both.maximum, both.below) if b is not None), default=None)
            if low is None or high is None:
                return False
            return low > high or (low == high and low in (both.above, both.below))
        if kind == "string":
            return both.max_length is not None and both.min_length > both.max_length
        if kind == "array":
            return both.max_items is not None and both.min_items > both.max_items
        if kind == "object" and depth:
            for name in both.required:
                ones, others = _property(one, name), _property(other, name)
                if name in one.required and name in other.required:
                    pairs = [(a, b) for a in self.alternatives(ones) for b in self.alternatives(others)]
                    if all(self._disjoint(a, b, depth - 1) for a, b in pairs):
                        return True
                elif not self.alternatives(others if name in one.required else ones):
                    return True
        return False


def _types_of(item: Constraints) -> frozenset[str]:
    found = frozenset(TYPES) if item.types is None else item.types
    return found | {"integer"} if "number" in found else found


def _property(item: Constraints, name: str) -> LocatedSchemas:
    return item.properties.get(name, item.additional)


def _own_constraints(schema: Mapping[str, Any], where: str) -> Constraints:
    """Returns the constraints of a schema's own keywords."""
    kinds = schema.get("type")
    values = [[schema["const"]]] if "const" in schema else []
    values += [schema["enum"]] if "enum" in schema else []

    def part(keyword: str) -> LocatedSchemas:
        return ((schema[keyword], subpath(where, keyword)),) if keyword in schema else ()

    return Constraints(
        where=where,
        types=None if kinds is None else frozenset([kinds] if isinstance(kinds, str) else kinds),
        values=_common_values(values) if values else None,
        sources=({k: v for k, v in schema.items() if k not in ANNOTATIONS | COMBINERS},),
        properties={
            name: ((item, subpath(where, f"properties.{name}")),) for name, item in schema.get("properties", {}).items()
        },
        required=tuple(schema.get("required", ())),
        additional=part("additionalProperties"),
        min_properties=int(schema.get("minProperties", 0)),
        max_properties=_whole(schema.get("maxProperties")),
        prefix=tuple(
            ((item, f"{subpath(where, 'prefixItems')}[{i}]"),) for i, item in enumerate(schema.get("prefixItems", ()))
        ),
        items=part("items"),
        min_items=int(schema.get("minItems", 0)),
        max_items=_whole(schema.get("maxItems")),
        unique=schema.get("uniqueItems", False),
        patterns=tuple(
            (keyword, schema[keyword], subpath(where, keyword))
            for keyword in ("pattern", "format")
            if keyword in schema
        ),
        min_length=int(schema.get("minLength", 0)),
        max_length=_whole(schema.get("maxLength")),
        minimum=schema.get("minimum"),
        above=schema.get("exclusiveMinimum"),
        maximum=schema.get("maximum"),
        below=schema.get("exclusiveMaximum"),
        multiple_of=(schema["multipleOf"],) if "multipleOf" in schema else (),
    )


def _whole(number: float | None) -> int | None:
    return None if number is None else int(number)


def _common_values(lists: Iterable[Iterable[Any]]) -> tuple[Any, ...]:
    first, *rest = lists
    shared = [set(map(canonical, items)) for items in rest]
    return tuple(value for value in first if all(canonical(value) in items for items in shared))


def _intersection(one: Constraints, other: Constraints) -> Constraints:
    """Returns constraints that are satisfied by the values that satisfy both."""
    values = [item.values for item in (one, other) if item.values is not None]
    prefix = tuple(_item(one, i) + _item(other, i) for i in range(max(len(one.prefix), len(other.prefix))))
    return replace(
        one,
        types=_common_types(one.types, other.types),
        values=_common_values(values) if values else None,
        sources=one.sources + other.sources,
        properties={
            name: _property(one, name) + _property(other, name) for name in [*one.properties, *other.properties]
        },
        required=tuple(dict.fromkeys(one.required + other.required)),
        additional=one.additional + other.additional,
        min_properties=max(one.min_properties, other.min_properties),
        max_properties=_minimum_count(one.max_properties, other.max_properties),
        prefix=prefix,
        items=one.items + other.items,
        min_items=max(one.min_items, other.min_items),
        max_items=_minimum_count(one.max_items, other.max_items),
        unique=one.unique or other.unique,
        patterns=one.patterns + tuple(item for item in other.patterns if item[:2] not in [p[:2] for p in one.patterns]),
        min_length=max(one.min_length, other.min_length),
        max_length=_minimum_count(one.max_length, other.max_length),
        minimum=_maximum(one.minimum, other.minimum),
        above=_maximum(one.above, other.above),
        maximum=_minimum(one.maximum, other.maximum),
        below=_minimum(one.below, other.below),
        multiple_of=tuple(dict.fromkeys(one.multiple_of + other.multiple_of)),
    )


def _item(item: Constraints, index: int) -> LocatedSchemas:
    return item.prefix[index] if index < len(item.prefix) else item.items


def _common_types(one: frozenset[str] | None, other: frozenset[str] | None) -> frozenset[str] | None:
    if one is None or other is None:
        return other if one is None else one
    shared = one & other
    return shared | {"integer"} if ("integer" in one | other) and _numeric(one) and _numeric(other) else shared


def _numeric(types: frozenset[str]) -> bool:
    return bool(types & {"number", "integer"})


def _minimum_count(one: int | None, other: int | None) -> int | None:
    return min((item for item in (one, other) if item is not None), default=None)


def _minimum(one: float | None, other: float | None) -> float | None:
    return min((item for item in (one, other) if item is not None), default=None)


def _maximum(one: float | None, other: float | None) -> float | None:
    return max((item for item in (one, other) if item is not None), default=None)
