"""
Grammars for JSON Schemas: `to_gbnf` converts a schema to GBNF, so that a model can only generate conforming JSON.

Every text that the grammar accepts is a JSON document that conforms to the schema (Draft 2020-12).
Constraints that a grammar cannot enforce are rejected by keyword and path, with every problem found. Only annotations
are ignored.
Texts are bounded: strings, arrays, numbers, whitespace, and the nesting of recursive schemas.

The grammar does not accept all conforming documents: `values`, `formats` and `patterns` say what is left out.
Validate a generated document against the schema all the same: the generation can stop before the document ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app import json_schema
from app.grammar import gbnf
from app.grammar.constraints import SUPPORTED, ConstraintReader, subpath, subschemas
from app.grammar.formats import PATTERNS
from app.grammar.gbnf import EMPTY, MAX_EXPANDED, MAX_PATHS, MAX_REPEAT, MAX_TEXT, Rules
from app.grammar.values import Writer
from app.kernel.errors import InvalidInput, Problem

#: Maximum characters of a string whose schema has no maxLength.
MAX_STRING = 1024

#: Maximum items of an array whose schema has no maxItems, and maximum properties of additionalProperties.
MAX_ITEMS = 64

#: Maximum levels of a schema.
MAX_NESTING = 60

#: What to use instead of an unsupported keyword.
_ALTERNATIVES: Mapping[str, str] = {
    "not": "enum, const, or anyOf of what is allowed",
    "if": "anyOf of the cases",
    "then": "anyOf of the cases",
    "else": "anyOf of the cases",
    "nullable": "'null' as one of the types",
    "patternProperties": "properties, or additionalProperties",
    "propertyNames": "properties, or additionalProperties",
    "dependentRequired": "anyOf of the cases",
    "dependentSchemas": "anyOf of the cases",
    "dependencies": "anyOf of the cases",
    "unevaluatedProperties": "additionalProperties",
    "unevaluatedItems": "items",
    "additionalItems": "prefixItems and items",
    "contains": "items",
    "$anchor": "$defs and references such as '#/$defs/name'",
    "$dynamicRef": "$ref",
}


def to_gbnf(schema: Mapping[str, Any] | bool, *, max_string: int = MAX_STRING, max_items: int = MAX_ITEMS) -> str:
    """
    Returns a GBNF grammar for llama.cpp whose rule `root` describes documents that conform to `schema`.

    `max_string` is in characters. Both limits apply where the schema sets none, and are at most 1999.
    Raises InvalidInput with every problem found when `schema` is not a JSON Schema, has constraints that a grammar
    cannot enforce, has no conforming document, or needs a grammar that is too large.
    """
    if not (0 < max_string <= MAX_REPEAT and 0 < max_items <= MAX_REPEAT):
        raise ValueError(f"max_string and max_items must be between 1 and {MAX_REPEAT}")
    _raise_if_any(json_schema.problems(schema, ""))
    try:
        return _convert(schema, max_string, max_items)
    except RecursionError:
        message = "its parts refer to one another in a chain that is too long"
        raise InvalidInput([Problem("", message, "fewer properties, values or levels")], "output schema") from None


def _convert(schema: Mapping[str, Any] | bool, max_string: int, max_items: int) -> str:
    """Converts a valid JSON Schema. Raises InvalidInput."""
    reader = ConstraintReader(
        schema if isinstance(schema, Mapping) else {},
        lambda value, part: json_schema.conforms(part, value, root=schema, formats=True),
    )
    _refuse_unsupported(schema, reader)
    _raise_if_any(reader.problems)
    rules = Rules()
    writer = Writer(rules, reader, max_string, max_items)
    root = writer.value(((schema, ""),), "document")
    if root is None and writer.depth_cuts:
        reader.refuse("", "no document conforms: the schema requires itself without end", "an optional property")
    elif root is None:
        reader.refuse("", "no value conforms to the schema false")
    _raise_if_any(reader.problems)
    reachable = rules.reachable(EMPTY if root is None else root)
    if gbnf.count_left_paths(reachable) > MAX_PATHS:
        reader.refuse(
            "", f"its unions refer to one another in {gbnf.count_left_paths(reachable)} ways", f"up to {MAX_PATHS}"
        )
    if gbnf.count_expanded_rules(reachable) > MAX_EXPANDED:
        count = gbnf.count_expanded_rules(reachable)
        message = f"its grammar has {count} rules after llama.cpp has expanded the repetitions"
        reader.refuse("", message, f"up to {MAX_EXPANDED}: lower maxLength, maxItems or the number of properties")
    _raise_if_any(reader.problems)
    text = gbnf.render(reachable)
    if len(text) > MAX_TEXT:
        reader.refuse("", f"its grammar has {len(text)} characters", f"up to {MAX_TEXT}")
    _raise_if_any(reader.problems)
    return text


def _raise_if_any(problems: list[Problem]) -> None:
    if problems:
        raise InvalidInput(problems, what="output schema")


def _refuse_unsupported(schema: Any, reader: ConstraintReader) -> None:
    """Rejects every unsupported keyword, in all schemas that can apply to a part of a document."""
    waiting = [(schema, "")]
    #: For each path, the paths of the schemas that apply to the same value.
    same_value: dict[str, list[str]] = {}
    while waiting:
        node, where = waiting.pop(0)
        if where in same_value or not isinstance(node, Mapping):
            continue
        same_value[where] = [
            f"{subpath(where, keyword)}[{i}]"
            for keyword in ("allOf", "anyOf", "oneOf")
            for i in range(len(node.get(keyword, ())))
        ]
        for keyword in node:
            if keyword not in SUPPORTED:
                accepted = _ALTERNATIVES.get(keyword, "")
                reader.refuse(subpath(where, keyword), f"the keyword {keyword!r} is not supported", accepted)
        _refuse_values(node, where, reader)
        waiting += subschemas(node, where)
        if "$ref" in node and (target := reader.target(node["$ref"], where)) is not None:
            waiting.append(target)
            same_value[where].append(target[1])
    _refuse_cycles(same_value, reader)


def _refuse_cycles(edges: dict[str, list[str]], reader: ConstraintReader) -> None:
    """Rejects schemas that refer to themselves for the same value."""
    left, rounds = dict(edges), 0
    while free := [where for where, targets in left.items() if not any(target in left for target in targets)]:
        for where in free:
            del left[where]
        rounds += 1
    if left:
        walk = [next(iter(left))]
        while (following := next(target for target in left[walk[-1]] if target in left)) not in walk:
            walk.append(following)
        reader.refuse(following, "the schema refers to itself without a value in between", "a reference inside an item")
    elif rounds > MAX_NESTING:
        reader.refuse("", f"{rounds} references and unions refer to one another", f"up to {MAX_NESTING}")


def _refuse_values(node: Mapping[str, Any], where: str, reader: ConstraintReader) -> None:
    """Rejects unsupported values of supported keywords."""
    if where and "$id" in node:
        reader.refuse(subpath(where, "$id"), "the keyword '$id' is not supported below the root", "$defs and $ref")
    if node.get("nullable") and "null" not in node.get("type", ()):
        message = "the keyword 'nullable' has no meaning in Draft 2020-12: null does not conform"
        reader.refuse(subpath(where, "nullable"), message, _ALTERNATIVES["nullable"])
    if node.get("format", "date") not in PATTERNS:
        message = f"the format {node['format']!r} is not supported"
        reader.refuse(subpath(where, "format"), message, ", ".join(sorted(PATTERNS)))
    if node.get("enum") == []:
        reader.refuse(subpath(where, "enum"), "the enum is empty: nothing conforms", "at least one value")
