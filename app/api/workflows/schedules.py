"""The resource `schedules`: store, show, pause, resume, trigger, preview and remove."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import Depends, Header, Path, Query, Response
from pydantic import BaseModel, Field

from app.access.callers import KeyScope
from app.api import bodies, problems
from app.api.bodies import RequestBody
from app.api.callers import ListedNamespace, NamedNamespace, requires
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.kernel.errors import InvalidInput, Problem
from app.workflows.schedules import check, timetable
from app.workflows.schedules.overlap import FireState
from app.workflows.schedules.service import Schedules, ScheduleView
from app.workflows.state_machine.states import RunState

router = ApiRouter(prefix="/v1/schedules", tags=["schedules"], dependencies=[requires(KeyScope.READ)])

_Name = Annotated[str, Path(description="the name of the schedule", examples=["nightly-digest"])]
_Count = Annotated[int, Query(ge=1, le=1000, description="number of fires")]


def _service(services: InjectedServices, namespace: NamedNamespace) -> Schedules:
    return Schedules(services.runs, services.settings.schedules.keep_fires, namespace)


_Service = Annotated[Schedules, Depends(_service)]


class NextOut(BaseModel):
    """A future fire."""

    at: datetime = Field(description="the instant of the trigger, in the schedule's time zone")
    due_at: datetime = Field(description="`at` plus jitter")


class LastFireOut(BaseModel):
    """The latest fire that was decided."""

    id: UUID
    at: datetime
    state: FireState
    reason: str | None = Field(description="why there is no run")
    decided_at: datetime


class LastRunOut(BaseModel):
    """The run that was submitted last."""

    id: UUID
    state: RunState
    created_at: datetime
    finished_at: datetime | None


class FireOut(LastFireOut):
    """A fire, or several consecutive fires that were missed or skipped together."""

    by_hand: bool = Field(description="it was triggered by a request")
    due_at: datetime = Field(description="`at` plus jitter")
    last_at: datetime | None = Field(description="the instant of the last fire, when the entry is for several")
    count: int | None = Field(description=f"number of fires in this entry; null for more than {timetable.MAX_COUNTED}")
    run_id: UUID | None
    run_state: RunState | None


class FireList(BaseModel):
    """A page of fires, the latest first."""

    fires: list[FireOut]
    next_cursor: UUID | None = Field(description="the value of `cursor` for the next page; null on the last page")


class ScheduleOut(BaseModel):
    """A schedule and its state."""

    name: str
    namespace: str = Field(description="to whom it belongs, and its runs")
    description: str
    workflow: str
    version: int | None = Field(description="null: the newest version at each fire")
    trigger: str = Field(description="its `cron` or `every`", examples=["30 2 * * 1-5"])
    timezone: str
    state: Literal["active", "paused", "ended"] = Field(description="`ended`: it has no further fires")
    paused_at: datetime | None
    paused_reason: str | None
    next: NextOut | None = Field(description="null while it is paused, and after its end")
    waiting: int = Field(description="fires that wait for an earlier run to end")
    last_fire: LastFireOut | None
    last_run: LastRunOut | None
    created_at: datetime
    updated_at: datetime
    schedule: dict[str, Any] = Field(description="the stored document")


class ScheduleList(BaseModel):
    """Every schedule, by name."""

    schedules: list[ScheduleOut]


class PreviewOut(BaseModel):
    """The next fires."""

    fires: list[NextOut]


_EXAMPLES = {
    "each weekday at night": {
        "schedule": "nightly-triage",
        "workflow": "support-triage",
        "inputs": {"message": "What came in on {{ fire.date }}?"},
        "cron": "30 2 * * 1-5",
        "timezone": "Europe/Madrid",
        "catch_up": "2h",
    },
    "each quarter of an hour": {
        "schedule": "quarters",
        "workflow": "support-triage",
        "inputs": {"message": "Hello"},
        "every": "15m",
        "overlap": "queue",
    },
}


@router.get("", summary="List schedules", responses=problems.documented())
def page(schedules: _Service, listed: ListedNamespace) -> ScheduleList:
    """Every schedule, by name."""
    return ScheduleList(schedules=[_out(view) for view in schedules.all(listed)])


@router.get("/{name}", summary="One schedule", responses=problems.documented(404))
def get(name: _Name, schedules: _Service) -> ScheduleOut:
    """A schedule: its workflow, its next fire, and the result of its last fire."""
    return _out(schedules.get(name))


@router.put(
    "/{name}",
    dependencies=[requires(KeyScope.OPERATE)],
    summary="Store a schedule",
    responses=problems.documented(
        413, 415, 422, others={201: {"model": ScheduleOut, "description": "Stored under a new name"}}
    ),
    openapi_extra=bodies.documented({"$ref": "#/components/schemas/Schedule"}, _EXAMPLES),
)
def put(name: _Name, body: RequestBody, schedules: _Service, response: Response) -> ScheduleOut:
    """
    Store a schedule, in JSON or YAML; 201 for a new one, 200 when it replaces another.

    Its workflow must exist and accept its inputs. It fires for instants from now on. A change keeps the history, and a
    paused schedule stays paused.
    """
    schedule = check.check(body)
    with check.with_lines(body):
        if schedule.schedule != name:
            message = f"the schedule is named {schedule.schedule!r}, the URL names {name!r}"
            raise InvalidInput([Problem("schedule", message, repr(name))])
        view, created = schedules.put(schedule)
    response.status_code = 201 if created else 200
    return _out(view)


@router.delete(
    "/{name}",
    status_code=204,
    dependencies=[requires(KeyScope.OPERATE)],
    summary="Remove a schedule",
    responses=problems.documented(404),
)
def delete(name: _Name, schedules: _Service) -> None:
    """Remove a schedule with the history of its fires. Its runs are kept, and running ones continue."""
    schedules.delete(name)


@router.post(
    "/{name}/pause",
    dependencies=[requires(KeyScope.OPERATE)],
    summary="Pause a schedule",
    responses=problems.documented(404, 422),
)
def pause(
    name: _Name,
    schedules: _Service,
    reason: Annotated[str | None, Query(max_length=1000, description="the reason, shown with the schedule")] = None,
) -> ScheduleOut:
    """Pause a schedule: it does not fire until it is resumed. Waiting fires are skipped; runs continue."""
    return _out(schedules.pause(name, reason))


@router.post(
    "/{name}/resume",
    dependencies=[requires(KeyScope.OPERATE)],
    summary="Resume a schedule",
    responses=problems.documented(404),
)
def resume(name: _Name, schedules: _Service) -> ScheduleOut:
    """Resume a schedule: it fires again from now on. Fires that were due while it was paused are skipped."""
    return _out(schedules.resume(name))


@router.post(
    "/{name}/trigger",
    status_code=202,
    dependencies=[requires(KeyScope.OPERATE)],
    summary="Fire a schedule now",
    responses=problems.documented(404, 422),
)
def trigger(
    name: _Name,
    schedules: _Service,
    force: Annotated[bool, Query(description="start a run even while an earlier one runs, ignoring `overlap`")] = False,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> FireOut:
    """
    Fire a schedule now, even while it is paused; 202 with the fire, whose `state` is the result.

    The same `Idempotency-Key` returns the same fire, as long as the history contains it.
    """
    return FireOut.model_validate(schedules.trigger(name, force=force, key=idempotency_key), from_attributes=True)


@router.get("/{name}/fires", summary="The history of fires", responses=problems.documented(404, 422))
def fires(
    name: _Name,
    schedules: _Service,
    state: Annotated[list[FireState] | None, Query(description="one or more states")] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[UUID | None, Query(description="`next_cursor` of the previous page")] = None,
) -> FireList:
    """Fires from the latest to the earliest: the run of each, or the reason why there is none."""
    found = schedules.fires(name, limit=limit, before=cursor, states=state)
    listed = [FireOut.model_validate(row, from_attributes=True) for row in found.fires]
    return FireList(fires=listed, next_cursor=found.next_cursor)


@router.get("/{name}/preview", summary="The next fires", responses=problems.documented(404, 422))
def preview(
    name: _Name,
    schedules: _Service,
    n: _Count = 10,
    after: Annotated[datetime | None, Query(description="an instant with a UTC offset; by default now")] = None,
) -> PreviewOut:
    """The next fires of a schedule, in its time zone. A paused schedule is shown as if it was resumed."""
    if after is not None and after.tzinfo is None:
        raise InvalidInput(
            [Problem("query.after", f"{after.isoformat()} has no UTC offset", "2026-11-21T02:30Z")], "request"
        )
    found = schedules.preview(name, n, after)
    return PreviewOut(fires=[NextOut.model_validate(fire, from_attributes=True) for fire in found])


def _out(view: ScheduleView) -> ScheduleOut:
    row, schedule, document = view.row, view.schedule, view.schedule.document()
    last_fire = last_run = None
    if row.fire_id is not None:
        last_fire = LastFireOut(
            id=row.fire_id, at=row.fire_at, state=row.fire_state, reason=row.fire_reason, decided_at=row.fire_decided_at
        )
    if row.run_id is not None:
        last_run = LastRunOut(
            id=row.run_id, state=row.run_state, created_at=row.run_created_at, finished_at=row.run_finished_at
        )
    return ScheduleOut(
        name=row.name,
        namespace=row.namespace,
        description=schedule.description,
        workflow=schedule.workflow,
        version=schedule.version,
        trigger=document.get("cron") or f"every {document['every']}",
        timezone=schedule.timezone,
        state=view.state,
        paused_at=row.paused_at,
        paused_reason=row.paused_reason,
        next=None if view.next is None else NextOut.model_validate(view.next, from_attributes=True),
        waiting=row.waiting,
        last_fire=last_fire,
        last_run=last_run,
        created_at=row.created_at,
        updated_at=row.updated_at,
        schedule=document,
    )
