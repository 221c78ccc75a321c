"""
The clock: the only reader of the wall clock.

Pure modules take `now` as an argument; shells and services take a `Clock`.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

#: Returns the current instant as an aware datetime in UTC.
Clock = Callable[[], datetime]


def now() -> datetime:
    """Return the current instant, in UTC."""
    return datetime.now(UTC)
