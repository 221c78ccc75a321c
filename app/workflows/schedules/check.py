"""
Checks of a schedule document that need no database.

One call reports every problem, each with its path, its line (where the source has lines) and what would be accepted.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from zoneinfo import available_timezones

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from app.kernel.errors import InvalidInput, Problem
from app.kernel.units import durations
from app.workflows.language import source
from app.workflows.language.source import SourceDocument
from app.workflows.schedules.schedule import EXCLUDED_ZONES, CatchUp, Schedule

#: How messages call the input.
SUBJECT = "schedule"


def parse(text: str) -> Schedule:
    """Return a schedule from YAML or JSON text. Raises InvalidInput with every problem found."""
    try:
        document = source.read(text)
    except InvalidInput as error:
        raise InvalidInput(error.problems, SUBJECT) from None
    return check(document)


def check(document: SourceDocument) -> Schedule:
    """Return a schedule from plain data. Raises InvalidInput with every problem found."""
    with with_lines(document):
        try:
            schedule = Schedule.model_validate(document.data)
        except ValidationError as error:
            raise InvalidInput([_problem(item) for item in error.errors()]) from None
        if problems := list(_problems(schedule)):
            raise InvalidInput(problems)
    return schedule


@contextmanager
def with_lines(document: SourceDocument) -> Iterator[None]:
    """Add the lines of the document to the problems of an InvalidInput that the block raises."""
    try:
        yield
    except InvalidInput as error:
        found = [Problem(p.where, p.message, p.accepted, document.line(p.where)) for p in error.problems]
        raise InvalidInput(sorted(found, key=lambda problem: problem.line or 0), SUBJECT) from None


def nearest(name: str, known: Sequence[str]) -> str:
    """Return the accepted names for a message, with the most similar one as a suggestion."""
    close = difflib.get_close_matches(name, known, n=1)
    listed = ", ".join(known[:12]) + (", …" if len(known) > 12 else "")
    return f"{listed}; did you mean {close[0]!r}?" if close else listed


def _problems(schedule: Schedule) -> Iterator[Problem]:
    starts, ends = schedule.starts, schedule.ends
    if starts is not None and ends is not None and ends <= starts:
        yield Problem("end", "the end is not after the start", f"an instant after {schedule.start}")
    if schedule.catch_up.runs == "latest" and "limit" in schedule.catch_up.model_fields_set:
        yield Problem("catch_up.limit", "'limit' can be used with 'runs: all' only", "runs: all")


def _problem(item: ErrorDetails) -> Problem:
    where, kind, given = ".".join(str(part) for part in item["loc"]), item["type"], item["input"]
    message, accepted, shown = item["msg"].removeprefix("Value error, "), "", _shown(given)
    if kind == "extra_forbidden":
        fields = CatchUp.model_fields if item["loc"][0] == "catch_up" else Schedule.model_fields
        message, accepted = "unknown field", nearest(str(item["loc"][-1]), list(fields))
    elif kind == "missing":
        message = "this field is missing"
    elif kind == "model_type":
        message = "this must be a mapping of fields"
    elif where == "schedule" and kind == "string_pattern_mismatch":
        message, accepted = f"{shown} is not a schedule name", "lower-case words joined by hyphens"
    elif where == "timezone" and kind == "value_error":
        message, accepted = f"{shown}: {message}", _zone_suggestion(str(given)[:100])
    elif where and not isinstance(given, dict | list) and shown not in message:
        message = f"{shown}: {message}"
    return Problem(where, message, accepted)


def _shown(value: Any) -> str:
    """Return a value for a message, shortened."""
    text = repr(durations.show(value) if isinstance(value, timedelta) else value)
    return text if len(text) <= 100 else f"{text[:99]}…"


def _zone_suggestion(name: str) -> str:
    """Return what is accepted, and suggests a zone whose name, or the last part of it, is similar."""
    zones = sorted((zone for zone in available_timezones() if not zone.startswith(EXCLUDED_ZONES)), reverse=True)
    by_place = {zone.rpartition("/")[2]: zone for zone in zones}
    wanted = name.replace(" ", "_")
    close = difflib.get_close_matches(wanted, zones, n=1, cutoff=0.75)
    close += [by_place[place] for place in difflib.get_close_matches(wanted, by_place, n=1, cutoff=0.8)]
    return "a name of the IANA database" + (f"; did you mean {close[0]!r}?" if close else "")
