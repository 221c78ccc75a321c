"""
The form of a JSON Schema: what each keyword of the draft 2020-12 may hold.

Unknown keywords are annotations, as the draft says. Refused beside malformed keywords: references that lead out of the
schema or nowhere, `$id` below the root, patterns that RE2 does not take, schemas too deep or too large.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from app.json_schema import references
from app.json_schema.references import LISTS, MAPPINGS, ONE
from app.json_schema.values import is_whole, shown
from app.kernel.errors import Problem
from app.kernel.security import regex

#: Levels of a schema.
MAX_NESTING = 60
#: What is found wrong at the most before the rest is left unread.
MAX_PROBLEMS = 20
TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")

_DRAFT = "JSON Schema, draft 2020-12"


class Allowance:
    """What the schemas of one document may cost together."""

    def __init__(self) -> None:
        #: Values in all schemas.
        self.values = 100_000
        #: Instructions of all patterns, as `regex.size` estimates them: some 0.2 µs each.
        self.patterns = 1_000_000


def problems(schema: Any, where: str, allowance: Allowance | None = None) -> list[Problem]:
    """Why the value is no schema that values can be held against; empty when it is one."""
    reader = _Reader(schema, where, allowance or Allowance())
    reader.read()
    return reader.problems


class _Full(Exception):
    """Enough was found, or too much was read."""


class _Reader:
    def __init__(self, root: Any, where: str, allowance: Allowance) -> None:
        self.problems: list[Problem] = []
        self._root, self._where, self._allowance = root, where, allowance
        self._seen: set[int] = set()
        self._anchors: set[str] = set()

    def read(self) -> None:
        try:
            self._measure()
            self._schema(self._root, "")
        except _Full:
            pass

    def _refuse(self, path: str, message: str, accepted: str = _DRAFT) -> None:
        self.problems.append(Problem(f"{self._where}{path}".removeprefix("."), message, accepted))
        if len(self.problems) >= MAX_PROBLEMS:
            raise _Full

    def _measure(self) -> None:
        """See that it is JSON, and neither too deep nor too large."""
        level, depth = [self._root], 0
        while level:
            depth += 1
            self._allowance.values -= len(level)
            if self._allowance.values < 0:
                self._refuse("", "the schemas hold too many values", "100000 values in the schemas of a document")
                raise _Full
            if depth > MAX_NESTING:
                self._refuse("", "the schema nests too deep", f"up to {MAX_NESTING} levels")
                raise _Full
            inner: list[Any] = []
            for value in level:
                if isinstance(value, Mapping):
                    inner += value.values()
                    if any(not isinstance(key, str) or not is_whole(key) for key in value):
                        self._refuse("", "the schema is not JSON: a key is no text", _DRAFT)
                        raise _Full
                elif isinstance(value, list | tuple):
                    inner += value
                elif not _is_json(value):
                    self._refuse("", f"the schema is not JSON: it holds {shown(value)}", "numbers that a double holds")
                    raise _Full
            level = inner

    def _schema(self, schema: Any, path: str) -> None:
        if isinstance(schema, bool):
            return
        if not isinstance(schema, Mapping):
            self._refuse(path, f"{shown(schema)} is no JSON Schema", "a mapping of keywords, true, or false")
            return
        if id(schema) in self._seen:
            return
        self._seen.add(id(schema))
        for keyword, value in schema.items():
            self._keyword(keyword, value, f"{path}.{keyword}")
        for inner, value in references.subschemas(schema):
            self._schema(value, path + inner)

    def _keyword(self, keyword: str, value: Any, path: str) -> None:
        if keyword in ("$ref", "$dynamicRef"):
            self._reference(value, path)
        elif keyword == "$id" and path != ".$id":
            self._refuse(path, "'$id' is not supported below the root of a schema", "$defs and $ref")
        elif keyword in ("$anchor", "$dynamicAnchor") and isinstance(value, str):
            if value in self._anchors:
                self._refuse(path, f"the anchor {shown(value)} stands twice", "one name for each place")
            self._anchors.add(value)
        elif keyword == "pattern":
            self._pattern(value, path)
        elif keyword == "patternProperties" and isinstance(value, Mapping):
            for pattern in value:
                self._pattern(pattern, path)
        if keyword in LISTS and not (isinstance(value, list | tuple) and value):
            self._refuse(
                path, f"this is no JSON Schema: {shown(value)} is no list of schemas", "at least one schema in a list"
            )
        elif keyword in MAPPINGS and not isinstance(value, Mapping):
            self._refuse(path, f"this is no JSON Schema: {shown(value)} is no mapping of names to schemas")
        elif keyword in _FORMS and not _FORMS[keyword][0](value):
            self._refuse(path, f"this is no JSON Schema: {keyword!r} cannot be {shown(value)}", _FORMS[keyword][1])
        elif keyword == "items" and isinstance(value, list | tuple):
            self._refuse(path, "'items' is one schema in this draft", "prefixItems for a list of schemas")

    def _reference(self, value: Any, path: str) -> None:
        if not isinstance(value, str):
            self._refuse(path, f"{shown(value)} is no reference", references.ACCEPTED)
            return
        try:
            target = references.resolved(self._root, value)
        except references.Unresolvable as error:
            self._refuse(path, str(error), references.ACCEPTED)
            return
        # What stands under an unknown keyword becomes a schema by being named.
        self._schema(target, f".{value}")

    def _pattern(self, value: Any, path: str) -> None:
        if not isinstance(value, str):
            self._refuse(path, f"{shown(value)} is no pattern", regex.ACCEPTED)
            return
        self._allowance.patterns -= regex.size(value) if len(value) <= regex.MAX_LENGTH else 0
        if self._allowance.patterns < 0:
            self._refuse(path, "the patterns of the schemas are too large together", "fewer or smaller patterns")
            raise _Full
        try:
            regex.compiled(value)
        except regex.PatternRefused as error:
            self._refuse(path, f"the pattern {shown(value)} cannot be used: {error}", regex.ACCEPTED)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _count(value: Any) -> bool:
    return _number(value) and value >= 0 and value == int(value)


def _names(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and all(isinstance(name, str) for name in value)
        and len(set(value)) == len(value)
    )


def _types(value: Any) -> bool:
    return value in TYPES if isinstance(value, str) else _names(value) and bool(value) and set(value) <= set(TYPES)


_Form = tuple[Callable[[Any], bool], str]
_COUNT: _Form = (_count, "a whole number from 0")
_NUMBER: _Form = (_number, "a number")
_TEXT: _Form = (lambda value: isinstance(value, str), "a text")
_TRUTH: _Form = (lambda value: isinstance(value, bool), "true or false")
_LIST: _Form = (lambda value: isinstance(value, list | tuple), "a list")
#: Keywords whose values have a form of their own, and what that is.
_FORMS: Mapping[str, _Form] = {
    "type": (_types, " | ".join(TYPES) + ", or a list of these"),
    "enum": _LIST,
    "examples": _LIST,
    "multipleOf": (lambda value: _number(value) and value > 0, "a number above 0"),
    **dict.fromkeys(("maximum", "exclusiveMaximum", "minimum", "exclusiveMinimum"), _NUMBER),
    **dict.fromkeys(("maxLength", "minLength", "maxItems", "minItems", "maxContains", "minContains"), _COUNT),
    **dict.fromkeys(("maxProperties", "minProperties"), _COUNT),
    **dict.fromkeys(("uniqueItems", "deprecated", "readOnly", "writeOnly"), _TRUTH),
    **dict.fromkeys(("$id", "$schema", "$anchor", "$dynamicAnchor", "$comment", "title", "description"), _TEXT),
    **dict.fromkeys(("format", "contentEncoding", "contentMediaType"), _TEXT),
    "required": (_names, "a list of different names"),
    "dependentRequired": (
        lambda value: isinstance(value, Mapping) and all(map(_names, value.values())),
        "a mapping of names to lists of names",
    ),
}
assert not set(_FORMS) & (ONE | LISTS | MAPPINGS)


def _is_json(value: Any) -> bool:
    if isinstance(value, str):
        return is_whole(value)
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, int):
        return value.bit_length() <= 1023
    return value is None
