"""References: resolves a `$ref` to a schema in the same document. Other documents are never fetched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from app.json_schema.values import excerpt

#: What error messages say is accepted.
ACCEPTED = "a reference into the schema itself, such as '#/$defs/name'"

#: Keywords whose value is a schema.
SCHEMA_KEYWORDS = frozenset(
    {"additionalProperties", "propertyNames", "items", "contains", "not", "if", "then", "else", "unevaluatedItems"}
    | {"unevaluatedProperties", "contentSchema"}
)
#: Keywords whose value is a list of schemas.
SCHEMA_LIST_KEYWORDS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
#: Keywords whose value is a mapping of names to schemas.
SCHEMA_MAPPING_KEYWORDS = frozenset({"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"})


class Unresolvable(Exception):
    """The reference points to nothing in the schema; the message says so."""


def resolved(root: Any, reference: str) -> Any:
    """Returns the schema that a reference points to. Raises Unresolvable."""
    if not reference.startswith("#"):
        raise Unresolvable(f"$ref {excerpt(reference)} leads out of the schema; nothing is fetched")
    name = unquote(reference[1:])
    found = _by_pointer(root, name) if not name or name.startswith("/") else _by_anchor(root, name)
    if not isinstance(found, Mapping | bool):
        raise Unresolvable(f"$ref {excerpt(reference)} points to nothing in the schema")
    return found


def subschemas(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the direct subschemas with their paths, without following references. Malformed keywords are skipped."""
    for keyword, value in schema.items():
        if keyword in SCHEMA_KEYWORDS:
            yield f".{keyword}", value
        elif keyword in SCHEMA_LIST_KEYWORDS and isinstance(value, list | tuple):
            yield from ((f".{keyword}[{i}]", item) for i, item in enumerate(value))
        elif keyword in SCHEMA_MAPPING_KEYWORDS and isinstance(value, Mapping):
            yield from ((f".{keyword}.{name}", item) for name, item in value.items())


def _by_pointer(root: Any, pointer: str) -> Any:
    """Returns the value that a JSON pointer (RFC 6901) points to, or None."""
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


def _by_anchor(root: Any, name: str) -> Any:
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if isinstance(node, Mapping):
            if name in (node.get("$anchor"), node.get("$dynamicAnchor")):
                return node
            waiting += (inner for _, inner in subschemas(node))
    return None
