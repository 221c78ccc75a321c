"""Schedules: store, look at, pause, resume, trigger, remove."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Depends, Header, Path, Query, Response
from pydantic import BaseModel, Field

from app.api import bodies, problems
from app.api.bodies import RequestBody
from app.api.services import Use
from app.kernel.errors import InvalidInput, Problem
from app.workflows.schedules import check, timetable
from app.workflows.schedules.overlap import FireState
from app.workflows.schedules.service import Schedules, View
from app.workflows.state_machine.states import RunState

router = APIRouter(prefix="/v1/schedules", tags=["schedules"])

_Name = Annotated[str, Path(description="the name of the schedule", examples=["nightly-digest"])]
_Count = Annotated[int, Query(ge=1, le=1000, description="how many")]


def _service(services: Use) -> Schedules:
    return Schedules(services.runs, services.settings.schedules.keep_fires)


_Service = Annotated[Schedules, Depends(_service)]


class NextOut(BaseModel):
    """A fire to come."""

    at: datetime = Field(description="the instant that the trigger names, in the schedule's time zone")
    due_at: datetime = Field(description="`at` and its jitter")


class LastFireOut(BaseModel):
    """What became of the latest instant that is decided."""

    id: UUID
    at: datetime
    state: FireState
    why: str | None = Field(description="why there is no run")
    decided_at: datetime


class LastRunOut(BaseModel):
    """The run that was submitted last."""

    id: UUID
    state: RunState
    created_at: datetime
    finished_at: datetime | None


class FireOut(LastFireOut):
    """A fire, or several in a row that were missed or skipped together."""

    by_hand: bool = Field(description="somebody asked for it")
    due_at: datetime = Field(description="`at` and its jitter")
    last_at: datetime | None = Field(description="where it stands for several: the instant of the last")
    count: int | None = Field(description=f"for how many it stands; null for more than {timetable.COUNTED}")
    run_id: UUID | None
    run_state: RunState | None


class FireList(BaseModel):
    """Some fires, the latest first."""

    fires: list[FireOut]
    next_cursor: UUID | None = Field(description="give it as `cursor` for the next page; null on the last")


class ScheduleOut(BaseModel):
    """A schedule as it stands."""

    name: str
    description: str
    workflow: str
    version: int | None = Field(description="null: the newest at each fire")
    trigger: str = Field(description="its `cron` or `every`", examples=["30 2 * * 1-5"])
    timezone: str
    state: Literal["active", "paused", "ended"] = Field(description="`ended`: no fire follows")
    paused_at: datetime | None
    paused_why: str | None
    next: NextOut | None = Field(description="null while it is paused, and after its end")
    waiting: int = Field(description="fires that wait for an earlier run to end")
    last_fire: LastFireOut | None
    last_run: LastRunOut | None
    created_at: datetime
    updated_at: datetime
    schedule: dict[str, Any] = Field(description="the document, as it was stored")


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
def page(schedules: _Service) -> ScheduleList:
    """Every schedule, by name."""
    return ScheduleList(schedules=[_out(view) for view in schedules.all()])


@router.get("/{name}", summary="One schedule", responses=problems.documented(404))
def get(name: _Name, schedules: _Service) -> ScheduleOut:
    """A schedule: what it runs, when it fires next, and what became of its last fire."""
    return _out(schedules.get(name))


@router.put(
    "/{name}",
    summary="Store a schedule",
    responses=problems.documented(
        413, 415, 422, besides={201: {"model": ScheduleOut, "description": "Stored under a new name"}}
    ),
    openapi_extra=bodies.documented({"$ref": "#/components/schemas/Schedule"}, _EXAMPLES),
)
def put(name: _Name, body: RequestBody, schedules: _Service, response: Response) -> ScheduleOut:
    """
    Store a schedule, in JSON or YAML; 201 for a new one, 200 where it replaces another.

    Its workflow must be there and take its inputs. It fires for instants from now on; a change keeps the history, and a
    paused schedule stays paused.
    """
    schedule = check.check(body)
    with check.placed(body):
        if schedule.schedule != name:
            message = f"the schedule is {schedule.schedule!r}, the address names {name!r}"
            raise InvalidInput([Problem("schedule", message, repr(name))])
        view, created = schedules.put(schedule)
    response.status_code = 201 if created else 200
    return _out(view)


@router.delete("/{name}", status_code=204, summary="Remove a schedule", responses=problems.documented(404))
def delete(name: _Name, schedules: _Service) -> None:
    """Remove a schedule with the history of its fires. Its runs stay, and those that go on do so."""
    schedules.delete(name)


@router.post("/{name}/pause", summary="Pause a schedule", responses=problems.documented(404, 422))
def pause(
    name: _Name,
    schedules: _Service,
    why: Annotated[str | None, Query(max_length=1000, description="shown with the schedule")] = None,
) -> ScheduleOut:
    """Let it fire no more, until it is resumed. Fires that wait are skipped; runs go on."""
    return _out(schedules.pause(name, why))


@router.post("/{name}/resume", summary="Resume a schedule", responses=problems.documented(404))
def resume(name: _Name, schedules: _Service) -> ScheduleOut:
    """Let it fire again, from now on: what came due while it was paused is skipped."""
    return _out(schedules.resume(name))


@router.post("/{name}/trigger", status_code=202, summary="Fire a schedule now", responses=problems.documented(404, 422))
def trigger(
    name: _Name,
    schedules: _Service,
    force: Annotated[bool, Query(description="begin beside a run that goes on, whatever `overlap` says")] = False,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> FireOut:
    """
    Fire now, also while it is paused; 202 with the fire, whose `state` says what became of it.

    The same `Idempotency-Key` gives the same fire, as long as the history has it.
    """
    return FireOut.model_validate(schedules.trigger(name, force=force, key=idempotency_key), from_attributes=True)


@router.get("/{name}/fires", summary="What became of the fires", responses=problems.documented(404, 422))
def fires(
    name: _Name,
    schedules: _Service,
    state: Annotated[list[FireState] | None, Query(description="one or more states")] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[UUID | None, Query(description="`next_cursor` of the page before")] = None,
) -> FireList:
    """Fires from the latest to the earliest: the run of each, or why there is none."""
    found = schedules.fires(name, limit=limit, before=cursor, states=state)
    listed = [FireOut.model_validate(row, from_attributes=True) for row in found.fires]
    return FireList(fires=listed, next_cursor=found.next_cursor)


@router.get("/{name}/preview", summary="The next fires", responses=problems.documented(404, 422))
def preview(
    name: _Name,
    schedules: _Service,
    n: _Count = 10,
    after: Annotated[datetime | None, Query(description="an instant with its offset; now without it")] = None,
) -> PreviewOut:
    """When it fires next, in its time zone. A paused schedule is shown as if it was resumed."""
    if after is not None and after.tzinfo is None:
        raise InvalidInput(
            [Problem("query.after", f"{after.isoformat()} has no offset", "2026-11-21T02:30Z")], "request"
        )
    found = schedules.preview(name, n, after)
    return PreviewOut(fires=[NextOut.model_validate(fire, from_attributes=True) for fire in found])


def _out(view: View) -> ScheduleOut:
    row, schedule, document = view.row, view.schedule, view.schedule.document()
    last_fire = last_run = None
    if row.fire_id is not None:
        last_fire = LastFireOut(
            id=row.fire_id, at=row.fire_at, state=row.fire_state, why=row.fire_why, decided_at=row.fire_decided_at
        )
    if row.run_id is not None:
        last_run = LastRunOut(
            id=row.run_id, state=row.run_state, created_at=row.run_created_at, finished_at=row.run_finished_at
        )
    return ScheduleOut(
        name=row.name,
        description=schedule.description,
        workflow=schedule.workflow,
        version=schedule.version,
        trigger=document.get("cron") or f"every {document['every']}",
        timezone=schedule.timezone,
        state=view.state,
        paused_at=row.paused_at,
        paused_why=row.paused_why,
        next=None if view.next is None else NextOut.model_validate(view.next, from_attributes=True),
        waiting=row.waiting,
        last_fire=last_fire,
        last_run=last_run,
        created_at=row.created_at,
        updated_at=row.updated_at,
        schedule=document,
    )
