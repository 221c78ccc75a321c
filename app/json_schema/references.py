"""References: the place in a schema that a `$ref` names. Only places in the same document can be named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from app.json_schema.values import shown

#: What messages say is accepted.
ACCEPTED = "a reference into the schema itself, such as '#/$defs/name'"

#: Keywords whose value is a schema.
ONE = frozenset(
    {"additionalProperties", "propertyNames", "items", "contains", "not", "if", "then", "else", "unevaluatedItems"}
    | {"unevaluatedProperties", "contentSchema"}
)
#: Keywords whose value is a list of schemas.
LISTS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
#: Keywords whose value is a mapping of names to schemas.
MAPPINGS = frozenset({"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"})


class Unresolvable(Exception):
    """The reference names nothing in the schema; the message says so."""


def resolved(root: Any, reference: str) -> Any:
    """The schema that a reference names. Raises Unresolvable."""
    if not reference.startswith("#"):
        raise Unresolvable(f"$ref {shown(reference)} leads out of the schema; nothing is fetched")
    name = unquote(reference[1:])
    found = _at(root, name) if not name or name.startswith("/") else _anchored(root, name)
    if not isinstance(found, Mapping | bool):
        raise Unresolvable(f"$ref {shown(reference)} names nothing in the schema")
    return found


def subschemas(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas inside a schema with their paths, references not followed. Malformed keywords are passed over."""
    for keyword, value in schema.items():
        if keyword in ONE:
            yield f".{keyword}", value
        elif keyword in LISTS and isinstance(value, list | tuple):
            yield from ((f".{keyword}[{i}]", item) for i, item in enumerate(value))
        elif keyword in MAPPINGS and isinstance(value, Mapping):
            yield from ((f".{keyword}.{name}", item) for name, item in value.items())


def _at(root: Any, pointer: str) -> Any:
    """What a JSON pointer (RFC 6901) names; None where there is nothing."""
    node = root
    for raw in pointer.split("/")[1:]:
        step = raw.replace("~1", "/").replace("~0", "~")
        if isinstance(node, Mapping) and step in node:
            node = node[step]
        elif isinstance(node, list | tuple) and step.isascii() and step.isdigit() and len(step) < 9:
            node = node[int(step)] if int(step) < len(node) else None
        else:
            return None
    return node


def _anchored(root: Any, name: str) -> Any:
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if isinstance(node, Mapping):
            if name in (node.get("$anchor"), node.get("$dynamicAnchor")):
                return node
            waiting += (inner for _, inner in subschemas(node))
    return None
