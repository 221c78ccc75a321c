"""
The grammar of a JSON Schema: `to_gbnf` turns a schema into GBNF, so that a model can only write what conforms.

Every text that the grammar accepts is a JSON document that conforms to the schema (Draft 2020-12).
What cannot be kept is refused, by keyword and path, with every problem found; nothing is silently ignored but
annotations.
Texts are bounded: strings, arrays, numbers, whitespace, and how often a schema that refers to itself may nest.

What conforms and is not written: see `values` for what is narrowed, `formats` and `patterns` for texts.
Check the result against the schema nevertheless: a generation can end before the document does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app import json_schema
from app.grammar import gbnf
from app.grammar.constraints import SUPPORTED, ConstraintReader, inside, subschemas
from app.grammar.formats import PATTERNS
from app.grammar.gbnf import EMPTY, MAX_EXPANDED, MAX_PATHS, MAX_REPEAT, MAX_TEXT, Rules
from app.grammar.values import Writer
from app.kernel.errors import InvalidInput, Problem

#: Most characters of a string whose schema has no maxLength.
MAX_STRING = 1024

#: Most items of an array whose schema has no maxItems, and most properties that additionalProperties adds.
MAX_ITEMS = 64

#: Most levels of a schema.
MAX_NESTING = 60

#: Instead of a keyword that is refused.
_INSTEAD: Mapping[str, str] = {
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
    A GBNF grammar for llama.cpp whose rule `root` writes documents that conform to `schema`.

    `max_string` is in characters; both limits hold where the schema sets none, and are at most 1999.
    Raises InvalidInput with every problem found, where `schema` is not a JSON Schema, uses what a grammar does not
    keep, cannot be met by any document, or makes a grammar too large.
    """
    if not (0 < max_string <= MAX_REPEAT and 0 < max_items <= MAX_REPEAT):
        raise ValueError(f"max_string and max_items lie between 1 and {MAX_REPEAT}")
    _stop_at(json_schema.problems(schema, ""))
    try:
        return _written(schema, max_string, max_items)
    except RecursionError:
        message = "its parts lead to one another in a chain that is too long"
        raise InvalidInput([Problem("", message, "fewer properties, values or levels")], "output schema") from None


def _written(schema: Mapping[str, Any] | bool, max_string: int, max_items: int) -> str:
    """The grammar of a JSON Schema. Raises InvalidInput."""
    reader = ConstraintReader(
        schema if isinstance(schema, Mapping) else {},
        lambda value, part: json_schema.conforms(part, value, root=schema),
    )
    _refuse_unsupported(schema, reader)
    _stop_at(reader.problems)
    rules = Rules()
    writer = Writer(rules, reader, max_string, max_items)
    root = writer.value(((schema, ""),), "document")
    if root is None and writer.cuts:
        reader.refuse(
            "", "no document conforms: the schema demands itself without end", "a property that may be absent"
        )
    elif root is None:
        reader.refuse("", "no value conforms to the schema false")
    _stop_at(reader.problems)
    reached = rules.reached(EMPTY if root is None else root)
    if gbnf.left_paths(reached) > MAX_PATHS:
        reader.refuse("", f"its unions lead to one another in {gbnf.left_paths(reached)} ways", f"up to {MAX_PATHS}")
    if gbnf.expanded(reached) > MAX_EXPANDED:
        message = f"its grammar has {gbnf.expanded(reached)} rules when llama.cpp has written out the repetitions"
        reader.refuse("", message, f"up to {MAX_EXPANDED}: lower maxLength, maxItems or the number of properties")
    _stop_at(reader.problems)
    text = gbnf.render(reached)
    if len(text) > MAX_TEXT:
        reader.refuse("", f"its grammar has {len(text)} characters", f"up to {MAX_TEXT}")
    _stop_at(reader.problems)
    return text


def _stop_at(problems: list[Problem]) -> None:
    if problems:
        raise InvalidInput(problems, what="output schema")


def _refuse_unsupported(schema: Any, reader: ConstraintReader) -> None:
    """Refuse every keyword that a grammar does not keep, in all schemas that a document can meet."""
    waiting = [(schema, "")]
    #: Per path, the paths of the schemas that apply to the same value.
    same_value: dict[str, list[str]] = {}
    while waiting:
        node, where = waiting.pop(0)
        if where in same_value or not isinstance(node, Mapping):
            continue
        same_value[where] = [
            f"{inside(where, keyword)}[{i}]"
            for keyword in ("allOf", "anyOf", "oneOf")
            for i in range(len(node.get(keyword, ())))
        ]
        for keyword in node:
            if keyword not in SUPPORTED:
                accepted = _INSTEAD.get(keyword, "")
                reader.refuse(inside(where, keyword), f"the keyword {keyword!r} is not supported", accepted)
        _refuse_values(node, where, reader)
        waiting += subschemas(node, where)
        if "$ref" in node and (target := reader.target(node["$ref"], where)) is not None:
            waiting.append(target)
            same_value[where].append(target[1])
    _refuse_circles(same_value, reader)


def _refuse_circles(edges: dict[str, list[str]], reader: ConstraintReader) -> None:
    """Refuse schemas that come back to themselves before a value is written."""
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
        reader.refuse("", f"{rounds} references and unions lead to one another", f"up to {MAX_NESTING}")


def _refuse_values(node: Mapping[str, Any], where: str, reader: ConstraintReader) -> None:
    """Refuse values that a supported keyword cannot have here."""
    if where and "$id" in node:
        reader.refuse(inside(where, "$id"), "the keyword '$id' is not supported below the root", "$defs and $ref")
    if node.get("nullable") and "null" not in node.get("type", ()):
        message = "the keyword 'nullable' has no meaning in Draft 2020-12, so that null would not conform"
        reader.refuse(inside(where, "nullable"), message, _INSTEAD["nullable"])
    if node.get("format", "date") not in PATTERNS:
        message = f"the format {node['format']!r} is not supported"
        reader.refuse(inside(where, "format"), message, ", ".join(sorted(PATTERNS)))
    if node.get("enum") == []:
        reader.refuse(inside(where, "enum"), "the enum is empty, so that nothing conforms", "at least one value")
