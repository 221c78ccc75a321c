"""
The keywords of the draft 2020-12: what each demands of a value.

A check gives deviations whose paths begin at the value. It is handed the keyword's own value, and the schema around it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any, TypeAlias

from app.json_schema import formats
from app.json_schema.values import Deviation, is_type, shown
from app.kernel.security import regex

if TYPE_CHECKING:
    from app.json_schema.validation import Validation

Found: TypeAlias = Iterator[Deviation]


def identity(validation: Validation, value: Any) -> Hashable:
    """What JSON values share that are equal: 1 is 1.0, and neither is true."""
    validation.spend()
    if isinstance(value, Mapping):
        return frozenset((name, identity(validation, item)) for name, item in value.items())
    if isinstance(value, list | tuple):
        return ("array", *(identity(validation, item) for item in value))
    return (isinstance(value, bool), value)


def _type(_: Validation, names: Any, value: Any, __: Any) -> Found:
    listed = [names] if isinstance(names, str) else names
    if not any(is_type(value, name) for name in listed):
        yield Deviation((), f"{shown(value)} is not of type {', '.join(map(repr, listed))}")


def _enum(validation: Validation, values: Any, value: Any, _: Any) -> Found:
    wanted = identity(validation, value)
    if not any(identity(validation, one) == wanted for one in values):
        yield Deviation((), f"{shown(value)} is not one of {shown(values)}")


def _const(validation: Validation, constant: Any, value: Any, _: Any) -> Found:
    if identity(validation, constant) != identity(validation, value):
        yield Deviation((), f"{shown(constant)} was expected")


def _ref(validation: Validation, reference: Any, value: Any, _: Any) -> Found:
    yield from validation.deviations(validation.target(reference), value, ())


def _all_of(validation: Validation, schemas: Any, value: Any, _: Any) -> Found:
    for schema in schemas:
        yield from validation.deviations(schema, value, ())


def _any_of(validation: Validation, schemas: Any, value: Any, _: Any) -> Found:
    if not any(validation.conforms(schema, value) for schema in schemas):
        yield Deviation((), f"{shown(value)} is not valid under any of the given schemas")


def _one_of(validation: Validation, schemas: Any, value: Any, _: Any) -> Found:
    count = sum(validation.conforms(schema, value) for schema in schemas)
    if count != 1:
        many = "any" if count == 0 else f"one alone, but {count},"
        yield Deviation((), f"{shown(value)} is not valid under {many} of the given schemas")


def _not(validation: Validation, schema: Any, value: Any, _: Any) -> Found:
    if validation.conforms(schema, value):
        yield Deviation((), f"{shown(value)} should not be valid under {shown(schema)}")


def _if(validation: Validation, schema: Any, value: Any, around: Any) -> Found:
    branch = "then" if validation.conforms(schema, value) else "else"
    if branch in around:
        yield from validation.deviations(around[branch], value, ())


def _bounds(sign: str, holds: Callable[[Any, Any], bool]) -> Callable[..., Found]:
    def check(_: Validation, bound: Any, value: Any, __: Any) -> Found:
        if not holds(value, bound):
            yield Deviation((), f"{shown(value)} is {sign} {shown(bound)}")

    return check


def _multiple_of(_: Validation, step: Any, value: Any, __: Any) -> Found:
    if _exact(value) % _exact(step):
        yield Deviation((), f"{shown(value)} is not a multiple of {shown(step)}")


def _exact(number: Any) -> int | Fraction:
    """The number as it is written: 0.3 is a multiple of 0.1. Raises ValueError for what JSON does not know."""
    return number if isinstance(number, int) else Fraction(repr(number))


def _length(word: str, holds: Callable[[int, Any], bool]) -> Callable[..., Found]:
    def check(_: Validation, bound: Any, value: Any, __: Any) -> Found:
        if not holds(len(value), bound):
            yield Deviation((), f"{shown(value)} {word} ({len(value)}; the bound is {shown(bound)})")

    return check


def _pattern(_: Validation, pattern: Any, value: Any, __: Any) -> Found:
    if not regex.compiled(pattern).found_in(value):
        yield Deviation((), f"{shown(value)} does not match {shown(pattern)}")


def _format(validation: Validation, name: Any, value: Any, _: Any) -> Found:
    if validation.formats and name in formats.CHECKS and not formats.CHECKS[name](value):
        yield Deviation((), f"{shown(value)} is not a {name!r}")


def _items(validation: Validation, schema: Any, value: Any, around: Any) -> Found:
    for i in range(len(around.get("prefixItems", ())), len(value)):
        yield from validation.deviations(schema, value[i], (i,))


def _prefix_items(validation: Validation, schemas: Any, value: Any, _: Any) -> Found:
    for i, (schema, item) in enumerate(zip(schemas, value, strict=False)):
        yield from validation.deviations(schema, item, (i,))


def _contains(validation: Validation, schema: Any, value: Any, around: Any) -> Found:
    least, most = around.get("minContains", 1), around.get("maxContains", math.inf)
    count = sum(validation.conforms(schema, item) for item in value)
    if count < least:
        yield Deviation((), f"{shown(value)} does not contain {'enough ' if count else ''}items that match the schema")
    elif count > most:
        yield Deviation((), f"{shown(value)} has too many items that match the schema (expected at most {most})")


def _unique_items(validation: Validation, unique: Any, value: Any, _: Any) -> Found:
    if unique and len({identity(validation, item) for item in value}) < len(value):
        yield Deviation((), f"{shown(value)} has non-unique elements")


def _properties(validation: Validation, schemas: Any, value: Any, _: Any) -> Found:
    validation.spend(len(schemas) >> 2)
    for name, schema in schemas.items():
        if name in value:
            yield from validation.deviations(schema, value[name], (name,))


def _pattern_properties(validation: Validation, schemas: Any, value: Any, _: Any) -> Found:
    for pattern, schema in schemas.items():
        for name in _matching(validation, pattern, value):
            yield from validation.deviations(schema, value[name], (name,))


def _matching(validation: Validation, pattern: str, names: Iterable[str]) -> list[str]:
    expression = regex.compiled(pattern)
    found = []
    for name in names:
        validation.spend(1 + (len(name) >> 4))
        if expression.found_in(name):
            found.append(name)
    return found


def _additional(validation: Validation, value: Mapping[str, Any], around: Mapping[str, Any]) -> list[str]:
    """The properties that neither `properties` nor `patternProperties` names."""
    validation.spend(len(value) >> 2)
    known = set(around.get("properties", ()))
    for pattern in around.get("patternProperties", ()):
        known.update(_matching(validation, pattern, value))
    return [name for name in value if name not in known]


def _additional_properties(validation: Validation, schema: Any, value: Any, around: Any) -> Found:
    extra = _additional(validation, value, around)
    if schema is False:
        if extra:
            yield _unexpected("Additional properties", extra)
        return
    for name in extra:
        yield from validation.deviations(schema, value[name], (name,))


def _unexpected(what: str, extra: list[Any]) -> Deviation:
    listed = ", ".join(shown(name) for name in extra[:12]) + (", …" if len(extra) > 12 else "")
    return Deviation((), f"{what} are not allowed ({listed} {'was' if len(extra) == 1 else 'were'} unexpected)")


def _property_names(validation: Validation, schema: Any, value: Any, _: Any) -> Found:
    for name in value:
        yield from validation.deviations(schema, name, ())


def _required(validation: Validation, names: Any, value: Any, _: Any) -> Found:
    validation.spend(len(names) >> 2)
    for name in names:
        if name not in value:
            yield Deviation((), f"{shown(name)} is a required property")


def _dependent_required(validation: Validation, needs: Any, value: Any, _: Any) -> Found:
    for name, names in needs.items():
        validation.spend(1 + (len(names) >> 2))
        for other in names if name in value else ():
            if other not in value:
                yield Deviation((), f"{shown(other)} is a dependency of {shown(name)}")


def _dependent_schemas(validation: Validation, schemas: Any, value: Any, _: Any) -> Found:
    validation.spend(len(schemas) >> 2)
    for name, schema in schemas.items():
        if name in value:
            yield from validation.deviations(schema, value, ())


def _unevaluated_properties(validation: Validation, schema: Any, value: Any, around: Any) -> Found:
    seen = _evaluated(validation, {k: v for k, v in around.items() if k != "unevaluatedProperties"}, value)
    extra = [name for name in value if name not in seen and not validation.conforms(schema, value[name])]
    if extra:
        yield _unexpected("Unevaluated properties", extra)


def _unevaluated_items(validation: Validation, schema: Any, value: Any, around: Any) -> Found:
    seen = _evaluated(validation, {k: v for k, v in around.items() if k != "unevaluatedItems"}, value)
    extra = [i for i, item in enumerate(value) if i not in seen and not validation.conforms(schema, item)]
    if extra:
        yield _unexpected("Unevaluated items", [value[i] for i in extra[:13]])


def _evaluated(validation: Validation, schema: Any, value: Any) -> set[Any]:
    """The names or places of a value that a schema, or one that applies beside it, speaks of."""
    validation.spend()
    if isinstance(schema, bool):
        return set()
    seen: set[Any] = set()
    if isinstance(value, Mapping):
        validation.spend(len(value))
        seen.update(name for name in schema.get("properties", ()) if name in value)
        for pattern in schema.get("patternProperties", ()):
            seen.update(_matching(validation, pattern, value))
        if "additionalProperties" in schema or "unevaluatedProperties" in schema:
            return set(value)
    else:
        validation.spend(len(value))
        if "items" in schema or "unevaluatedItems" in schema:
            return set(range(len(value)))
        seen.update(range(min(len(schema.get("prefixItems", ())), len(value))))
        if "contains" in schema:
            seen.update(i for i, item in enumerate(value) if validation.conforms(schema["contains"], item))
    for inner in _beside(validation, schema, value):
        seen |= _evaluated(validation, inner, value)
    return seen


def _beside(validation: Validation, schema: Mapping[str, Any], value: Any) -> Iterator[Any]:
    """The schemas that apply to the same value, and to which it conforms."""
    for keyword in ("$ref", "$dynamicRef"):
        if keyword in schema:
            yield validation.target(schema[keyword])
    for keyword in ("allOf", "anyOf", "oneOf"):
        yield from (inner for inner in schema.get(keyword, ()) if validation.conforms(inner, value))
    if "if" in schema:
        holds = validation.conforms(schema["if"], value)
        if holds:
            yield schema["if"]
        branch = "then" if holds else "else"
        if branch in schema:
            yield schema[branch]
    for name, inner in schema.get("dependentSchemas", {}).items():
        if name in value:
            yield inner


_Check: TypeAlias = "Callable[[Validation, Any, Any, Any], Found]"
#: Keywords that apply to values of every type.
OF_ANY: Mapping[str, _Check] = {
    "type": _type,
    "enum": _enum,
    "const": _const,
    "$ref": _ref,
    "$dynamicRef": _ref,
    "allOf": _all_of,
    "anyOf": _any_of,
    "oneOf": _one_of,
    "not": _not,
    "if": _if,
}
#: Keywords that apply to values of one type.
OF_KIND: Mapping[str, tuple[str, _Check]] = {
    "minimum": ("number", _bounds("less than the minimum of", lambda value, bound: bool(value >= bound))),
    "maximum": ("number", _bounds("greater than the maximum of", lambda value, bound: bool(value <= bound))),
    "exclusiveMinimum": ("number", _bounds("less than or equal to the minimum of", lambda v, bound: bool(v > bound))),
    "exclusiveMaximum": ("number", _bounds("greater than or equal to the maximum of", lambda v, b: bool(v < b))),
    "multipleOf": ("number", _multiple_of),
    "minLength": ("string", _length("is too short", lambda length, bound: bool(length >= bound))),
    "maxLength": ("string", _length("is too long", lambda length, bound: bool(length <= bound))),
    "pattern": ("string", _pattern),
    "format": ("string", _format),
    "items": ("array", _items),
    "prefixItems": ("array", _prefix_items),
    "contains": ("array", _contains),
    "minItems": ("array", _length("is too short", lambda length, bound: bool(length >= bound))),
    "maxItems": ("array", _length("is too long", lambda length, bound: bool(length <= bound))),
    "uniqueItems": ("array", _unique_items),
    "unevaluatedItems": ("array", _unevaluated_items),
    "properties": ("object", _properties),
    "patternProperties": ("object", _pattern_properties),
    "additionalProperties": ("object", _additional_properties),
    "propertyNames": ("object", _property_names),
    "required": ("object", _required),
    "dependentRequired": ("object", _dependent_required),
    "dependentSchemas": ("object", _dependent_schemas),
    "minProperties": ("object", _length("has too few properties", lambda length, bound: bool(length >= bound))),
    "maxProperties": ("object", _length("has too many properties", lambda length, bound: bool(length <= bound))),
    "unevaluatedProperties": ("object", _unevaluated_properties),
}
