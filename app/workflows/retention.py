"""
Expiry: what goes when its time is over, a batch in each transaction.

Runs whose retention is over go with all that belongs to them, what is below first: called runs, items of maps, the run.
However much belongs to a run, a transaction removes a bounded part of it. Then the definitions and payloads go that
nothing refers to any more. Any number of these may go on at once: each passes over what another has locked, and what
cannot be removed keeps nothing else.
What is shared is looked through by its hashes, round about from a place drawn by chance: where there is no time for all
of it, the next one begins elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from uuid import UUID

import psycopg

from app.kernel import log
from app.kernel.database import Database, UnitOfWork
from app.kernel.errors import DatabaseUnreachable, RowsLocked
from app.workflows import garbage
from app.workflows.runs.changes import transactions
from app.workflows.runs.recovery.sweep import InTime
from app.workflows.runs.storage import removal
from app.workflows.runs.submission import MAX_DEPTH

_log = log.get(__name__)

#: Runs of one transaction. Each takes its steps with it.
_RUNS = 50
#: Items of maps of one transaction.
_ITEMS = 2_000
#: How long a transaction waits for rows that another has locked.
_LOCK_WAIT = timedelta(milliseconds=100)
#: Definitions or payloads that one transaction looks at.
_SHARED = 200


def remove_runs(database: Database, in_time: InTime = lambda: True) -> int:
    """Remove runs whose retention is over; gives how many, those that they called not counted."""
    removed, together = 0, _RUNS
    passed: set[UUID] = set()
    while in_time():
        ids: list[UUID] = []
        try:
            with transactions.begin(database, _LOCK_WAIT) as work:
                ids = removal.expired_runs(work, together, passed)
                removed += _remove_part(work, ids)
        except DatabaseUnreachable:
            raise
        except (RowsLocked, psycopg.Error) as error:
            # Something that belongs to one of them is locked, or cannot be removed: the others go one by one.
            if not ids:
                raise
            if together == 1:
                _log.warning("run_not_removed", run_id=str(ids[0]), error=str(error))
                passed.update(ids)
            together = 1
            continue
        if not ids:
            break
    return removed


def _remove_part(work: UnitOfWork, ids: list[UUID]) -> int:
    """Remove the lowest part of what belongs to runs, or the runs where nothing large is left; gives how many runs."""
    top = ids
    for _ in range(MAX_DEPTH + 1):
        called = removal.called_runs(work, ids, _RUNS)
        if not called:
            break
        ids = called
    if not ids or removal.remove_items(work, ids, _ITEMS) == _ITEMS:
        return 0
    removed = removal.remove_runs(work, ids)
    return removed if ids == top else 0


def remove_definitions(database: Database, in_time: InTime = lambda: True, chance: float = 0.0) -> int:
    """Remove definitions that no run and no version of a workflow refers to; gives how many."""
    return _walk(database, lambda work, after: garbage.remove(work, "definition", after, _SHARED), in_time, chance)


def remove_payloads(database: Database, in_time: InTime = lambda: True, chance: float = 0.0) -> int:
    """Remove payloads that nothing refers to; gives how many."""
    return _walk(database, lambda work, after: garbage.remove(work, "payload", after, _SHARED), in_time, chance)


def _walk(
    database: Database, remove: Callable[[UnitOfWork, str], tuple[int, str | None]], in_time: InTime, chance: float
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
