"""
Parsing of YAML documents (core schema of YAML 1.2) with limits, and the line of each value.

Each use of an alias and each merged field counts as a value, before it is built.
"""

from __future__ import annotations

import math
import re
from typing import Any, TypeAlias

import yaml

from app.json_schema.values import is_encodable
from app.kernel.errors import InvalidDefinition, Problem
from app.workflows.language.json_text import MAX_DEPTH, MAX_DIGITS, MAX_VALUES, child_path

#: Maximum characters of a YAML text. JSON may be longer, because its parser is faster.
MAX_LENGTH = 1 << 20
#: Maximum characters of a number, signs and separators included.
_MAX_NUMBER_LENGTH = MAX_DIGITS + 20


def read(text: str) -> tuple[Any, dict[str, int]]:
    """Return the data of a YAML text, and the line of each value by path. Raises InvalidDefinition."""
    if len(text) > MAX_LENGTH:
        message = f"the YAML has {len(text)} characters"
        raise InvalidDefinition([Problem("", message, f"up to {MAX_LENGTH} characters of YAML; JSON may be longer")])
    try:
        _check_size(text)
        node = yaml.compose(text, Loader=_Loader)
        if node is None:
            raise InvalidDefinition([Problem("", "the document is empty", "a workflow in YAML or JSON", 1)])
        reader = _Reader()
        return reader.value(node, "", 0), reader.lines
    except yaml.MarkedYAMLError as error:
        if _PARSER_TOO_DEEP in (error.problem or ""):
            raise InvalidDefinition([Problem("", _TOO_DEEP)]) from None
        mark = error.problem_mark or error.context_mark
        # The parser reports the end of the text as an additional line.
        line = min(mark.line, len(text.splitlines()) - 1) + 1 if mark else None
        raise _malformed(error.problem or "it cannot be read", line) from None
    except yaml.YAMLError as error:
        raise _malformed(str(error).splitlines()[0], None) from None
    except UnicodeEncodeError:
        raise _malformed("it contains a lone surrogate", None) from None
    except RecursionError:
        raise InvalidDefinition([Problem("", _TOO_DEEP)]) from None


def _check_size(text: str) -> None:
    """
    Check the limits on depth and values. Raises InvalidDefinition.

    This happens before `yaml.compose`, which recurses for each level.
    """
    depth = count = 0
    for event in yaml.parse(text, Loader=_Loader):
        line = event.start_mark.line + 1 if event.start_mark else None
        count += isinstance(event, yaml.NodeEvent)
        if count > 2 * MAX_VALUES:
            raise InvalidDefinition([Problem("", _TOO_MANY, line=line)])
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH + 1:
            raise InvalidDefinition([Problem("", _TOO_DEEP, line=line)])


_TOO_MANY = f"the document has more than {MAX_VALUES} values"
_TOO_DEEP = f"the document is nested deeper than {MAX_DEPTH} levels"
#: How the C parser calls nesting beyond its own limit, which it meets before it returns the first event.
_PARSER_TOO_DEEP = "maximum nesting"


#: The C parser where PyYAML was built with it: it is many times faster.
_Parser: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Parser):  # type: ignore[misc, valid-type] # one of two classes
    """A loader for the core schema of YAML 1.2, in place of YAML 1.1."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":timestamp", ":value"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_MERGE = "tag:yaml.org,2002:merge"

#: The fields of a mapping by name: the node of the key, and the node of the value.
_FieldNodes: TypeAlias = dict[str, tuple[yaml.Node, yaml.Node]]


class _Reader:
    """Converts nodes to plain data and records their lines."""

    def __init__(self) -> None:
        self.lines: dict[str, int] = {}
        self._constructor = _Loader("")
        self._remaining_values = MAX_VALUES
        self._merged_fields: dict[int, _FieldNodes] = {}

    def value(self, node: yaml.Node, path: str | None, depth: int) -> Any:
        line = node.start_mark.line + 1
        self._charge(path, line)
        if depth > MAX_DEPTH:
            raise InvalidDefinition([Problem(path or "", _TOO_DEEP, line=line)])
        if path is not None:
            self.lines.setdefault(path, line)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, depth)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, child_path(path, f"[{i}]"), depth + 1) for i, item in enumerate(node.value)]
        return self._scalar(node, path, line)

    def _charge(self, path: str | None, line: int) -> None:
        self._remaining_values -= 1
        if self._remaining_values < 0:
            raise InvalidDefinition([Problem(path or "", _TOO_MANY, line=line)])

    def _scalar(self, node: yaml.Node, path: str | None, line: int) -> Any:
        number = node.tag.endswith((":int", ":float"))
        if number and len(node.value) > _MAX_NUMBER_LENGTH:
            value, reason = None, f"a number has more than {MAX_DIGITS} digits"
        else:
            try:
                value, reason = self._constructor.construct_object(node), ""
            except (yaml.YAMLError, ValueError, OverflowError) as error:
                value, reason = None, getattr(error, "problem", None) or str(error)
        if not reason:
            reason = _unstorable_reason(value)
        if reason:
            raise InvalidDefinition([Problem(path or "", f"this value cannot be read: {reason}", line=line)])
        return value

    def _mapping(self, node: yaml.MappingNode, path: str | None, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, (key_node, value_node) in self._fields(node, path, 0).items():
            inner = child_path(path, f".{name}")
            if inner is not None:
                self.lines.setdefault(inner, key_node.start_mark.line + 1)
            result[name] = self.value(value_node, inner, depth + 1)
        return result

    def _fields(self, node: yaml.Node, path: str | None, depth: int) -> _FieldNodes:
        """Return the fields of a mapping: the merged fields, overridden by its own fields."""
        line = node.start_mark.line + 1
        if not isinstance(node, yaml.MappingNode):
            raise InvalidDefinition(
                [Problem(path or "", "'<<' can merge mappings only", "an alias of a mapping", line)]
            )
        if depth > MAX_DEPTH:
            message = f"merged mappings are nested deeper than {MAX_DEPTH} levels"
            raise InvalidDefinition([Problem(path or "", message, line=line)])
        if id(node) not in self._merged_fields:
            merged: _FieldNodes = {}
            own: _FieldNodes = {}
            for key_node, value_node in node.value:
                if key_node.tag == _MERGE:
                    for part in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
                        for name, field in self._fields(part, path, depth + 1).items():
                            self._charge(path, line)
                            merged.setdefault(name, field)
                else:
                    own[self._key_name(key_node, own, path)] = (key_node, value_node)
            self._merged_fields[id(node)] = merged | own
        return self._merged_fields[id(node)]

    def _key_name(self, node: yaml.Node, own: _FieldNodes, path: str | None) -> str:
        line = node.start_mark.line + 1
        if not isinstance(node, yaml.ScalarNode):
            raise InvalidDefinition([Problem(path or "", "a key must be a string", line=line)])
        name = str(node.value)
        if name in own:
            message = f"duplicate key, first in line {own[name][0].start_mark.line + 1}"
            raise InvalidDefinition([Problem(child_path(path, f".{name}") or "", message, line=line)])
        if not is_encodable(name):
            raise InvalidDefinition([Problem(path or "", f"a key contains {_LONE_SURROGATE}", line=line)])
        return name


_LONE_SURROGATE = "a lone surrogate, which UTF-8 cannot encode"


def _unstorable_reason(value: Any) -> str:
    """Return the reason why a value cannot be stored; empty when it can."""
    if isinstance(value, str):
        return "" if is_encodable(value) else f"it contains {_LONE_SURROGATE}"
    if isinstance(value, float):
        return "" if math.isfinite(value) else "JSON has no infinity and no NaN"
    if isinstance(value, int):
        return "" if value.bit_length() < 1024 else f"a number has more than {MAX_DIGITS} digits"
    return "" if value is None else "it is not a string, a number, a boolean or null"


def _malformed(reason: str, line: int | None) -> InvalidDefinition:
    return InvalidDefinition([Problem("", f"this is neither YAML nor JSON: {reason}", line=line)])
