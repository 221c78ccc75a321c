"""
The source of a workflow: YAML or JSON text, read into plain data that remembers its lines.

YAML as people mean it: `yes`, `on` and `2026-11-21` are texts, only `true` and `false` are truth values.
A key that stands twice is refused, and so is a document that its own aliases blow up.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from app.kernel.errors import InvalidDefinition, Problem

#: Values in one document, aliases counted as often as they stand for something.
MAX_VALUES = 100_000
#: Depth of nesting.
MAX_DEPTH = 64


@dataclass(frozen=True, slots=True)
class Source:
    """Plain data, and the line of each of its values by path (`steps[0].needs[1]`)."""

    data: Any
    lines: Mapping[str, int]

    def line(self, path: str) -> int | None:
        """The line of the value, or of the nearest value around it; None when the source had no lines."""
        while path and path not in self.lines:
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return self.lines.get(path)


def read(text: str) -> Source:
    """
    Read YAML or JSON.

    Raises InvalidDefinition naming the line of what is malformed, doubled or too large.
    """
    # A raw tab stands in JSON between values only, where YAML takes no tabs.
    is_json, data = _json(text)
    try:
        node = yaml.compose(text.replace("\t", " ") if is_json else text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _malformed(error.problem or "it cannot be read", mark.line + 1 if mark else None) from None
    except yaml.YAMLError as error:
        raise _malformed(str(error).splitlines()[0], None) from None
    if node is None:
        raise InvalidDefinition([Problem("", "the document is empty", "a workflow in YAML or JSON", 1)])
    reader = _Reader()
    value = reader.value(node, "", 0)
    # YAML reads the escapes of characters beyond the basic plane as two halves; JSON reads them right.
    return Source(data if is_json else value, reader.lines)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without its surprises: the core schema of YAML 1.2."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":timestamp", ":value"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


class _Reader:
    """Turns nodes into plain data and keeps their lines."""

    def __init__(self) -> None:
        self.lines: dict[str, int] = {}
        self._constructor = _Loader("")
        self._values = 0

    def value(self, node: yaml.Node, path: str, depth: int) -> Any:
        line = node.start_mark.line + 1
        self._values += 1
        if self._values > MAX_VALUES:
            raise InvalidDefinition([Problem(path, f"the document holds more than {MAX_VALUES} values", line=line)])
        if depth > MAX_DEPTH:
            raise InvalidDefinition(
                [Problem(path, f"the document is nested deeper than {MAX_DEPTH} levels", line=line)]
            )
        self.lines.setdefault(path, line)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, depth)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(node.value)]
        try:
            return self._constructor.construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            reason = getattr(error, "problem", None) or str(error)
            raise InvalidDefinition([Problem(path, f"this value cannot be read: {reason}", line=line)]) from None

    def _mapping(self, node: yaml.MappingNode, path: str, depth: int) -> dict[str, Any]:
        self._constructor.flatten_mapping(node)
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = str(key_node.value)
            inner = f"{path}.{key}" if path else key
            if not isinstance(key_node, yaml.ScalarNode):
                raise InvalidDefinition([Problem(path, "a key must be a text", line=line)])
            if key in result:
                first = self.lines.get(inner)
                raise InvalidDefinition([Problem(inner, f"the key stands twice, first in line {first}", line=line)])
            self.lines[inner] = line
            result[key] = self.value(value_node, inner, depth + 1)
        return result


def _json(text: str) -> tuple[bool, Any]:
    try:
        return True, json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return False, None


def _malformed(reason: str, line: int | None) -> InvalidDefinition:
    return InvalidDefinition([Problem("", f"this is neither YAML nor JSON: {reason}", line=line)])
