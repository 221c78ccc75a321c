"""
What operators have changed of the scheduled jobs, as beat and a control worker know it at this moment.

Changes are read at the start, and again after each notice; a process that could not listen reads them once it can.
While the database does not answer, the changes that were read last hold.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from app.governance.jobs import store
from app.governance.jobs.job import JobChange, Trigger
from app.governance.jobs.registry import ScheduledJob
from app.kernel import log
from app.kernel.database import Database
from app.kernel.errors import DatabaseUnreachable
from app.kernel.live.notices import ChangeListener, ChangeTopic
from app.kernel.settings import Settings
from workers.messaging import timetable

_log = log.get(__name__)

#: Seconds until the changes are read again while the database does not answer.
_RETRY = 2.0


class LiveJobs:
    """The changes of this moment. Safe for threads."""

    def __init__(self, settings: Settings, database: Database, redis_url: str) -> None:
        """Does not connect."""
        self._settings, self._database = settings, database
        self._listener = ChangeListener(redis_url, {ChangeTopic.JOBS: self._follow})
        self._closed = threading.Event()
        self._changes: Mapping[str, JobChange] = {}
        #: Rises with each change.
        self.version = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Read the changes, and follow them until the end of the block."""
        self._read()
        self._listener.start()
        try:
            yield
        finally:
            self._closed.set()
            self._listener.close()

    def change(self, name: str) -> JobChange:
        """Return what was changed of a job."""
        return self._changes.get(name, JobChange())

    def trigger(self, job: ScheduledJob, settings: Settings) -> Trigger:
        """Return when a job runs."""
        return self.change(job.name).trigger or Trigger(job.every(settings))

    def schedule(self) -> dict[str, Any]:
        """Return the schedule of beat."""
        return timetable.schedule(self._settings, self._changes)

    def _follow(self) -> None:
        while not self._read() and not self._closed.wait(_RETRY):
            pass

    def _read(self) -> bool:
        try:
            with self._database.work() as work:
                found = store.changes(work)
        except DatabaseUnreachable as error:
            _log.warning("job_changes_not_read", error=str(error))
            return False
        if found != self._changes:
            self._changes = found
            self.version += 1
            _log.info("job_changes_read", jobs=sorted(found))
        return True
