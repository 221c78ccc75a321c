"""
Lines of logs: their time, and a form for people.

Arriero's programs write JSON, the servers their own formats. A line without a time belongs to the one before it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rich.text import Text

from app.kernel.security.texts import printable

_JSON_TIME = re.compile(r'"timestamp": ?"([^"]{10,40})"')
_ISO_TIME = re.compile(r"(\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:\.\d+)?) ?(?:Z|UTC)?\b")
#: Valkey's, in the time zone of the machine: `123:M 22 Nov 2026 16:20:45.123 * text`.
_VALKEY_TIME = re.compile(r"\d+:[A-Z] (\d\d \w{3} \d{4} \d\d:\d\d:\d\d\.\d{3})")
#: Fields of a JSON line that are not printed as `key=value`.
_OWN_PLACE = ("timestamp", "level", "event", "logger", "exception")
_LEVELS = {"debug": "dim", "info": "green", "warning": "yellow", "error": "bold red", "critical": "bold red"}


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line of the log of a process."""

    at: datetime
    process: str
    text: str


def lines(process: str, texts: Iterable[str], before: datetime) -> Iterator[LogLine]:
    """Yield the lines of a log in order, each with its time; `before` is that of the first ones that have none."""
    at = before
    for text in texts:
        at = time_of(text) or at
        yield LogLine(at, process, text)


def time_of(text: str) -> datetime | None:
    """Return the time at which a line was written, if it has one."""
    head = text[:64]
    try:
        if text.startswith("{"):
            found = _JSON_TIME.search(text)
            return None if found is None else _aware(datetime.fromisoformat(found[1]))
        if found := _ISO_TIME.match(head):
            return _aware(datetime.fromisoformat(found[1]))
        if found := _VALKEY_TIME.match(head):
            return datetime.strptime(found[1], "%d %b %Y %H:%M:%S.%f").astimezone(UTC)
    except (ValueError, OverflowError):
        return None
    return None


def rendered(line: LogLine) -> Text:
    """Return a line for a terminal: its local time, and JSON as level, event and fields."""
    fields = _fields(line.text)
    time = (f"{line.at.astimezone():%H:%M:%S}.{line.at.microsecond // 1000:03d} ", "dim")
    if fields is None:
        found = _ISO_TIME.match(line.text[:64])
        return (
            Text.assemble(time, printable(line.text[found.end() :].removeprefix(" ")))
            if found
            else Text(printable(line.text))
        )
    level = str(fields.get("level", ""))
    shown = Text.assemble(
        time,
        (f"{printable(level, 8):<8}", _LEVELS.get(level, "")),
        (printable(str(fields.get("event", ""))), "bold"),
    )
    for key, value in fields.items():
        if key not in _OWN_PLACE:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            shown.append(f" {printable(key)}=", "cyan")
            shown.append(printable(text))
    for error in fields.get("exception") or () if isinstance(fields.get("exception"), list) else ():
        shown.append(f"\n  {printable(_exception(error))}", "red")
    return shown


def _exception(error: Any) -> str:
    if not isinstance(error, dict):
        return str(error)
    frames = error.get("frames")
    last = frames[-1] if isinstance(frames, list) and frames and isinstance(frames[-1], dict) else {}
    place = f" ({last.get('filename')}:{last.get('lineno')})" if last else ""
    return f"{error.get('exc_type')}: {error.get('exc_value')}{place}"


def _fields(text: str) -> dict[str, Any] | None:
    if not text.startswith("{"):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _aware(at: datetime) -> datetime:
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at
