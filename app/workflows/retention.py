"""
Retention: deletes expired runs, then unreferenced definitions and payloads, one batch in each transaction.

An expired run is deleted with all its data, children first: called runs, items of maps, the run.
A transaction deletes a bounded part of a run, whatever its size.
Concurrent passes are safe: each skips rows that another has locked. A row that cannot be deleted does not block others.
Definitions and payloads are visited in the order of their hashes, from a random start and around to it again: a pass
that runs out of time leaves the rest to one that starts elsewhere.
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

#: Maximum runs that one transaction deletes, with their steps.
_RUNS = 50
#: Maximum items of maps that one transaction deletes.
_ITEMS = 2_000
#: How long a transaction waits for rows that another has locked.
_LOCK_WAIT = timedelta(milliseconds=100)
#: Maximum definitions or payloads that one transaction visits.
_SHARED = 200


def remove_runs(database: Database, in_time: InTime = lambda: True) -> int:
    """Delete expired runs while `in_time()` is true; return their number, without the runs that they called."""
    removed, batch_size = 0, _RUNS
    skipped: set[UUID] = set()
    while in_time():
        ids: list[UUID] = []
        try:
            with transactions.begin(database, _LOCK_WAIT) as work:
                ids = removal.expired_runs(work, batch_size, skipped)
                removed += remove_part(work, ids)
        except DatabaseUnreachable:
            raise
        except (RowsLocked, psycopg.Error) as error:
            # A row of one of the runs is locked or cannot be deleted: continue with one run at a time.
            if not ids:
                raise
            if batch_size == 1:
                _log.warning("run_not_removed", run_id=str(ids[0]), error=str(error))
                skipped.update(ids)
            batch_size = 1
            continue
        if not ids:
            break
    return removed


def remove_ended_run(database: Database, run_id: UUID) -> bool:
    """Delete a run of one step at once, if it has ended; returns whether it was there. Raises RowsLocked."""
    with transactions.begin(database, _LOCK_WAIT) as work:
        return removal.remove_ended_run(work, run_id)


def remove_part(work: UnitOfWork, ids: list[UUID]) -> int:
    """
    Delete a bounded part of the data of runs, children first, and the runs themselves when little is left.

    Returns the number of deleted runs among `ids`.
    """
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


def remove_definitions(database: Database, in_time: InTime = lambda: True, start_fraction: float = 0.0) -> int:
    """
    Delete definitions that no run and no version of a workflow references; return their number.

    `start_fraction`, from [0, 1), is the position in the range of hashes at which the pass starts.
    """
    return _walk(
        database, lambda work, after: garbage.remove(work, "definition", after, _SHARED), in_time, start_fraction
    )


def remove_payloads(database: Database, in_time: InTime = lambda: True, start_fraction: float = 0.0) -> int:
    """Delete payloads that no row references; return their number. `start_fraction` as in `remove_definitions`."""
    return _walk(database, lambda work, after: garbage.remove(work, "payload", after, _SHARED), in_time, start_fraction)


def _walk(
    database: Database,
    remove: Callable[[UnitOfWork, str], tuple[int, str | None]],
    in_time: InTime,
    start_fraction: float,
) -> int:
    first_hash = f"{int(start_fraction * 2**32):08x}"
    removed, after, wrapped = 0, first_hash, False
    while in_time():
        with database.work() as work:
            batch, last = remove(work, after)
        removed += batch
        if wrapped and (last is None or last > first_hash):
            break
        wrapped = wrapped or last is None
        after = last or ""
    return removed
