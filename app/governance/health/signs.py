"""
Signs of life of control workers, in the broker.

A sign says how long ago its worker has received a message of a scheduled job: a worker whose thread lives but whose
consumer does not is told from one that works.

Redis keys:
    arriero:control:<owner>   seconds since the last scheduled job; it expires when the worker is gone

Nothing here connects to Redis.
"""

from __future__ import annotations

from datetime import timedelta

#: For how long a sign lasts, and how often it is renewed.
LASTS, RENEWED = timedelta(seconds=15), timedelta(seconds=5)
#: Matches the signs of all workers.
ALL = "arriero:control:*"


def key(owner: str) -> str:
    """The sign of a worker."""
    return f"arriero:control:{owner}"


def age(value: bytes | None) -> float | None:
    """Return the seconds that a sign says; None when it says nothing."""
    try:
        return None if value is None else max(0.0, float(value))
    except ValueError:
        return None
