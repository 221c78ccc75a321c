"""
The source of a document: YAML or JSON text, parsed into plain data with the line of each value.

YAML uses the core schema of YAML 1.2: `yes`, `on` and `2026-11-21` are strings, only `true` and `false` are booleans.
Duplicate keys are rejected, and so are values that JSON or UTF-8 cannot represent: infinite numbers, lone surrogates.
Values, depth, aliases and merges are counted before they are built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from app.kernel.errors import InvalidDefinition, Problem
from app.workflows.language import json_text, yaml_text

#: The syntax of a text; `any` is JSON when it parses as JSON, and YAML otherwise.
Syntax = Literal["json", "yaml", "any"]


@dataclass(frozen=True, slots=True)
class SourceDocument:
    """Parsed data, and the line of each of its values by path (`steps[0].needs[1]`)."""

    data: Any
    lines: Mapping[str, int]
    #: The path of `data` within the whole document, to which the paths of `lines` refer.
    prefix: str = ""

    def line(self, path: str) -> int | None:
        """Return the line of the value at `path`, or of the nearest enclosing value; None when it is unknown."""
        path = f"{self.prefix}.{path}" if self.prefix and path else self.prefix or path
        while path and path not in self.lines:
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return self.lines.get(path)

    def within(self, name: str) -> SourceDocument:
        """Return the source of the field `name`."""
        return replace(self, data=self.data[name], prefix=f"{self.prefix}.{name}".lstrip("."))


def read(text: str, syntax: Syntax = "any") -> SourceDocument:
    """
    Parse YAML or JSON.

    Raises InvalidDefinition with the line of a syntax error, of a duplicate key, or of a value beyond the limits.
    """
    if not text.strip():
        raise InvalidDefinition([Problem("", "the document is empty", "a document in YAML or JSON", 1)])
    if syntax == "json" or (syntax == "any" and json_text.looks_like_json(text)):
        try:
            return SourceDocument(json_text.parse(text), json_text.Lines(text))
        except json_text.NotJson as error:
            if syntax == "json":
                raise InvalidDefinition([Problem("", f"this is not JSON: {error}", line=error.line)]) from None
    data, lines = yaml_text.read(text)
    return SourceDocument(data, lines)
