"""
The source of a workflow: YAML or JSON text, read into plain data that knows its lines.

YAML as people mean it: `yes`, `on` and `2026-11-21` are texts, only `true` and `false` are truth values.
A key that stands twice is refused, and so is what JSON or UTF-8 cannot hold: endless numbers, halves of characters.
Values, depth, aliases and merges are counted before they are built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from app.kernel.errors import InvalidDefinition, Problem
from app.workflows.language import json_text, yaml_text

#: How a text is written; `any` is JSON where it is read as JSON, and YAML otherwise.
Syntax = Literal["json", "yaml", "any"]


@dataclass(frozen=True, slots=True)
class DefinitionSource:
    """Plain data, and the line of each of its values by path (`steps[0].needs[1]`)."""

    data: Any
    lines: Mapping[str, int]
    #: Where the data stands in what the lines are of.
    inside: str = ""

    def line(self, path: str) -> int | None:
        """The line of the value, or of the nearest value around it; None when the source had no lines."""
        path = f"{self.inside}.{path}" if self.inside and path else self.inside or path
        while path and path not in self.lines:
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return self.lines.get(path)

    def within(self, name: str) -> DefinitionSource:
        """The value under a name, with its lines."""
        return replace(self, data=self.data[name], inside=f"{self.inside}.{name}".lstrip("."))


def read(text: str, syntax: Syntax = "any") -> DefinitionSource:
    """
    Read YAML or JSON.

    Raises InvalidDefinition naming the line of what is malformed, doubled or too large.
    """
    if not text.strip():
        raise InvalidDefinition([Problem("", "the document is empty", "a workflow in YAML or JSON", 1)])
    if syntax == "json" or (syntax == "any" and json_text.begins(text)):
        try:
            return DefinitionSource(json_text.value_of(text), json_text.Lines(text))
        except json_text.NotJson as error:
            if syntax == "json":
                raise InvalidDefinition([Problem("", f"this is no JSON: {error}", line=error.line)]) from None
    data, lines = yaml_text.read(text)
    return DefinitionSource(data, lines)
