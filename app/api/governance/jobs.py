"""The resource `jobs`: the scheduled jobs, when they run and how they ended; pause, change, and run by hand."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated, Any
from uuid import UUID

from fastapi import Depends, Path, Query
from pydantic import BaseModel, ConfigDict, Field

from app.access.callers import KeyScope
from app.api import bodies, problems
from app.api.callers import requires
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.governance.jobs.job import PassOutcome, PassState, Trigger, checked_trigger
from app.governance.jobs.rows import ScheduledJobPassRow
from app.governance.jobs.service import BeatState, JobState, JobView, ScheduledJobs
from app.kernel.units import durations
from app.kernel.units.durations import Duration

router = ApiRouter(prefix="/v1/jobs", tags=["governance"], dependencies=[requires(KeyScope.READ, all_namespaces=True)])

_Name = Annotated[str, Path(description="the name of the job", examples=["sweep"], max_length=63)]
_OPERATE = requires(KeyScope.OPERATE, all_namespaces=True)


def _service(services: InjectedServices) -> ScheduledJobs:
    return ScheduledJobs(services.database, services.publisher, services.settings)


_Service = Annotated[ScheduledJobs, Depends(_service)]


class TriggerIn(BaseModel):
    """When a job runs: an interval, or a cron expression with its time zone."""

    model_config = ConfigDict(extra="forbid")

    every: Duration | None = Field(default=None, description="an interval of 1s to 366d")
    cron: str | None = Field(default=None, max_length=200, description="five fields, such as `30 2 * * 1-5`")
    timezone: str | None = Field(default=None, max_length=64, description="of `cron`; by default UTC")


class TriggerOut(BaseModel):
    """When a job runs: either `every` or `cron` is set."""

    every: str | None
    cron: str | None
    timezone: str | None


class LastPassOut(BaseModel):
    """The last pass of a job; of a frequent job it may be half a minute old."""

    started_at: datetime
    seconds: float
    outcome: PassOutcome
    detail: dict[str, Any] | None = Field(description="what it did, or why it failed")
    worker: str | None


class JobOut(BaseModel):
    """A scheduled job."""

    name: str
    description: str
    state: JobState = Field(description="`off`: the settings give it nothing to do")
    paused_at: datetime | None
    paused_reason: str | None
    trigger: TriggerOut
    default_trigger: TriggerOut = Field(description="the trigger of the settings")
    changed: bool = Field(description="an operator has set the trigger")
    setting: str = Field(description="the setting with its interval")
    last: LastPassOut | None = Field(description="null: it has not run yet")
    last_done_at: datetime | None = Field(description="when a pass last did something")
    last_failed_at: datetime | None = Field(description="when a pass last failed or was postponed")
    next_at: datetime | None = Field(description="when it is due next; null while it is paused, or when it is unknown")
    passes: int = Field(description="passes that have ended, ever")
    failures: int = Field(description="of these, failed and postponed ones")
    mean_seconds: float | None


class JobList(BaseModel):
    """Every scheduled job, and whether anything triggers them."""

    beat: BeatState = Field(description="`stopped`: no beat runs, so no job does; `unknown`: the broker is unreachable")
    jobs: list[JobOut]


class PassOut(BaseModel):
    """A pass of a job."""

    id: UUID
    job: str
    by_hand: bool
    state: PassState
    requested_at: datetime
    started_at: datetime | None
    seconds: float | None
    outcome: PassOutcome | None = Field(description="null until it has ended")
    detail: dict[str, Any] | None = Field(description="what it did, or why it failed")
    worker: str | None


class PassList(BaseModel):
    """Passes, the latest first."""

    passes: list[PassOut]


@router.get("", summary="List scheduled jobs", responses=problems.documented())
def page(jobs: _Service) -> JobList:
    """Every scheduled job: when it runs, how its last pass ended, and when the next one is due."""
    found = jobs.all()
    return JobList(beat=found.beat, jobs=[_out(one) for one in found.jobs])


@router.get("/{name}", summary="One scheduled job", responses=problems.documented(404))
def get(name: _Name, jobs: _Service) -> JobOut:
    """A scheduled job."""
    return _out(jobs.get(name))


@router.post("/{name}/pause", dependencies=[_OPERATE], summary="Pause a job", responses=problems.documented(404, 422))
def pause(
    name: _Name,
    jobs: _Service,
    reason: Annotated[
        str | None, Query(max_length=1000, pattern=r"^[^\x00]*$", description="the reason, shown with the job")
    ] = None,
) -> JobOut:
    """Pause a job: it is not triggered until it is resumed, and can still be run by hand."""
    return _out(jobs.pause(name, reason))


@router.post("/{name}/resume", dependencies=[_OPERATE], summary="Resume a job", responses=problems.documented(404))
def resume(name: _Name, jobs: _Service) -> JobOut:
    """Resume a job. What was due meanwhile is not made up for."""
    return _out(jobs.resume(name))


@router.put(
    "/{name}/trigger",
    dependencies=[_OPERATE],
    summary="Change when a job runs",
    responses=problems.documented(404, 413, 415, 422),
    openapi_extra=bodies.documented_as(TriggerIn),
)
def put_trigger(name: _Name, jobs: _Service, body: Annotated[TriggerIn, bodies.of(TriggerIn)]) -> JobOut:
    """Set the interval or the cron expression of a job. It replaces that of the settings, and holds within moments."""
    return _out(jobs.change(name, checked_trigger(body.every, body.cron, body.timezone)))


@router.delete(
    "/{name}/trigger",
    dependencies=[_OPERATE],
    summary="Run a job as the settings say",
    responses=problems.documented(404),
)
def delete_trigger(name: _Name, jobs: _Service) -> JobOut:
    """Remove the trigger that an operator has set: the interval of the settings holds again."""
    return _out(jobs.change(name, None))


@router.post(
    "/{name}/run",
    status_code=202,
    dependencies=[_OPERATE],
    summary="Run a job now",
    responses=problems.documented(404, 409),
)
def run(name: _Name, jobs: _Service) -> PassOut:
    """Request a pass now, also of a paused job. While one is requested or running, that one is returned."""
    return _pass_out(jobs.run(name))


@router.get("/{name}/passes", summary="The last passes of a job", responses=problems.documented(404, 422))
def passes(name: _Name, jobs: _Service, limit: Annotated[int, Query(ge=1, le=50)] = 20) -> PassList:
    """
    Passes that did something, failed or were run by hand, the latest first; the last 50 are kept.

    Of a job that runs every few seconds, one of those that did something is kept each half minute.
    """
    return PassList(passes=[_pass_out(one) for one in jobs.passes(name, limit)])


@router.get("/{name}/passes/{pass_id}", summary="One pass of a job", responses=problems.documented(404))
def get_pass(name: _Name, pass_id: UUID, jobs: _Service) -> PassOut:
    """A pass, such as one that was requested."""
    return _pass_out(jobs.get_pass(name, pass_id))


def _pass_out(row: ScheduledJobPassRow) -> PassOut:
    return PassOut.model_validate(row, from_attributes=True)


def _trigger_out(trigger: Trigger) -> TriggerOut:
    every: timedelta | None = trigger.every
    if every is None:
        return TriggerOut(every=None, cron=trigger.cron, timezone=trigger.timezone)
    return TriggerOut(every=durations.show(every), cron=None, timezone=None)


def _out(view: JobView) -> JobOut:
    job, row = view.job, view.row
    last = None
    if row is not None and row.last_started_at is not None:
        last = LastPassOut(
            started_at=row.last_started_at,
            seconds=row.last_seconds or 0.0,
            outcome=PassOutcome(str(row.last_outcome)),
            detail=row.last_detail,
            worker=row.last_worker,
        )
    passed = 0 if row is None else row.passes
    return JobOut(
        name=job.name,
        description=job.description,
        state=view.state,
        paused_at=None if row is None else row.paused_at,
        paused_reason=None if row is None else row.paused_reason,
        trigger=_trigger_out(view.trigger),
        default_trigger=_trigger_out(view.default),
        changed=row is not None and (row.every_seconds is not None or row.cron is not None),
        setting=job.setting,
        last=last,
        last_done_at=None if row is None else row.last_done_at,
        last_failed_at=None if row is None else row.last_failed_at,
        next_at=view.next_at,
        passes=passed,
        failures=0 if row is None else row.failures,
        mean_seconds=row.seconds / passed if row is not None and passed else None,
    )
