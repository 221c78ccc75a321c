"""Output of the commands: tables for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from app.access.namespaces import DEFAULT
from app.kernel.security.texts import printable
from app.kernel.settings import Loaded, Settings

#: An option of every command that prints a table.
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]

#: Columns of a table that is piped: more than any has. A table is as wide as its content.
_UNBOUNDED = 1_000_000

#: The styles of states.
STYLES: Mapping[str, str] = {
    "succeeded": "green",
    "failed": "bold red",
    "cancelled": "yellow",
    "cancelling": "yellow",
    "skipped": "dim",
    "running": "cyan",
    "waiting": "magenta",
    "awaiting": "magenta",
    "compensating": "yellow",
    "blocked": "magenta",
    "ready": "blue",
    "queued": "blue",
    "pending": "dim",
    "active": "green",
    "paused": "yellow",
    "ended": "dim",
    "fired": "green",
    "starting": "cyan",
    "missed": "bold red",
    "degraded": "yellow",
    "validating": "blue",
    "in_progress": "cyan",
    "finalizing": "cyan",
    "completed": "green",
    "expired": "yellow",
}


def settings_of(context: typer.Context) -> Settings:
    """Return the settings that the root command loaded."""
    loaded: Loaded = context.obj
    return loaded.settings


def print_json(value: Any) -> None:
    """Print one JSON document."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def table(columns: Sequence[str], *, right: Sequence[str] = ()) -> Table:
    """Return a plain table; the columns named in `right` are right-aligned."""
    made = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def state(name: str) -> Text:
    """Return a state in its style."""
    return Text(name, STYLES.get(name, ""))


def named(row: Mapping[str, Any]) -> str:
    """Return the name of a workflow or a schedule, after its namespace if that is not `default`."""
    namespace = row["namespace"]
    return str(row["name"]) if namespace in (None, DEFAULT) else f"{namespace}/{row['name']}"


def seconds(value: float | None) -> str:
    """Format a duration for people."""
    if value is None:
        return "-"
    if value < 10:
        return f"{value:.2f} s"
    if value < 120:
        return f"{value:.0f} s"
    return f"{value / 60:.1f} min"


def ago(instant: str | None, now: datetime) -> str:
    """Format the time since an instant of the API."""
    if instant is None:
        return "-"
    passed = now - datetime.fromisoformat(instant).astimezone(UTC)
    return f"{seconds(max(passed.total_seconds(), 0))} ago"


def shortened(value: Any, width: int = 100) -> str:
    """Return a value in one line of at most `width` characters, harmless at a terminal."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    line = printable(" ".join(text.split()))
    return line if len(line) <= width else line[: width - 1] + "…"


def console() -> Console:
    """Return a console on standard output. Lines are wrapped at a terminal only: what is piped stays as it is."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _UNBOUNDED)


def notes() -> Console:
    """Return a console on standard error. It wraps no line, so that commands in a note can be copied."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def print_text(text: str) -> None:
    """Print a text of a model or a user: unchanged into a pipe, harmless at a terminal."""
    typer.echo(printable(text) if sys.stdout.isatty() else text)


def live() -> Console:
    """Return a console on standard error for what is drawn again and again, within the width of the terminal."""
    return Console(stderr=True, highlight=False)
