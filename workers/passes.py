"""Passes of scheduled jobs: one at a time, in turn, for a limited time."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sqlalchemy import text

from app.kernel import log
from app.kernel.database import Database

_log = log.get(__name__)

#: Most seconds for which a job waits for another one, so that both use one connection when neither has much to do.
_TURN_SECONDS = 0.2

_TRY_LOCK, _UNLOCK = text("SELECT pg_try_advisory_lock(:key)"), text("SELECT pg_advisory_unlock(:key)")
_TURN = threading.Lock()
#: The jobs of this process, each with the lock that it holds while it runs.
_RUNNING: dict[str, threading.Lock] = defaultdict(threading.Lock)


@contextmanager
def in_turn() -> Iterator[None]:
    """Wait a moment for the other jobs that beat triggers at the same time."""
    acquired = _TURN.acquire(timeout=_TURN_SECONDS)
    try:
        yield
    finally:
        if acquired:
            _TURN.release()


@contextmanager
def exclusive(job: str) -> Iterator[bool]:
    """Yield whether the job was not running in this process; if so, it counts as running until the block ends."""
    acquired = _RUNNING[job].acquire(blocking=False)
    if not acquired:
        _log.debug("job_still_running", job=job)
    try:
        yield acquired
    finally:
        if acquired:
            _RUNNING[job].release()


@contextmanager
def alone(database: Database, key: int) -> Iterator[bool]:
    """
    Yield whether no other process has this advisory lock; if so, this one has it until the block ends.

    Raises DatabaseUnreachable.
    """
    with database.session() as connection:
        acquired = bool(connection.execute(_TRY_LOCK, {"key": key}).scalar_one())
        try:
            yield acquired
        finally:
            if acquired:
                connection.execute(_UNLOCK, {"key": key})


def time_limit(seconds: float) -> Callable[[], bool]:
    """Return a predicate that is true for so many seconds."""
    until = time.monotonic() + seconds
    return lambda: time.monotonic() < until
