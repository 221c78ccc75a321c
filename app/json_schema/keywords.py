"""
The keywords of the draft 2020-12: one check for each.

A check receives the validation, the value of the keyword, the value to validate, and the schema that contains the
keyword. It yields deviations with paths that start at the validated value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any, TypeAlias

from app.json_schema import formats
from app.json_schema.values import Deviation, excerpt, is_type
from app.kernel.security import regex

if TYPE_CHECKING:
    from app.json_schema.validation import Validation

Deviations: TypeAlias = Iterator[Deviation]


def canonical(validation: Validation, value: Any) -> Hashable:
    """Returns a hashable form that is equal for equal JSON values: 1 equals 1.0, and neither equals true."""
    validation.spend()
    if isinstance(value, Mapping):
        return frozenset((name, canonical(validation, item)) for name, item in value.items())
    if isinstance(value, list | tuple):
        return ("array", *(canonical(validation, item) for item in value))
    return (isinstance(value, bool), value)


def _type(_: Validation, names: Any, value: Any, __: Any) -> Deviations:
    listed = [names] if isinstance(names, str) else names
    if not any(is_type(value, name) for name in listed):
        yield Deviation((), f"{excerpt(value)} is not of type {', '.join(map(repr, listed))}")


def _enum(validation: Validation, values: Any, value: Any, _: Any) -> Deviations:
    wanted = canonical(validation, value)
    if not any(canonical(validation, one) == wanted for one in values):
        yield Deviation((), f"{excerpt(value)} is not one of {excerpt(values)}")


def _const(validation: Validation, constant: Any, value: Any, _: Any) -> Deviations:
    if canonical(validation, constant) != canonical(validation, value):
        yield Deviation((), f"{excerpt(constant)} was expected")


def _ref(validation: Validation, reference: Any, value: Any, _: Any) -> Deviations:
    yield from validation.deviations(validation.target(reference), value, ())


def _all_of(validation: Validation, schemas: Any, value: Any, _: Any) -> Deviations:
    for schema in schemas:
        yield from validation.deviations(schema, value, ())


def _any_of(validation: Validation, schemas: Any, value: Any, _: Any) -> Deviations:
    if not any(validation.conforms(schema, value) for schema in schemas):
        yield Deviation((), f"{excerpt(value)} is not valid under any of the given schemas")


def _one_of(validation: Validation, schemas: Any, value: Any, _: Any) -> Deviations:
    count = sum(validation.conforms(schema, value) for schema in schemas)
    if count != 1:
        count_text = "any" if count == 0 else f"one alone, but {count},"
        yield Deviation((), f"{excerpt(value)} is not valid under {count_text} of the given schemas")


def _not(validation: Validation, schema: Any, value: Any, _: Any) -> Deviations:
    if validation.conforms(schema, value):
        yield Deviation((), f"{excerpt(value)} should not be valid under {excerpt(schema)}")


def _if(validation: Validation, schema: Any, value: Any, parent: Any) -> Deviations:
    branch = "then" if validation.conforms(schema, value) else "else"
    if branch in parent:
        yield from validation.deviations(parent[branch], value, ())


def _bounds(sign: str, holds: Callable[[Any, Any], bool]) -> Callable[..., Deviations]:
    def check(_: Validation, bound: Any, value: Any, __: Any) -> Deviations:
        if not holds(value, bound):
            yield Deviation((), f"{excerpt(value)} is {sign} {excerpt(bound)}")

    return check


def _multiple_of(_: Validation, step: Any, value: Any, __: Any) -> Deviations:
    if _exact(value) % _exact(step):
        yield Deviation((), f"{excerpt(value)} is not a multiple of {excerpt(step)}")


def _exact(number: Any) -> int | Fraction:
    """Returns the exact decimal value: 0.3 is a multiple of 0.1. Raises ValueError for NaN and infinity."""
    return number if isinstance(number, int) else Fraction(repr(number))


def _length(word: str, holds: Callable[[int, Any], bool]) -> Callable[..., Deviations]:
    def check(_: Validation, bound: Any, value: Any, __: Any) -> Deviations:
        if not holds(len(value), bound):
            yield Deviation((), f"{excerpt(value)} {word} ({len(value)}; the bound is {excerpt(bound)})")

    return check


def _pattern(_: Validation, pattern: Any, value: Any, __: Any) -> Deviations:
    if not regex.compiled(pattern).found_in(value):
        yield Deviation((), f"{excerpt(value)} does not match {excerpt(pattern)}")


def _format(validation: Validation, name: Any, value: Any, _: Any) -> Deviations:
    if validation.formats and name in formats.CHECKS and not formats.CHECKS[name](value):
        yield Deviation((), f"{excerpt(value)} is not a {name!r}")


def _items(validation: Validation, schema: Any, value: Any, parent: Any) -> Deviations:
    for i in range(len(parent.get("prefixItems", ())), len(value)):
        yield from validation.deviations(schema, value[i], (i,))


def _prefix_items(validation: Validation, schemas: Any, value: Any, _: Any) -> Deviations:
    for i, (schema, item) in enumerate(zip(schemas, value, strict=False)):
        yield from validation.deviations(schema, item, (i,))


def _contains(validation: Validation, schema: Any, value: Any, parent: Any) -> Deviations:
    least, most = parent.get("minContains", 1), parent.get("maxContains", math.inf)
    count = sum(validation.conforms(schema, item) for item in value)
    if count < least:
        yield Deviation(
            (), f"{excerpt(value)} does not contain {'enough ' if count else ''}items that match the schema"
        )
    elif count > most:
        yield Deviation((), f"{excerpt(value)} has too many items that match the schema (expected at most {most})")


def _unique_items(validation: Validation, unique: Any, value: Any, _: Any) -> Deviations:
    if unique and len({canonical(validation, item) for item in value}) < len(value):
        yield Deviation((), f"{excerpt(value)} has non-unique elements")


def _properties(validation: Validation, schemas: Any, value: Any, _: Any) -> Deviations:
    validation.spend(len(schemas) >> 2)
    for name, schema in schemas.items():
        if name in value:
            yield from validation.deviations(schema, value[name], (name,))


def _pattern_properties(validation: Validation, schemas: Any, value: Any, _: Any) -> Deviations:
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


def _additional(validation: Validation, value: Mapping[str, Any], parent: Mapping[str, Any]) -> list[str]:
    """Returns the properties that neither `properties` nor `patternProperties` matches."""
    validation.spend(len(value) >> 2)
    known = set(parent.get("properties", ()))
    for pattern in parent.get("patternProperties", ()):
        known.update(_matching(validation, pattern, value))
    return [name for name in value if name not in known]


def _additional_properties(validation: Validation, schema: Any, value: Any, parent: Any) -> Deviations:
    extra = _additional(validation, value, parent)
    if schema is False:
        if extra:
            yield _unexpected("Additional properties", extra)
        return
    for name in extra:
        yield from validation.deviations(schema, value[name], (name,))


def _unexpected(what: str, extra: list[Any]) -> Deviation:
    listed = ", ".join(excerpt(name) for name in extra[:12]) + (", …" if len(extra) > 12 else "")
    return Deviation((), f"{what} are not allowed ({listed} {'was' if len(extra) == 1 else 'were'} unexpected)")


def _property_names(validation: Validation, schema: Any, value: Any, _: Any) -> Deviations:
    for name in value:
        yield from validation.deviations(schema, name, ())


def _required(validation: Validation, names: Any, value: Any, _: Any) -> Deviations:
    validation.spend(len(names) >> 2)
    for name in names:
        if name not in value:
            yield Deviation((), f"{excerpt(name)} is a required property")


def _dependent_required(validation: Validation, needs: Any, value: Any, _: Any) -> Deviations:
    for name, names in needs.items():
        validation.spend(1 + (len(names) >> 2))
        for other in names if name in value else ():
            if other not in value:
                yield Deviation((), f"{excerpt(other)} is a dependency of {excerpt(name)}")


def _dependent_schemas(validation: Validation, schemas: Any, value: Any, _: Any) -> Deviations:
    validation.spend(len(schemas) >> 2)
    for name, schema in schemas.items():
        if name in value:
            yield from validation.deviations(schema, value, ())


def _unevaluated_properties(validation: Validation, schema: Any, value: Any, parent: Any) -> Deviations:
    seen = _evaluated(validation, {k: v for k, v in parent.items() if k != "unevaluatedProperties"}, value)
    extra = [name for name in value if name not in seen and not validation.conforms(schema, value[name])]
    if extra:
        yield _unexpected("Unevaluated properties", extra)


def _unevaluated_items(validation: Validation, schema: Any, value: Any, parent: Any) -> Deviations:
    seen = _evaluated(validation, {k: v for k, v in parent.items() if k != "unevaluatedItems"}, value)
    extra = [i for i, item in enumerate(value) if i not in seen and not validation.conforms(schema, item)]
    if extra:
        yield _unexpected("Unevaluated items", [value[i] for i in extra[:13]])


def _evaluated(validation: Validation, schema: Any, value: Any) -> set[Any]:
    """Returns the names or indices that are evaluated by a schema, or by the schemas that it applies in place."""
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
    for inner in _in_place_schemas(validation, schema, value):
        seen |= _evaluated(validation, inner, value)
    return seen


def _in_place_schemas(validation: Validation, schema: Mapping[str, Any], value: Any) -> Iterator[Any]:
    """Yields the in-place subschemas to which the value conforms."""
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


_Check: TypeAlias = "Callable[[Validation, Any, Any, Any], Deviations]"
#: Checks of keywords that apply to values of all types.
FOR_ANY_TYPE: Mapping[str, _Check] = {
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
#: Checks of keywords that apply only to values of one type, with that type.
FOR_ONE_TYPE: Mapping[str, tuple[str, _Check]] = {
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
