"""
Expiry: what goes when its time is over, a batch in each transaction.

Runs whose retention is over go with all that belongs to them; then the definitions and payloads that nothing refers to
any more. Any number of these may go on at once: each passes over what another has locked.
"""

from __future__ import annotations

from collections.abc import Callable

from app.kernel.database import Database, Work
from app.workflows import payloads, store, unused

#: Runs of one transaction. Each takes its steps with it, and a map has many.
_RUNS = 50
#: Definitions or payloads of one transaction.
_SHARED = 200

#: Whether there is time for another batch.
InTime = Callable[[], bool]


def remove_runs(database: Database, in_time: InTime = lambda: True) -> int:
    """Remove runs whose retention is over; gives how many, those that they called not counted."""
    removed = 0
    while in_time():
        with database.work() as work:
            batch = store.remove_expired(work, _RUNS)
        removed += batch
        if batch < _RUNS:
            break
    return removed


def remove_definitions(database: Database, in_time: InTime = lambda: True) -> int:
    """Remove definitions that no run and no version of a workflow refers to; gives how many."""
    return _walk(database, lambda work, after: unused.remove(work, "definition", after, _SHARED), in_time)


def remove_payloads(database: Database, in_time: InTime = lambda: True) -> int:
    """Remove payloads that nothing refers to; gives how many."""
    return _walk(database, lambda work, after: payloads.remove(work, after, _SHARED), in_time)


def _walk(database: Database, remove: Callable[[Work, str], tuple[int, str | None]], in_time: InTime) -> int:
    removed = 0
    after: str | None = ""
    while after is not None and in_time():
        with database.work() as work:
            batch, after = remove(work, after)
        removed += batch
    return removed
