"""
YAML texts, in the core schema of YAML 1.2, read into plain data with the line of each value.

Aliases and merges count as often as they stand for something, before they are built.
"""

from __future__ import annotations

import math
import re
from typing import Any, TypeAlias

import yaml

from app.kernel.errors import InvalidDefinition, Problem
from app.workflows.expressions.cel.values import is_whole
from app.workflows.language.json_text import MAX_DEPTH, MAX_DIGITS, MAX_VALUES, below

#: Characters of a YAML text. JSON may be longer: it is read faster.
MAX_LENGTH = 1 << 20
#: Characters of a number, signs and separators included.
_LONGEST_NUMBER = MAX_DIGITS + 20


def read(text: str) -> tuple[Any, dict[str, int]]:
    """The data of a YAML text, and the line of each value by path. Raises InvalidDefinition."""
    if len(text) > MAX_LENGTH:
        message = f"the YAML has {len(text)} characters"
        raise InvalidDefinition([Problem("", message, f"up to {MAX_LENGTH} characters of YAML; JSON may be longer")])
    try:
        _measure(text)
        node = yaml.compose(text, Loader=_Loader)
        if node is None:
            raise InvalidDefinition([Problem("", "the document is empty", "a workflow in YAML or JSON", 1)])
        reader = _Reader()
        return reader.value(node, "", 0), reader.lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        # The end of the text is told as a line of its own.
        line = min(mark.line, len(text.splitlines()) - 1) + 1 if mark else None
        raise _malformed(error.problem or "it cannot be read", line) from None
    except yaml.YAMLError as error:
        raise _malformed(str(error).splitlines()[0], None) from None
    except UnicodeEncodeError:
        raise _malformed("it holds half a character (a lone surrogate)", None) from None
    except RecursionError:
        raise InvalidDefinition([Problem("", _TOO_DEEP)]) from None


def _measure(text: str) -> None:
    """See that the document is neither too deep nor too large: the library's composer calls itself for each level."""
    depth = count = 0
    for event in yaml.parse(text, Loader=_Loader):
        line = event.start_mark.line + 1 if event.start_mark else None
        count += isinstance(event, yaml.NodeEvent)
        if count > 2 * MAX_VALUES:
            raise InvalidDefinition([Problem("", _TOO_MANY, line=line)])
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH + 1:
            raise InvalidDefinition([Problem("", _TOO_DEEP, line=line)])


_TOO_MANY = f"the document holds more than {MAX_VALUES} values"
_TOO_DEEP = f"the document is nested deeper than {MAX_DEPTH} levels"


#: The parser in C where the library has it: it is many times as fast.
_Parser: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Parser):  # type: ignore[misc, valid-type] # one of two classes
    """YAML 1.1 without its surprises: the core schema of YAML 1.2."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":timestamp", ":value"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_MERGE = "tag:yaml.org,2002:merge"

#: The fields of a mapping by name: the node of the name, and that of the value.
_Fields: TypeAlias = dict[str, tuple[yaml.Node, yaml.Node]]


class _Reader:
    """Turns nodes into plain data and keeps their lines."""

    def __init__(self) -> None:
        self.lines: dict[str, int] = {}
        self._constructor = _Loader("")
        self._left = MAX_VALUES
        self._known: dict[int, _Fields] = {}

    def value(self, node: yaml.Node, path: str | None, depth: int) -> Any:
        line = node.start_mark.line + 1
        self._count(path, line)
        if depth > MAX_DEPTH:
            raise InvalidDefinition([Problem(path or "", _TOO_DEEP, line=line)])
        if path is not None:
            self.lines.setdefault(path, line)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, depth)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, below(path, f"[{i}]"), depth + 1) for i, item in enumerate(node.value)]
        return self._scalar(node, path, line)

    def _count(self, path: str | None, line: int) -> None:
        self._left -= 1
        if self._left < 0:
            raise InvalidDefinition([Problem(path or "", _TOO_MANY, line=line)])

    def _scalar(self, node: yaml.Node, path: str | None, line: int) -> Any:
        number = node.tag.endswith((":int", ":float"))
        if number and len(node.value) > _LONGEST_NUMBER:
            value, reason = None, f"a number has more than {MAX_DIGITS} digits"
        else:
            try:
                value, reason = self._constructor.construct_object(node), ""
            except (yaml.YAMLError, ValueError, OverflowError) as error:
                value, reason = None, getattr(error, "problem", None) or str(error)
        if not reason:
            reason = _unkept(value)
        if reason:
            raise InvalidDefinition([Problem(path or "", f"this value cannot be read: {reason}", line=line)])
        return value

    def _mapping(self, node: yaml.MappingNode, path: str | None, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, (key_node, value_node) in self._fields(node, path, 0).items():
            inner = below(path, f".{name}")
            if inner is not None:
                self.lines.setdefault(inner, key_node.start_mark.line + 1)
            result[name] = self.value(value_node, inner, depth + 1)
        return result

    def _fields(self, node: yaml.Node, path: str | None, depth: int) -> _Fields:
        """The fields of a mapping: those that it merges in, then its own, which count before them."""
        line = node.start_mark.line + 1
        if not isinstance(node, yaml.MappingNode):
            raise InvalidDefinition([Problem(path or "", "'<<' merges mappings only", "an alias of a mapping", line)])
        if depth > MAX_DEPTH:
            message = f"mappings are merged into one another more than {MAX_DEPTH} times"
            raise InvalidDefinition([Problem(path or "", message, line=line)])
        if id(node) not in self._known:
            merged: _Fields = {}
            own: _Fields = {}
            for key_node, value_node in node.value:
                if key_node.tag == _MERGE:
                    for part in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
                        for name, field in self._fields(part, path, depth + 1).items():
                            self._count(path, line)
                            merged.setdefault(name, field)
                else:
                    own[self._name(key_node, own, path)] = (key_node, value_node)
            self._known[id(node)] = merged | own
        return self._known[id(node)]

    def _name(self, node: yaml.Node, own: _Fields, path: str | None) -> str:
        line = node.start_mark.line + 1
        if not isinstance(node, yaml.ScalarNode):
            raise InvalidDefinition([Problem(path or "", "a key must be a text", line=line)])
        name = str(node.value)
        if name in own:
            message = f"the key stands twice, first in line {own[name][0].start_mark.line + 1}"
            raise InvalidDefinition([Problem(below(path, f".{name}") or "", message, line=line)])
        if not is_whole(name):
            raise InvalidDefinition([Problem(path or "", f"a key holds {_HALF}", line=line)])
        return name


_HALF = "half a character (a lone surrogate), which UTF-8 cannot"


def _unkept(value: Any) -> str:
    """Why a value cannot be kept; empty where it can."""
    if isinstance(value, str):
        return "" if is_whole(value) else f"it holds {_HALF}"
    if isinstance(value, float):
        return "" if math.isfinite(value) else "it is none of the numbers that JSON knows"
    if isinstance(value, int):
        return "" if value.bit_length() < 1024 else f"a number has more than {MAX_DIGITS} digits"
    return "" if value is None else "it is no text, number or truth value"


def _malformed(reason: str, line: int | None) -> InvalidDefinition:
    return InvalidDefinition([Problem("", f"this is neither YAML nor JSON: {reason}", line=line)])
