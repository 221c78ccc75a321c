"""Transactions of runs: how long one waits for locked rows, and what becomes of errors after its commit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from uuid import UUID

import psycopg

from app.kernel import log
from app.kernel.database import Database, UnitOfWork
from app.kernel.errors import DatabaseUnreachable, NotFound, RowsLocked, Unavailable
from app.workflows.runs.storage import store

_log = log.get(__name__)


@contextmanager
def begin(database: Database, lock_wait: timedelta | None) -> Iterator[UnitOfWork]:
    """
    One transaction that waits for locked rows no longer than `lock_wait`, or as long as the database says.

    Raises RowsLocked, DatabaseUnreachable.
    """
    try:
        with database.work() as work:
            if lock_wait is not None:
                store.wait_for_locks(work, lock_wait)
            yield work
    except DatabaseUnreachable as error:
        if isinstance(error.__cause__, psycopg.errors.LockNotAvailable):
            raise RowsLocked("another transaction has locked the rows") from error
        raise


def afterwards(action: Callable[[], object], subject: UUID) -> None:
    """
    Do what follows a commit. Whatever it raises, the commit stands and what else follows it is done: the sweep does
    this again, and ends the run that it raises for.
    """
    try:
        action()
    except (Unavailable, NotFound) as error:
        _log.warning("aftermath_postponed", subject=str(subject), error=str(error))
    except Exception:  # noqa: BLE001 the shell of what follows a commit
        _log.exception("aftermath_broke", subject=str(subject))
