"""
Checks of JSON Schemas: the values that each keyword of the draft 2020-12 may have.

Unknown keywords are annotations, as in the draft. In addition to malformed keywords, these are rejected: references
that point outside of the schema or to nothing, `$id` below the root, patterns that RE2 does not support, and schemas
that are too deep or too large.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from app.json_schema import references
from app.json_schema.references import SCHEMA_KEYWORDS, SCHEMA_LIST_KEYWORDS, SCHEMA_MAPPING_KEYWORDS
from app.json_schema.values import excerpt, is_encodable
from app.kernel.errors import Problem
from app.kernel.security import regex

#: Maximum levels of a schema.
MAX_NESTING = 60
#: Maximum reported problems; then the check stops.
MAX_PROBLEMS = 20
TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")

_DRAFT = "JSON Schema, draft 2020-12"


class Allowance:
    """The size limits that all schemas of one document share; each check uses up a part."""

    def __init__(self) -> None:
        #: Values that all schemas together may still have.
        self.values = 100_000
        #: Instructions that all patterns together may still have, as `regex.size` estimates them: about 0.2 µs each.
        self.patterns = 1_000_000


def problems(schema: Any, where: str, allowance: Allowance | None = None) -> list[Problem]:
    """Returns why the value is not a usable JSON Schema; empty when it is one."""
    reader = _Reader(schema, where, allowance or Allowance())
    reader.read()
    return reader.problems


class _Stopped(Exception):
    """The check stops: enough problems were found, or a limit was exceeded."""


class _Reader:
    def __init__(self, root: Any, where: str, allowance: Allowance) -> None:
        self.problems: list[Problem] = []
        self._root, self._where, self._allowance = root, where, allowance
        self._seen: set[int] = set()
        self._anchors: set[str] = set()

    def read(self) -> None:
        try:
            self._check_size()
            self._schema(self._root, "")
        except _Stopped:
            pass

    def _refuse(self, path: str, message: str, accepted: str = _DRAFT) -> None:
        self.problems.append(Problem(f"{self._where}{path}".removeprefix("."), message, accepted))
        if len(self.problems) >= MAX_PROBLEMS:
            raise _Stopped

    def _check_size(self) -> None:
        """Checks that the schema is JSON, and neither too deep nor too large."""
        level, depth = [self._root], 0
        while level:
            depth += 1
            self._allowance.values -= len(level)
            if self._allowance.values < 0:
                self._refuse("", "the schemas hold too many values", "100000 values in the schemas of a document")
                raise _Stopped
            if depth > MAX_NESTING:
                self._refuse("", "the schema nests too deep", f"up to {MAX_NESTING} levels")
                raise _Stopped
            inner: list[Any] = []
            for value in level:
                if isinstance(value, Mapping):
                    inner += value.values()
                    if any(not isinstance(key, str) or not is_encodable(key) for key in value):
                        self._refuse("", "the schema is not JSON: a key is not a text", _DRAFT)
                        raise _Stopped
                elif isinstance(value, list | tuple):
                    inner += value
                elif not _is_json(value):
                    self._refuse(
                        "", f"the schema is not JSON: it holds {excerpt(value)}", "numbers that a double holds"
                    )
                    raise _Stopped
            level = inner

    def _schema(self, schema: Any, path: str) -> None:
        if isinstance(schema, bool):
            return
        if not isinstance(schema, Mapping):
            self._refuse(path, f"{excerpt(schema)} is not a JSON Schema", "a mapping of keywords, true, or false")
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
                self._refuse(path, f"the anchor {excerpt(value)} is defined twice", "a unique name for each anchor")
            self._anchors.add(value)
        elif keyword == "pattern":
            self._pattern(value, path)
        elif keyword == "patternProperties" and isinstance(value, Mapping):
            for pattern in value:
                self._pattern(pattern, path)
        if keyword in SCHEMA_LIST_KEYWORDS and not (isinstance(value, list | tuple) and value):
            self._refuse(
                path,
                f"invalid JSON Schema: {excerpt(value)} is not a list of schemas",
                "a list with at least one schema",
            )
        elif keyword in SCHEMA_MAPPING_KEYWORDS and not isinstance(value, Mapping):
            self._refuse(path, f"invalid JSON Schema: {excerpt(value)} is not a mapping of names to schemas")
        elif keyword in _VALUE_RULES and not _VALUE_RULES[keyword][0](value):
            self._refuse(path, f"invalid JSON Schema: {keyword!r} cannot be {excerpt(value)}", _VALUE_RULES[keyword][1])
        elif keyword == "items" and isinstance(value, list | tuple):
            self._refuse(path, "'items' is one schema in this draft", "prefixItems for a list of schemas")

    def _reference(self, value: Any, path: str) -> None:
        if not isinstance(value, str):
            self._refuse(path, f"{excerpt(value)} is not a reference", references.ACCEPTED)
            return
        try:
            target = references.resolved(self._root, value)
        except references.Unresolvable as error:
            self._refuse(path, str(error), references.ACCEPTED)
            return
        # The value of an unknown keyword is a schema when a reference points to it.
        self._schema(target, f".{value}")

    def _pattern(self, value: Any, path: str) -> None:
        if not isinstance(value, str):
            self._refuse(path, f"{excerpt(value)} is not a pattern", regex.ACCEPTED)
            return
        self._allowance.patterns -= regex.size(value) if len(value) <= regex.MAX_LENGTH else 0
        if self._allowance.patterns < 0:
            self._refuse(path, "the patterns of the schemas are too large together", "fewer or smaller patterns")
            raise _Stopped
        try:
            regex.compiled(value)
        except regex.PatternRefused as error:
            self._refuse(path, f"the pattern {excerpt(value)} cannot be used: {error}", regex.ACCEPTED)


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


_ValueRule = tuple[Callable[[Any], bool], str]
_COUNT: _ValueRule = (_count, "a whole number from 0")
_NUMBER: _ValueRule = (_number, "a number")
_TEXT: _ValueRule = (lambda value: isinstance(value, str), "a text")
_BOOLEAN: _ValueRule = (lambda value: isinstance(value, bool), "true or false")
_LIST: _ValueRule = (lambda value: isinstance(value, list | tuple), "a list")
#: Rules for keywords whose values are not schemas: a check, and what would be accepted.
_VALUE_RULES: Mapping[str, _ValueRule] = {
    "type": (_types, " | ".join(TYPES) + ", or a list of these"),
    "enum": _LIST,
    "examples": _LIST,
    "multipleOf": (lambda value: _number(value) and value > 0, "a number above 0"),
    **dict.fromkeys(("maximum", "exclusiveMaximum", "minimum", "exclusiveMinimum"), _NUMBER),
    **dict.fromkeys(("maxLength", "minLength", "maxItems", "minItems", "maxContains", "minContains"), _COUNT),
    **dict.fromkeys(("maxProperties", "minProperties"), _COUNT),
    **dict.fromkeys(("uniqueItems", "deprecated", "readOnly", "writeOnly"), _BOOLEAN),
    **dict.fromkeys(("$id", "$schema", "$anchor", "$dynamicAnchor", "$comment", "title", "description"), _TEXT),
    **dict.fromkeys(("format", "contentEncoding", "contentMediaType"), _TEXT),
    "required": (_names, "a list of different names"),
    "dependentRequired": (
        lambda value: isinstance(value, Mapping) and all(map(_names, value.values())),
        "a mapping of names to lists of names",
    ),
}
assert not set(_VALUE_RULES) & (SCHEMA_KEYWORDS | SCHEMA_LIST_KEYWORDS | SCHEMA_MAPPING_KEYWORDS)


def _is_json(value: Any) -> bool:
    if isinstance(value, str):
        return is_encodable(value)
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, int):
        return value.bit_length() <= 1023
    return value is None
