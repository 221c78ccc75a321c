"""
Passes of scheduled jobs in a control worker: whether one may begin, how it ends, and how that is recorded.

Within the process, two passes of a job never overlap. A job with an interval of a minute or more, or with a cron
expression, is claimed in the database first: duplicates of its message do nothing.
What jobs have done is recorded for all of them together, at most every `_RECORD_SECONDS`; at once for the first pass of
each job, when a job begins or ceases to fail, and for passes that were claimed or requested.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from uuid import UUID

from app.governance.jobs import store
from app.governance.jobs.job import JobPass, PassOutcome, Trigger
from app.governance.jobs.registry import BY_NAME, ScheduledJob
from app.governance.jobs.store import PassTotals
from app.kernel import ids, log
from app.kernel.errors import ArrieroError, DatabaseUnreachable, Unavailable, shortened
from workers.governance.live_jobs import LiveJobs
from workers.passes import exclusive
from workers.runtime import Runtime

_log = log.get(__name__)

#: Does a pass of a scheduled job. It returns what it did; nothing when there was nothing to do.
JobFunction = Callable[[Runtime], Mapping[str, object] | None]

#: Least seconds between two records of passes that did not change anything.
_RECORD_SECONDS = 30.0
#: Seconds between two attempts to begin a requested pass while another pass of the job runs, and for how long.
_RETRY_SECONDS, _PATIENCE_SECONDS = 0.2, 60.0
#: Most characters of a failure that are recorded.
_MAX_DETAIL = 1_000
#: Outcomes that count as failures.
_BAD = frozenset({PassOutcome.FAILED, PassOutcome.POSTPONED})


@dataclass(slots=True)
class _Count:
    """What was counted of a job since it was last recorded. Instants are those of the monotonic clock."""

    last: JobPass
    ended: float
    passes: int = 0
    failures: int = 0
    seconds: float = 0.0
    done: float | None = None
    failed: float | None = None
    #: The passes that the history keeps: the last that did something, and the first that failed.
    kept: dict[PassOutcome, tuple[JobPass, float]] = field(default_factory=dict)


class JobPasses:
    """The passes of one control worker."""

    def __init__(
        self,
        runtime: Runtime,
        functions: Mapping[str, JobFunction],
        live: LiveJobs | None,
        by_hand: Mapping[str, JobFunction] | None = None,
    ) -> None:
        """
        `functions` are those of the jobs by task name, `by_hand` those of passes that an operator requests, where they
        are others. Without `live`, the intervals of the settings hold.
        """
        self._runtime, self._functions, self._live = runtime, functions, live
        self._by_hand = {**functions, **(by_hand or {})}
        self._lock = threading.Lock()
        self._counts: dict[str, _Count] = {}
        #: Jobs of which a pass has been recorded.
        self._known: set[str] = set()
        #: Jobs whose last recorded pass failed.
        self._failing: set[str] = set()
        self._recorded = float("-inf")
        self._stopping = threading.Event()
        #: When a message of a job was received last.
        self._received = time.monotonic()

    def run(self, job: ScheduledJob) -> None:
        """Run a pass that beat triggered, unless the job is paused, runs already, or was claimed for this instant."""
        self._received = time.monotonic()
        if self._live is not None and self._live.change(job.name).is_paused:
            return
        with exclusive(f"pass of {job.name}") as acquired:
            if not acquired:
                return
            trigger = self._trigger(job)
            if job.is_woken or not trigger.is_claimed:
                self._note(self._done(job), at_once=False)
                return
            try:
                claim = self._claim(job, trigger)
            except DatabaseUnreachable as error:
                _log.warning("job_not_claimed", job=job.name, error=str(error))
                return
            if claim is None:
                _log.debug("job_claimed_already", job=job.name)
                return
            done = self._done(job)
            if done.outcome is PassOutcome.POSTPONED:
                self._release(job, *claim)
            self._note(done, at_once=True)

    def run_requested(self, name: str, id_: UUID) -> None:
        """Run a pass that an operator requested."""
        job, database = BY_NAME.get(name), self._runtime.runs.database
        if job is None:
            _log.warning("unknown_job_requested", job=name)
            return
        with database.work() as work:
            if not store.begin(work, name, id_, self._runtime.owner):
                return
        done = self._exclusively(job)
        _log.info("job_run_by_hand", job=name, outcome=done.outcome, seconds=round(done.seconds, 2))
        with database.work() as work:
            store.end(work, id_, done.seconds, done.outcome, done.detail)
        self._note(done, at_once=True, keep=False)

    def idle_seconds(self) -> float:
        """Return the seconds since a message of a job was received."""
        return time.monotonic() - self._received

    def close(self) -> None:
        """Record what is not recorded yet, and let requested passes wait no longer."""
        self._stopping.set()
        self._record()

    def _trigger(self, job: ScheduledJob) -> Trigger:
        settings = self._runtime.settings
        return Trigger(job.every(settings)) if self._live is None else self._live.trigger(job, settings)

    def _claim(self, job: ScheduledJob, trigger: Trigger) -> tuple[datetime, datetime | None] | None:
        """Claim a pass. Returns the instants of the claim and of the one before; None when it is not due."""
        with self._runtime.runs.database.work() as work:
            now, row = store.now(work), store.find_row(work, job.name)
            before = None if row is None else row.claimed_at
            if not trigger.is_due(before, now if row is None else row.changed_at, now):
                return None
            claimed_at = store.claim(work, job.name, before)
        return None if claimed_at is None else (claimed_at, before)

    def _release(self, job: ScheduledJob, claimed_at: datetime, before: datetime | None) -> None:
        try:
            with self._runtime.runs.database.work() as work:
                store.release(work, job.name, claimed_at, before)
        except DatabaseUnreachable:
            _log.warning("job_claim_not_released", job=job.name)

    def _exclusively(self, job: ScheduledJob) -> JobPass:
        until = time.monotonic() + _PATIENCE_SECONDS
        while True:
            with exclusive(f"pass of {job.name}") as acquired:
                if acquired:
                    return self._done(job, self._by_hand)
            if time.monotonic() > until or self._stopping.wait(_RETRY_SECONDS):
                reason = "another pass of the job did not end in time"
                return JobPass(job.name, 0.0, 0.0, PassOutcome.POSTPONED, {"error": reason})

    def _done(self, job: ScheduledJob, functions: Mapping[str, JobFunction] | None = None) -> JobPass:
        began = time.monotonic()
        outcome, detail = self._outcome(job, functions or self._functions)
        seconds = time.monotonic() - began
        return JobPass(job.name, seconds, seconds, outcome, detail)

    def _outcome(
        self, job: ScheduledJob, functions: Mapping[str, JobFunction]
    ) -> tuple[PassOutcome, dict[str, object] | None]:
        try:
            done = functions[job.task](self._runtime)
        except Unavailable as error:
            _log.warning("job_postponed", job=job.name, error=str(error))
            return PassOutcome.POSTPONED, {"error": shortened(str(error), _MAX_DETAIL)}
        except ArrieroError as error:
            if job.name not in self._failing:
                _log.warning("job_failed", job=job.name, error=str(error))
            return PassOutcome.FAILED, {"error": shortened(str(error), _MAX_DETAIL)}
        except Exception as error:  # noqa: BLE001 the outermost loop of a job: its next pass tries again
            _log.exception("job_failed", job=job.name)
            return PassOutcome.FAILED, {"error": shortened(f"{type(error).__name__}: {error}", _MAX_DETAIL)}
        if not done:
            return PassOutcome.IDLE, None
        return PassOutcome.DONE, dict(done)

    def _note(self, one: JobPass, *, at_once: bool, keep: bool = True) -> None:
        """Count a pass, and record it when that is due."""
        now = time.monotonic()
        is_bad = one.outcome in _BAD
        with self._lock:
            count = self._counts.setdefault(one.job, _Count(one, now))
            count.last, count.ended = one, now
            count.passes += 1
            count.failures += is_bad
            count.seconds += one.seconds
            if one.outcome is PassOutcome.DONE:
                count.done = now
            if is_bad:
                count.failed = now
            changed = is_bad != (one.job in self._failing)
            if keep and ((one.outcome is PassOutcome.DONE) or (is_bad and (changed or at_once))):
                count.kept[one.outcome] = (one, now)
            first = one.job not in self._known
            self._known.add(one.job)
            due = at_once or changed or first or now - self._recorded >= _RECORD_SECONDS
            (self._failing.add if is_bad else self._failing.discard)(one.job)
        if due:
            self._record()

    def _record(self) -> None:
        """Record what was counted. While the database does not answer, it is counted on."""
        with self._lock:
            now = time.monotonic()
            counts, self._counts, self._recorded = self._counts, {}, now
        if not counts:
            return
        totals = [_totals(count, now) for count in counts.values()]
        kept = {
            ids.new_id(): replace(one, age=one.age + now - ended)
            for count in counts.values()
            for one, ended in count.kept.values()
        }
        try:
            with self._runtime.runs.database.work() as work:
                store.record(work, totals, kept, self._runtime.owner)
        except DatabaseUnreachable as error:
            _log.debug("job_passes_not_recorded", error=str(error))
            self._put_back(counts)

    def _put_back(self, counts: dict[str, _Count]) -> None:
        with self._lock:
            for name, old in counts.items():
                new = self._counts.get(name)
                if new is None:
                    self._counts[name] = old
                    continue
                new.passes += old.passes
                new.failures += old.failures
                new.seconds += old.seconds
                new.done = old.done if new.done is None else new.done
                new.failed = old.failed if new.failed is None else new.failed
                new.kept = old.kept | new.kept


def run_job(passes: JobPasses, name: str, id_: str) -> None:
    """Run the pass that an operator requested."""
    passes.run_requested(name, UUID(id_))


def _totals(count: _Count, now: float) -> PassTotals:
    def ago(instant: float | None) -> float | None:
        return None if instant is None else now - instant

    last = replace(count.last, age=count.last.age + now - count.ended)
    return PassTotals(last, count.passes, count.failures, count.seconds, ago(count.done), ago(count.failed))
