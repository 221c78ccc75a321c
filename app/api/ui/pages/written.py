"""Documents as a person would write them, and what differs between two of them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml


@dataclass(frozen=True, slots=True)
class DiffLine:
    """A line of a comparison."""

    #: ` `, `+` or `-`; `…` where equal lines are left out.
    sign: str
    text: str


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:  # noqa: ARG002 it overrides
        """Indent lists below their key."""
        super().increase_indent(flow, indentless=False)


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def written(document: Mapping[str, Any]) -> str:
    """Return a document as YAML."""
    text: str = yaml.dump(_ordered(document), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return text


def _ordered(value: Any) -> Any:
    """Return a document whose parts begin with what names them."""
    if isinstance(value, Mapping):
        first = [key for key in ("id", "kind") if key in value] if "kind" in value else []
        return {key: _ordered(value[key]) for key in (*first, *(key for key in value if key not in first))}
    return [_ordered(one) for one in value] if isinstance(value, list | tuple) else value


def compared(before: str, after: str, around: int = 3) -> Sequence[DiffLine]:
    """Return the lines of a comparison, with a few equal lines around each difference."""
    found = list(difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=around))[3:]
    return [DiffLine("…", "") if line.startswith("@@") else DiffLine(line[:1], line[1:]) for line in found]
