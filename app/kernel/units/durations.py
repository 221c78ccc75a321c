"""
Durations as people write them: `90`, `1.5`, `"500ms"`, `"15s"`, `"2m"`, `"1h30m"`, `"7d"`.

A bare number counts seconds. Negative durations are refused.
"""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, PlainSerializer, WithJsonSchema

#: The accepted formats, for error messages.
ACCEPTED = "seconds as a number, or a text such as '500ms', '15s', '2m', '1h30m', '7d'"

#: The texts that `parse` reads, for a JSON Schema.
PATTERN = r"^\s*([0-9]+(\.[0-9]+)?|([0-9]+(\.[0-9]+)?([mM][sS]|[sSmMhHdD]))+)\s*$"

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
#: Larger numbers are replaced by this one, which is above the limit: Python's integers may exceed a float.
_OUT_OF_RANGE = 1e12
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")


def parse(value: Any) -> timedelta:
    """
    Return the duration that `value` describes.

    A value is a number of seconds, a text such as '1h30m', or a timedelta. Raises ValueError for all others, for
    negative durations, and for ten years or more.
    """
    if isinstance(value, timedelta):
        seconds = value.total_seconds()
    elif isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value) if abs(value) < _OUT_OF_RANGE else _OUT_OF_RANGE
    else:
        seconds = _parse_text(str(value).strip().lower())
    if not 0 <= seconds < 10 * 365 * 86400:
        raise ValueError(f"{value!r} is not a duration between 0 and ten years: write {ACCEPTED}")
    return timedelta(seconds=seconds)


def show(value: timedelta) -> str:
    """Return the shortest text that `parse` reads as this duration, rounded to milliseconds."""
    rest, parts = round(value.total_seconds() * 1000), []
    for unit, size in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)):
        count, rest = divmod(rest, size)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts) or "0s"


def at_least(text: str) -> AfterValidator:
    """Return a validator for fields: their duration is at least this one."""
    minimum = parse(text)

    def check(value: timedelta) -> timedelta:
        if value < minimum:
            raise ValueError(f"must be at least {text}")
        return value

    return AfterValidator(check)


def _parse_text(text: str) -> float:
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    parts = _PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"{text!r} is not a duration: write {ACCEPTED}")
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


#: A pydantic field that accepts the same values as `parse`.
Duration = Annotated[
    timedelta,
    BeforeValidator(parse),
    PlainSerializer(show, return_type=str),
    WithJsonSchema(
        {
            "anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": PATTERN}],
            "description": ACCEPTED,
            "examples": ["15s", "2m", 90],
        }
    ),
]
