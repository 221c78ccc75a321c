"""The statements of scheduled jobs. All instants are those of the database's clock."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.governance.jobs.job import JobChange, JobPass, PassOutcome, Trigger
from app.governance.jobs.rows import ScheduledJobPassRow, ScheduledJobRow
from app.kernel.database import UnitOfWork

#: Passes that are kept of each job.
KEPT_PASSES = 50

_CHANGES = text(
    "SELECT * FROM scheduled_job WHERE every_seconds IS NOT NULL OR cron IS NOT NULL OR paused_at IS NOT NULL"
)
_ALL = text("SELECT * FROM scheduled_job")
_ONE = text("SELECT * FROM scheduled_job WHERE name = :name")
_CLAIM = text(
    """
    INSERT INTO scheduled_job (name, claimed_at) VALUES (:name, now())
    ON CONFLICT (name) DO UPDATE SET claimed_at = now()
    WHERE scheduled_job.claimed_at IS NOT DISTINCT FROM :claimed_at AND scheduled_job.paused_at IS NULL
    RETURNING claimed_at
    """
)
_RELEASE = text("UPDATE scheduled_job SET claimed_at = :before WHERE name = :name AND claimed_at = :claimed_at")
_PAUSE = text(
    """
    INSERT INTO scheduled_job (name, paused_at, paused_reason) VALUES (:name, now(), :reason)
    ON CONFLICT (name) DO UPDATE
    SET paused_at = coalesce(scheduled_job.paused_at, now()), paused_reason = excluded.paused_reason
    """
)
_RESUME = text("UPDATE scheduled_job SET paused_at = NULL, paused_reason = NULL, changed_at = now() WHERE name = :name")
_CHANGE = text(
    """
    INSERT INTO scheduled_job (name, every_seconds, cron, timezone) VALUES (:name, :every, :cron, :timezone)
    ON CONFLICT (name) DO UPDATE
    SET every_seconds = excluded.every_seconds, cron = excluded.cron, timezone = excluded.timezone, changed_at = now()
    """
)
_RECORD = text(
    """
    INSERT INTO scheduled_job AS job
        (name, last_started_at, last_seconds, last_outcome, last_detail, last_worker, last_done_at, last_failed_at,
         passes, failures, seconds)
    VALUES
        (:name, now() - make_interval(secs => :age), :last_seconds, :outcome, CAST(:detail AS json), :worker,
         now() - make_interval(secs => :done_age), now() - make_interval(secs => :failed_age),
         :passes, :failures, :seconds)
    ON CONFLICT (name) DO UPDATE SET
        last_started_at = excluded.last_started_at,
        last_seconds = excluded.last_seconds,
        last_outcome = excluded.last_outcome,
        last_detail = excluded.last_detail,
        last_worker = excluded.last_worker,
        last_done_at = greatest(excluded.last_done_at, job.last_done_at),
        last_failed_at = greatest(excluded.last_failed_at, job.last_failed_at),
        passes = job.passes + excluded.passes,
        failures = job.failures + excluded.failures,
        seconds = job.seconds + excluded.seconds
    """
)
_KEEP = text(
    """
    INSERT INTO scheduled_job_pass (id, job, by_hand, state, requested_at, started_at, seconds, outcome, detail, worker)
    VALUES (:id, :job, false, 'ended', now() - make_interval(secs => :age), now() - make_interval(secs => :age),
            :seconds, :outcome, CAST(:detail AS json), :worker)
    """
)
_TRIM = text(
    """
    DELETE FROM scheduled_job_pass WHERE job = :job AND state IN ('ended', 'lost') AND id NOT IN (
        SELECT id FROM scheduled_job_pass WHERE job = :job ORDER BY requested_at DESC LIMIT :kept)
    """
)
_LOST = text(
    """
    UPDATE scheduled_job_pass SET state = 'lost'
    WHERE state = 'requested' AND requested_at < now() - CAST(:unstarted AS interval)
       OR state = 'running' AND requested_at < now() - CAST(:unended AS interval)
    """
)
_OPEN = text("SELECT * FROM scheduled_job_pass WHERE job = :job AND state IN ('requested', 'running') LIMIT 1")
_REQUEST = text(
    """
    INSERT INTO scheduled_job_pass (id, job, by_hand, state) VALUES (:id, :job, true, 'requested') RETURNING *
    """
)
_LOCK = text("SELECT pg_advisory_xact_lock(hashtextextended('scheduled_job ' || :job, 0))")
_BEGIN = text(
    """
    UPDATE scheduled_job_pass SET state = 'running', started_at = now(), worker = :worker
    WHERE id = :id AND job = :job AND state = 'requested' RETURNING id
    """
)
_END = text(
    """
    UPDATE scheduled_job_pass
    SET state = 'ended', seconds = :seconds, outcome = :outcome, detail = CAST(:detail AS json)
    WHERE id = :id AND state IN ('running', 'lost')
    """
)
_PASSES = text("SELECT * FROM scheduled_job_pass WHERE job = :job ORDER BY requested_at DESC LIMIT :limit")
_PASS = text("SELECT * FROM scheduled_job_pass WHERE job = :job AND id = :id")
_NOW = text("SELECT now() AS now")

#: After so long, a requested pass that no worker has begun counts as lost, and one that has not ended.
UNSTARTED, UNENDED = timedelta(seconds=90), timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class PassTotals:
    """What a worker has counted of a job since it was last recorded."""

    last: JobPass
    passes: int
    failures: int
    seconds: float
    #: How long ago a pass last did something, and how long ago one last failed, in seconds; None: none has.
    done_age: float | None
    failed_age: float | None


def changes(work: UnitOfWork) -> dict[str, JobChange]:
    """Return what operators have changed, by job."""
    return {row.name: change_of(row) for row in work.rows_of(ScheduledJobRow, _CHANGES)}


def change_of(row: ScheduledJobRow | None) -> JobChange:
    """Return what operators have changed of a job."""
    if row is None:
        return JobChange()
    trigger = None
    if row.cron is not None:
        trigger = Trigger(None, row.cron, row.timezone)
    elif row.every_seconds is not None:
        trigger = Trigger(timedelta(seconds=row.every_seconds))
    return JobChange(trigger, row.paused_at is not None)


def all_rows(work: UnitOfWork) -> dict[str, ScheduledJobRow]:
    """Return the jobs that have a row, by name."""
    return {row.name: row for row in work.rows_of(ScheduledJobRow, _ALL)}


def find_row(work: UnitOfWork, name: str) -> ScheduledJobRow | None:
    """Return the row of a job."""
    return work.row_of(ScheduledJobRow, _ONE, {"name": name})


def now(work: UnitOfWork) -> datetime:
    """Return the instant of the transaction."""
    row = work.row(_NOW)
    assert row is not None
    found: datetime = row.now
    return found


def claim(work: UnitOfWork, name: str, claimed_at: datetime | None) -> datetime | None:
    """Claim a pass, unless it was claimed since `claimed_at` or is paused. Returns the instant of the claim."""
    row = work.row(_CLAIM, {"name": name, "claimed_at": claimed_at})
    return None if row is None else row.claimed_at


def release(work: UnitOfWork, name: str, claimed_at: datetime, before: datetime | None) -> None:
    """Undo a claim: the pass could not be made."""
    work.run(_RELEASE, {"name": name, "claimed_at": claimed_at, "before": before})


def pause(work: UnitOfWork, name: str, reason: str | None) -> None:
    """Pause a job; a paused one gets the reason."""
    work.run(_PAUSE, {"name": name, "reason": reason})


def resume(work: UnitOfWork, name: str) -> None:
    """Resume a job."""
    work.run(_RESUME, {"name": name})


def change(work: UnitOfWork, name: str, trigger: Trigger | None) -> None:
    """Set the trigger of a job; None: that of the settings."""
    every = None if trigger is None or trigger.every is None else trigger.every.total_seconds()
    cron = None if trigger is None else trigger.cron
    zone = "UTC" if trigger is None else trigger.timezone
    work.run(_CHANGE, {"name": name, "every": every, "cron": cron, "timezone": zone})


def record(work: UnitOfWork, totals: Sequence[PassTotals], kept: Mapping[UUID, JobPass], worker: str) -> None:
    """Add what a worker has counted, and the passes that are kept in the history."""
    if totals:
        # In one order, so that two workers never wait for each other.
        ordered = sorted(totals, key=lambda one: one.last.job)
        work.execute(_RECORD, [_totals(one) | {"worker": worker} for one in ordered])
    for id_, one in kept.items():
        work.execute(
            _KEEP,
            {
                "id": id_,
                "job": one.job,
                "age": one.age,
                "seconds": one.seconds,
                "outcome": one.outcome,
                "detail": _json(one.detail),
                "worker": worker,
            },
        )
    for name in sorted({one.job for one in kept.values()}):
        work.execute(_TRIM, {"job": name, "kept": KEPT_PASSES})
    work.execute(_LOST, {"unstarted": UNSTARTED, "unended": UNENDED})


def request(work: UnitOfWork, id_: UUID, job: str) -> tuple[ScheduledJobPassRow, bool]:
    """Request a pass. Returns it, or the one that is requested or running, and whether it is new."""
    work.execute(_LOCK, {"job": job})
    work.execute(_LOST, {"unstarted": UNSTARTED, "unended": UNENDED})
    found = work.row_of(ScheduledJobPassRow, _OPEN, {"job": job})
    if found is not None:
        return found, False
    made = work.row_of(ScheduledJobPassRow, _REQUEST, {"id": id_, "job": job})
    assert made is not None
    work.execute(_TRIM, {"job": job, "kept": KEPT_PASSES})
    return made, True


def begin(work: UnitOfWork, job: str, id_: UUID, worker: str) -> bool:
    """Begin a requested pass. Returns False when another worker has."""
    return work.row(_BEGIN, {"id": id_, "job": job, "worker": worker}) is not None


def end(work: UnitOfWork, id_: UUID, seconds: float, outcome: PassOutcome, detail: dict[str, object] | None) -> None:
    """End a requested pass."""
    work.run(_END, {"id": id_, "seconds": seconds, "outcome": outcome, "detail": _json(detail)})


def passes(work: UnitOfWork, job: str, limit: int) -> list[ScheduledJobPassRow]:
    """Return the last passes that are kept, the latest first."""
    return work.rows_of(ScheduledJobPassRow, _PASSES, {"job": job, "limit": limit})


def find_pass(work: UnitOfWork, job: str, id_: UUID) -> ScheduledJobPassRow | None:
    """Return a pass."""
    return work.row_of(ScheduledJobPassRow, _PASS, {"job": job, "id": id_})


def _totals(one: PassTotals) -> dict[str, Any]:
    return {
        "name": one.last.job,
        "age": one.last.age,
        "last_seconds": one.last.seconds,
        "outcome": one.last.outcome,
        "detail": _json(one.last.detail),
        "done_age": one.done_age,
        "failed_age": one.failed_age,
        "passes": one.passes,
        "failures": one.failures,
        "seconds": one.seconds,
    }


def _json(detail: dict[str, object] | None) -> str | None:
    return None if detail is None else json.dumps(detail)
