"""
Constraints: what a schema demands of a value, with references followed and allOf, anyOf and oneOf worked in.

`alternatives` turns a schema into flat sets of constraints; a value conforms when it meets one of them.
No schema leads back to itself before a value is written: `to_gbnf` has refused that before.
Nothing is narrowed here: an alternative means what Draft 2020-12 means. What cannot be met is left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from app.kernel.errors import Problem

#: Keywords that say something about a value without constraining it.
ANNOTATIONS = frozenset(
    {"$schema", "$id", "$comment", "$defs", "definitions", "title", "description", "default", "examples"}
) | frozenset({"deprecated", "readOnly", "writeOnly", "nullable"})

#: Keywords that constrain values of one type only.
OF_TYPE: Mapping[str, frozenset[str]] = {
    "object": frozenset({"properties", "required", "additionalProperties", "minProperties", "maxProperties"}),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems", "uniqueItems"}),
    "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
    "number": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}),
}

COMBINERS = frozenset(("$ref", "allOf", "anyOf", "oneOf"))

SUPPORTED = ANNOTATIONS | COMBINERS | {"type", "enum", "const"} | frozenset().union(*OF_TYPE.values())

TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")

#: Most alternatives that one place may have after anyOf and oneOf are multiplied out.
MAX_ALTERNATIVES = 200

#: Most schemas that are read, one as often as it is met.
MAX_STEPS = 20_000

#: What it counts to compare two alternatives of a oneOf.
_PAIR = 10

#: A schema and its path from the root, such as `properties.age`.
Part: TypeAlias = tuple[Any, str]
#: Schemas that all apply to one value.
Parts: TypeAlias = tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Constraints:
    """Demands that all apply. A demand of one type does not touch values of another type."""

    where: str = ""
    #: None is every type.
    types: frozenset[str] | None = None
    #: The only values, or None for all.
    values: tuple[Any, ...] | None = None
    #: The schemas that these demands were read from, without what `alternatives` works in.
    sources: tuple[Mapping[str, Any], ...] = ()

    properties: Mapping[str, Parts] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    #: What applies to other properties; empty where nothing was said.
    additional: Parts = ()
    min_properties: int = 0
    max_properties: int | None = None

    prefix: tuple[Parts, ...] = ()
    #: What applies to items after the prefix; empty where nothing was said.
    items: Parts = ()
    min_items: int = 0
    max_items: int | None = None
    unique: bool = False

    #: Pattern or format, by its keyword, with its path.
    patterns: tuple[tuple[str, str, str], ...] = ()
    min_length: int = 0
    max_length: int | None = None

    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    below: float | None = None
    multiple_of: tuple[float, ...] = ()

    @property
    def says(self) -> frozenset[str]:
        """The keywords that were read."""
        return frozenset(keyword for source in self.sources for keyword in source)


def identity(value: Any) -> Hashable:
    """What JSON values share that are equal: 1 is 1.0, and neither is true."""
    if isinstance(value, list):
        return ("array", *map(identity, value))
    if isinstance(value, dict):
        return frozenset((name, identity(item)) for name, item in value.items())
    return (isinstance(value, bool), value)


def key(parts: Parts) -> str:
    """The same text for schemas that say the same."""
    return json.dumps([schema for schema, _ in parts])


def subschemas(schema: Mapping[str, Any], where: str) -> Iterator[Part]:
    """The schemas inside a schema, references not followed."""
    for keyword in ("items", "additionalProperties"):
        if keyword in schema:
            yield schema[keyword], inside(where, keyword)
    for keyword in ("allOf", "anyOf", "oneOf", "prefixItems"):
        for i, item in enumerate(schema.get(keyword, ())):
            yield item, f"{inside(where, keyword)}[{i}]"
    for name, item in schema.get("properties", {}).items():
        yield item, inside(where, f"properties.{name}")


def inside(where: str, step: str) -> str:
    """The path one step further in."""
    return f"{where}.{step}" if where else step


class ConstraintReader:
    """Reads alternatives out of the schemas of one root, and collects the problems that it meets."""

    def __init__(self, root: Mapping[str, Any], valid: Callable[[Any, Mapping[str, Any]], bool]) -> None:
        self._root = root
        #: Whether a value conforms to a schema of this root.
        self._valid = valid
        self.problems: list[Problem] = []
        self._steps = 0

    def refuse(self, where: str, message: str, accepted: str = "") -> None:
        problem = Problem(where, message, accepted)
        if problem not in self.problems:
            self.problems.append(problem)

    @staticmethod
    def demands(schema: Mapping[str, Any]) -> set[str]:
        """The keywords of a schema that demand something."""
        return set(schema) - ANNOTATIONS

    def target(self, reference: str, where: str) -> Part | None:
        """The schema that a reference names, or None and a problem."""
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
                node, path = node[step], inside(path, step)
            else:
                node = None
                break
        if not isinstance(node, dict | bool) or (reference != "#" and not reference.startswith("#/")):
            self.refuse(where, f"$ref {reference!r} names nothing", "a reference such as '#/$defs/name'")
            return None
        return node, path

    def alternatives(self, parts: Parts) -> list[Constraints]:
        """The ways to meet all the schemas; none where they contradict one another."""
        return self._all_of(parts, parts[0][1] if parts else "")

    def _all_of(self, parts: Parts, where: str) -> list[Constraints]:
        found = [Constraints(where)]
        for part in parts:
            found = self._crossed(found, self._one(part), where)
        return [item for item in found if self._possible(item)]

    def _one(self, part: Part) -> list[Constraints]:
        schema, where = part
        self._steps += 1
        if self._steps > MAX_STEPS:
            self.refuse(
                "", "its references and unions lead to one another in too many ways", f"up to {MAX_STEPS} steps"
            )
            return []
        if isinstance(schema, bool):
            return [Constraints(where)] if schema else []
        found = [_own(schema, where)]
        if "$ref" in schema:
            target = self.target(schema["$ref"], where)
            if target is not None:
                found = self._crossed(found, self._all_of((target,), where), where)
        if "allOf" in schema:
            inner = tuple((item, f"{inside(where, 'allOf')}[{i}]") for i, item in enumerate(schema["allOf"]))
            found = self._crossed(found, self._all_of(inner, where), where)
        for keyword in ("anyOf", "oneOf"):
            if keyword in schema:
                branches = [
                    self._all_of(((item, place),), place)
                    for i, item in enumerate(schema[keyword])
                    for place in [f"{inside(where, keyword)}[{i}]"]
                ]
                if keyword == "oneOf":
                    self.check_apart(branches, inside(where, keyword))
                found = self._crossed(found, [item for branch in branches for item in branch], where)
        return found

    def _crossed(self, ones: list[Constraints], others: list[Constraints], where: str) -> list[Constraints]:
        if len(ones) * len(others) > MAX_ALTERNATIVES:
            self.refuse(
                where, f"anyOf and oneOf make {len(ones) * len(others)} alternatives here", f"up to {MAX_ALTERNATIVES}"
            )
            return ones
        return [_both(one, other) for one in ones for other in others]

    def _possible(self, item: Constraints) -> bool:
        return item.types != frozenset() and (item.values is None or bool(self.conforming(item)))

    def conforming(self, item: Constraints) -> list[Any]:
        """Those of the listed values that meet the other demands too."""
        different = {identity(value): value for value in reversed(item.values or ())}
        return [value for value in reversed(different.values()) if self._meets(value, item)]

    def _meets(self, value: Any, item: Constraints) -> bool:
        """Whether a value meets the demands, its being listed aside."""
        rest = [{k: v for k, v in source.items() if k not in ("enum", "const")} for source in item.sources]
        return all(self._valid(value, source) for source in rest if source)

    def check_apart(self, branches: list[list[Constraints]], where: str) -> None:
        """Refuse oneOf unless no value can meet two of its branches."""
        for i, one in enumerate(branches):
            for j, other in enumerate(branches[:i]):
                self._steps += _PAIR
                if self._steps > MAX_STEPS:
                    self.refuse(where, f"oneOf: {len(branches)} alternatives are too many to be kept apart", "anyOf")
                    return
                if not all(self._apart(a, b, 3) for a in one for b in other):
                    self.refuse(
                        where,
                        f"oneOf: nothing shows that no value meets both [{j}] and [{i}]",
                        "anyOf, or alternatives that differ in type, in their values, in bounds, "
                        "or in a required property",
                    )

    def _apart(self, one: Constraints, other: Constraints, depth: int) -> bool:
        for a, b in ((one, other), (other, one)):
            if a.values is not None:
                listed = None if b.values is None else set(map(identity, b.values))
                return not any(
                    self._meets(value, b) and (listed is None or identity(value) in listed)
                    for value in self.conforming(a)
                )
        shared = _types_of(one) & _types_of(other)
        if "integer" in shared and ("number" in _types_of(one) or "number" in _types_of(other)):
            shared |= {"number"}
        return all(self._apart_as(kind, one, other, depth) for kind in shared)

    def _apart_as(self, kind: str, one: Constraints, other: Constraints, depth: int) -> bool:
        both = _both(one, other)
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
                    if all(self._apart(a, b, depth - 1) for a, b in pairs):
                        return True
                elif not self.alternatives(others if name in one.required else ones):
                    return True
        return False


def _types_of(item: Constraints) -> frozenset[str]:
    found = frozenset(TYPES) if item.types is None else item.types
    return found | {"integer"} if "number" in found else found


def _property(item: Constraints, name: str) -> Parts:
    return item.properties.get(name, item.additional)


def _own(schema: Mapping[str, Any], where: str) -> Constraints:
    """The demands of a schema's own keywords."""
    kinds = schema.get("type")
    values = [[schema["const"]]] if "const" in schema else []
    values += [schema["enum"]] if "enum" in schema else []

    def part(keyword: str) -> Parts:
        return ((schema[keyword], inside(where, keyword)),) if keyword in schema else ()

    return Constraints(
        where=where,
        types=None if kinds is None else frozenset([kinds] if isinstance(kinds, str) else kinds),
        values=_common(values) if values else None,
        sources=({k: v for k, v in schema.items() if k not in ANNOTATIONS | COMBINERS},),
        properties={
            name: ((item, inside(where, f"properties.{name}")),) for name, item in schema.get("properties", {}).items()
        },
        required=tuple(schema.get("required", ())),
        additional=part("additionalProperties"),
        min_properties=int(schema.get("minProperties", 0)),
        max_properties=_whole(schema.get("maxProperties")),
        prefix=tuple(
            ((item, f"{inside(where, 'prefixItems')}[{i}]"),) for i, item in enumerate(schema.get("prefixItems", ()))
        ),
        items=part("items"),
        min_items=int(schema.get("minItems", 0)),
        max_items=_whole(schema.get("maxItems")),
        unique=schema.get("uniqueItems", False),
        patterns=tuple(
            (keyword, schema[keyword], inside(where, keyword)) for keyword in ("pattern", "format") if keyword in schema
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


def _common(lists: Iterable[Iterable[Any]]) -> tuple[Any, ...]:
    first, *rest = lists
    shared = [set(map(identity, items)) for items in rest]
    return tuple(value for value in first if all(identity(value) in items for items in shared))


def _both(one: Constraints, other: Constraints) -> Constraints:
    """The demands of both."""
    values = [item.values for item in (one, other) if item.values is not None]
    prefix = tuple(_item(one, i) + _item(other, i) for i in range(max(len(one.prefix), len(other.prefix))))
    return replace(
        one,
        types=_both_types(one.types, other.types),
        values=_common(values) if values else None,
        sources=one.sources + other.sources,
        properties={
            name: _property(one, name) + _property(other, name) for name in [*one.properties, *other.properties]
        },
        required=tuple(dict.fromkeys(one.required + other.required)),
        additional=one.additional + other.additional,
        min_properties=max(one.min_properties, other.min_properties),
        max_properties=_fewest(one.max_properties, other.max_properties),
        prefix=prefix,
        items=one.items + other.items,
        min_items=max(one.min_items, other.min_items),
        max_items=_fewest(one.max_items, other.max_items),
        unique=one.unique or other.unique,
        patterns=one.patterns + tuple(item for item in other.patterns if item[:2] not in [p[:2] for p in one.patterns]),
        min_length=max(one.min_length, other.min_length),
        max_length=_fewest(one.max_length, other.max_length),
        minimum=_greatest(one.minimum, other.minimum),
        above=_greatest(one.above, other.above),
        maximum=_least(one.maximum, other.maximum),
        below=_least(one.below, other.below),
        multiple_of=tuple(dict.fromkeys(one.multiple_of + other.multiple_of)),
    )


def _item(item: Constraints, index: int) -> Parts:
    return item.prefix[index] if index < len(item.prefix) else item.items


def _both_types(one: frozenset[str] | None, other: frozenset[str] | None) -> frozenset[str] | None:
    if one is None or other is None:
        return other if one is None else one
    shared = one & other
    return shared | {"integer"} if ("integer" in one | other) and _numeric(one) and _numeric(other) else shared


def _numeric(types: frozenset[str]) -> bool:
    return bool(types & {"number", "integer"})


def _fewest(one: int | None, other: int | None) -> int | None:
    return min((item for item in (one, other) if item is not None), default=None)


def _least(one: float | None, other: float | None) -> float | None:
    return min((item for item in (one, other) if item is not None), default=None)


def _greatest(one: float | None, other: float | None) -> float | None:
    return max((item for item in (one, other) if item is not None), default=None)
