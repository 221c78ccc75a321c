"""
Expiry: what goes when its time is over, a batch in each transaction.

Runs whose retention is over go with all that belongs to them; then the definitions and payloads that nothing refers to
any more. Any number of these may go on at once: each passes over what another has locked.
What is shared is looked through by its hashes, round about from a place drawn by chance: where there is no time for all
of it, the next one begins elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable

from app.kernel.database import Database, Work
from app.workflows import payloads, store, unused

#: Runs of one transaction. Each takes its steps with it, and a map has many.
_RUNS = 50
#: Definitions or payloads that one transaction looks at.
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


def remove_definitions(database: Database, in_time: InTime = lambda: True, chance: float = 0.0) -> int:
    """Remove definitions that no run and no version of a workflow refers to; gives how many."""
    return _walk(database, lambda work, after: unused.remove(work, "definition", after, _SHARED), in_time, chance)


def remove_payloads(database: Database, in_time: InTime = lambda: True, chance: float = 0.0) -> int:
    """Remove payloads that nothing refers to; gives how many."""
    return _walk(database, lambda work, after: payloads.remove(work, after, _SHARED), in_time, chance)


def _walk(
    database: Database, remove: Callable[[Work, str], tuple[int, str | None]], in_time: InTime, chance: float
) -> int:
    start = f"{int(chance * 2**32):08x}"
    removed, after, around = 0, start, False
    while in_time():
        with database.work() as work:
            batch, last = remove(work, after)
        removed += batch
        if around and (last is None or last > start):
            break
        around = around or last is None
        after = last or ""
    return removed
