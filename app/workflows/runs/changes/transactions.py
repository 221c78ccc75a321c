"""Transactions on runs: how long they wait for locks, the settings they follow, and the effects of their commit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import psycopg
from sqlalchemy import text

from app.kernel import ids
from app.kernel.database import Database, UnitOfWork
from app.kernel.errors import DatabaseUnreachable, RowsLocked
from app.kernel.sections.work import RunSettings
from app.workflows.runs.changes.effects import Effect
from app.workflows.runs.storage.payloads import PayloadLimits

_LOCK_TIMEOUT = text("SELECT set_config('lock_timeout', :ms, true)")


@dataclass(slots=True)
class RunPolicy:
    """The settings of runs. The retention may change while the process runs."""

    #: Setting runs.lease: for how long a claim holds unless it is renewed.
    lease: timedelta
    #: Setting runs.max_worker_losses: a step is given up after the deaths of so many workers.
    max_worker_losses: int
    #: Setting runs.retention: how long a finished run is kept unless its workflow or its client says otherwise.
    retention: timedelta = timedelta(days=30)
    #: The longest inputs and outputs.
    limits: PayloadLimits = field(default_factory=PayloadLimits)
    #: Draws from [0, 1).
    chance: Callable[[], float] = field(default=ids.chance)

    @staticmethod
    def of(settings: RunSettings) -> RunPolicy:
        """The policy of the settings."""
        limits = PayloadLimits.of(settings)
        return RunPolicy(settings.lease, settings.max_worker_losses, settings.retention, limits)


@dataclass(frozen=True, slots=True)
class RunTransaction:
    """A transaction on one run, and the effects to carry out after its commit."""

    work: UnitOfWork
    policy: RunPolicy
    effects: list[Effect] = field(default_factory=list)


@contextmanager
def begin(database: Database, lock_wait: timedelta | None) -> Iterator[UnitOfWork]:
    """
    One transaction that waits for locked rows no longer than `lock_wait`; None means the limit of the database.

    Raises RowsLocked, DatabaseUnreachable.
    """
    try:
        with database.work() as work:
            if lock_wait is not None:
                work.execute(_LOCK_TIMEOUT, {"ms": str(max(round(lock_wait.total_seconds() * 1000), 1))})
            yield work
    except DatabaseUnreachable as error:
        if isinstance(error.__cause__, psycopg.errors.LockNotAvailable):
            raise RowsLocked("another transaction has locked the rows") from error
        raise
