"""
Scheduled jobs as operators use them: list, show, pause, resume, change, and run by hand.

Each change is one transaction; after its commit, beat and the control workers are told. A change that they could not be
told of holds from the moment at which they can listen again.

Redis keys:
    redbeat::schedule, redbeat::lock   read only: when beat sends each job next, and whether a beat runs
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

import redis

from app.governance.jobs import store
from app.governance.jobs.job import Trigger
from app.governance.jobs.registry import BY_NAME, JOBS, ScheduledJob
from app.governance.jobs.rows import ScheduledJobPassRow, ScheduledJobRow
from app.governance.jobs.tasks import RUN_JOB
from app.kernel import ids
from app.kernel.broker import CONTROL_QUEUE, PRIORITIES, CeleryPublisher
from app.kernel.database import Database
from app.kernel.errors import BrokerUnreachable, Conflict, NotFound
from app.kernel.live import notices
from app.kernel.live.notices import ChangeTopic
from app.kernel.settings import Settings

#: Where beat keeps when it sends each job, the prefix of its entries, and its lock.
SCHEDULE_KEY, ENTRY_PREFIX, LOCK_KEY = "redbeat::schedule", "redbeat:", "redbeat::lock"


class JobState(StrEnum):
    """Whether a job runs."""

    ACTIVE = "active"
    PAUSED = "paused"
    #: The settings give it nothing to do.
    OFF = "off"


class BeatState(StrEnum):
    """Whether a beat triggers the jobs."""

    RUNNING = "running"
    STOPPED = "stopped"
    #: The broker does not answer.
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class JobView:
    """A job, and its state."""

    job: ScheduledJob
    #: None: it has not run, and was not changed.
    row: ScheduledJobRow | None
    state: JobState
    #: When it runs, and when it would without an operator's change.
    trigger: Trigger
    default: Trigger
    #: When it is due next; None while it is paused or off, or when this is unknown.
    next_at: datetime | None


@dataclass(frozen=True, slots=True)
class JobsView:
    """All jobs."""

    jobs: list[JobView]
    beat: BeatState


class ScheduledJobs:
    """The scheduled jobs of an installation."""

    def __init__(self, database: Database, publisher: CeleryPublisher, settings: Settings) -> None:
        self._database, self._publisher, self._settings = database, publisher, settings

    def all(self) -> JobsView:
        """Return all jobs, in the order of the registry. Raises DatabaseUnreachable."""
        with self._database.work() as work:
            rows, now = store.all_rows(work), store.now(work)
        beat, sends = self._beat()
        return JobsView([self._view(job, rows.get(job.name), sends, now) for job in JOBS], beat)

    def get(self, name: str) -> JobView:
        """Return a job. Raises NotFound, DatabaseUnreachable."""
        job = _job(name)
        with self._database.work() as work:
            row, now = store.find_row(work, name), store.now(work)
        return self._view(job, row, self._beat()[1], now)

    def pause(self, name: str, reason: str | None) -> JobView:
        """Pause a job: only requested passes run. Raises NotFound, DatabaseUnreachable."""
        _job(name)
        with self._database.work() as work:
            store.pause(work, name, reason)
            self._tell(work)
        return self.get(name)

    def resume(self, name: str) -> JobView:
        """Resume a job. Raises NotFound, DatabaseUnreachable."""
        _job(name)
        with self._database.work() as work:
            store.resume(work, name)
            self._tell(work)
        return self.get(name)

    def change(self, name: str, trigger: Trigger | None) -> JobView:
        """Change when a job runs; None: as the settings say. Raises NotFound, DatabaseUnreachable."""
        _job(name)
        with self._database.work() as work:
            store.change(work, name, trigger)
            self._tell(work)
        return self.get(name)

    def run(self, name: str) -> ScheduledJobPassRow:
        """
        Request a pass now, also of a paused job. Returns it, or the one that is requested or running already.

        Raises NotFound, Conflict when the settings give the job nothing to do, DatabaseUnreachable, BrokerUnreachable.
        """
        job = _job(name)
        if not job.is_enabled(self._settings):
            raise Conflict(f"the job {name!r} has nothing to do: the setting {job.needs} is not set")
        with self._database.work() as work:
            found, _ = store.request(work, ids.new_id(), name)
        sent = self._publisher.publish(
            RUN_JOB,
            (name, str(found.id)),
            queue=CONTROL_QUEUE,
            priority=PRIORITIES["interactive"],
            description=f"{name}, by hand",
            expires=store.UNSTARTED.total_seconds(),
        )
        if not sent:
            raise BrokerUnreachable("the broker is unreachable: the pass is requested, and no worker was told")
        return found

    def passes(self, name: str, limit: int) -> list[ScheduledJobPassRow]:
        """Return the last passes that did something, failed or were requested. Raises NotFound."""
        _job(name)
        with self._database.work() as work:
            return store.passes(work, name, limit)

    def get_pass(self, name: str, id_: UUID) -> ScheduledJobPassRow:
        """Return a pass. Raises NotFound."""
        _job(name)
        with self._database.work() as work:
            found = store.find_pass(work, name, id_)
        if found is None:
            raise NotFound("pass", str(id_))
        return found

    def _tell(self, work: Any) -> None:
        work.after_commit(lambda: notices.send(self._publisher, ChangeTopic.JOBS))

    def _view(
        self, job: ScheduledJob, row: ScheduledJobRow | None, sends: dict[str, datetime], now: datetime
    ) -> JobView:
        change, default = store.change_of(row), Trigger(job.every(self._settings))
        trigger = change.trigger or default
        if not job.is_enabled(self._settings):
            state = JobState.OFF
        else:
            state = JobState.PAUSED if change.is_paused else JobState.ACTIVE
        next_at = None
        if state is JobState.ACTIVE:
            next_at = sends.get(job.name) if trigger.cron is None else trigger.next_after(None, now)
        return JobView(job, row, state, trigger, default, next_at)

    def _beat(self) -> tuple[BeatState, dict[str, datetime]]:
        """Return whether a beat runs, and when it sends each job next."""
        try:
            with self._publisher.connection() as client, client.pipeline(transaction=False) as pipeline:
                pipeline.exists(LOCK_KEY)
                pipeline.zrange(SCHEDULE_KEY, 0, 1000, withscores=True)
                held, entries = pipeline.execute(raise_on_error=False)
        except BrokerUnreachable:
            return BeatState.UNKNOWN, {}
        if isinstance(entries, redis.RedisError):
            entries = []
        prefix = ENTRY_PREFIX.encode()
        sends = {
            key.removeprefix(prefix).decode(errors="replace"): datetime.fromtimestamp(score, UTC)
            for key, score in entries
            if 0 < score < 1e11
        }
        return (BeatState.RUNNING if held == 1 else BeatState.STOPPED), sends


def _job(name: str) -> ScheduledJob:
    found = BY_NAME.get(name)
    if found is None:
        raise NotFound("job", name)
    return found
