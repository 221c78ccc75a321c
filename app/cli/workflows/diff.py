"""Printing of the differences between two workflow definitions."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from rich.text import Text

from app.cli.output import console

_STYLES: Mapping[str, str] = {"+": "green", "-": "red", "@": "dim"}
_MARKS: Mapping[str, str] = {"added": "+", "removed": "-", "changed": "~", "reordered": "~"}


def print_changes(changes: Sequence[Mapping[str, Any]]) -> None:
    """Print each change with its path, and below it the old and the new value."""
    out = console()
    if not changes:
        out.print("no differences")
    for change in changes:
        mark, note = _MARKS[change["kind"]], "  (only the order)" if change["kind"] == "reordered" else ""
        out.print(Text(f"{mark} {change['path'] or 'document'}{note}", style="bold " + _STYLES.get(mark, "yellow")))
        for line in _lines_of(change):
            out.print(Text(f"    {line}", style=_STYLES.get(line[:1], "")), soft_wrap=True)


def _lines_of(change: Mapping[str, Any]) -> Iterator[str]:
    if change["kind"] == "added":
        yield from (f"+ {line}" for line in _written(change["new"]))
    elif change["kind"] == "removed":
        yield from (f"- {line}" for line in _written(change["old"]))
    else:
        old, new = _written(change["old"]), _written(change["new"])
        # The first two lines are the file names of the diff format.
        for line in list(difflib.unified_diff(old, new, n=1, lineterm=""))[2:]:
            if not line.startswith("@@"):
                yield f"{line[0]} {line[1:]}"
            elif len(old) + len(new) > 2:
                yield line


def _written(value: Any) -> list[str]:
    """Return the lines of a value as in a YAML file."""
    if isinstance(value, str):
        return value.splitlines() or ['""']
    if isinstance(value, bool | int | float | None):
        return ["null" if value is None else str(value).lower()]
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)).splitlines()
