"""
Scores of a message, each from 0 to 1.

Accuracy: the part of its fields that validate and, where the target was read back, agree with what it has.
Completeness: the part of the expected fields that are there and not empty.
Timeliness: 1 within the deadline, and the deadline by the time it took after it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

_EMPTY: tuple[Any, ...] = (None, "", [], {})


@dataclass(frozen=True, slots=True)
class MessageScores:
    """The scores of one message."""

    accuracy: float
    completeness: float
    timeliness: float


def accuracy(valid_fields: int, fields: int, payload: Mapping[str, Any], read: Any = None) -> float:
    """Return the accuracy. `read` is what the target has, or None where it was not asked."""
    if read is not None and payload:
        return sum(agrees(value, read, name) for name, value in payload.items()) / len(payload)
    return valid_fields / fields if fields else 1.0


def agrees(value: Any, read: Any, name: str) -> bool:
    """Whether the target has the value. Servers that keep texts only give numbers and booleans as texts."""
    if not isinstance(read, Mapping):
        return False
    found = read.get(name)
    if found == value and isinstance(found, bool) == isinstance(value, bool):
        return True
    if value in _EMPTY and found in _EMPTY:
        return True
    return isinstance(found, str) and not isinstance(value, str | list | dict) and found.lower() == str(value).lower()


def completeness(expected: Collection[str], payload: Mapping[str, Any]) -> float:
    """Return the completeness; 1 when nothing is expected."""
    return sum(payload.get(name) not in _EMPTY for name in expected) / len(expected) if expected else 1.0


def timeliness(took: timedelta, deadline: timedelta) -> float:
    """Return the timeliness of a message that took so long."""
    return 1.0 if took <= deadline else deadline / took
