"""The resource `events` of a run: its history as a list or as a stream, and events sent to the run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from app.access.callers import KeyScope
from app.api import bodies, problems, threads
from app.api.callers import requires
from app.api.routers import ApiRouter
from app.api.services import InjectedServices, Services
from app.api.workflows.run_ids import ResolvedRunId
from app.kernel.errors import NotFound, Unavailable
from app.workflows.runs import control, views
from app.workflows.state_machine.states import FINAL_RUNS

router = ApiRouter(prefix="/v1/runs/{run_id}/events", tags=["runs"], dependencies=[requires(KeyScope.READ)])

#: Seconds between two polls for new entries, between two keep-alive comments, and before an unreachable database is
#: polled again.
_POLL, _KEEP_ALIVE, _UNREACHABLE = 0.25, 15.0, 1.0
_STREAM = "text/event-stream"


class EntryOut(BaseModel):
    """An entry of the history of a run."""

    model_config = ConfigDict(from_attributes=True)

    id: int
    at: datetime
    step: str | None = Field(description="the step or item concerned; null for the run itself")
    attempt: int | None
    event: str = Field(description="the new state, or the name of another event")
    cause: dict[str, Any] | None


class HistoryOut(BaseModel):
    """A page of the history of a run, the oldest entry first."""

    events: list[EntryOut]
    next_after: int | None = Field(description="the value of `after` for the next page; null on the last page")


class EventIn(BaseModel):
    """An event that is sent to a run."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=64, description="the event; for an approval, the id of its step")
    payload: Any = None


class EventOut(BaseModel):
    """An accepted event."""

    id: UUID
    answered: str | None = Field(description="the step that received it; null while no step has waited for it")


@router.get(
    "",
    summary="The history of a run",
    response_model=HistoryOut,
    responses=problems.documented(404, 422, others={200: {"content": {_STREAM: {"schema": {"type": "string"}}}}}),
)
def history(
    run_id: ResolvedRunId,
    request: Request,
    services: InjectedServices,
    after: Annotated[int, Query(ge=0, description="the id of the last known entry")] = 0,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
    last_event_id: Annotated[int, Header(ge=0, description="the same, as clients of event streams send it")] = 0,
) -> Any:
    """
    Every transition of the run and its steps with its time and cause, the oldest first.

    With `Accept: text/event-stream` the entries are server-sent events. The stream includes future entries until the
    run has ended.
    """
    after = max(after, last_event_id)
    if _STREAM in request.headers.get("accept", ""):
        views.history(services.database, run_id, limit=1)
        stream = _stream(services, run_id, after)
        return StreamingResponse(stream, media_type=_STREAM, headers={"Cache-Control": "no-store"})
    _, rows = views.history(services.database, run_id, after=after, limit=limit + 1)
    found = [EntryOut.model_validate(row) for row in rows[:limit]]
    return HistoryOut(events=found, next_after=found[-1].id if len(rows) > limit else None)


@router.post(
    "",
    status_code=202,
    dependencies=[requires(KeyScope.SUBMIT)],
    summary="Send an event to a run",
    responses=problems.documented(404, 409, 413, 415, 422),
    openapi_extra=bodies.documented_as(EventIn),
)
def send(
    run_id: ResolvedRunId,
    event: Annotated[EventIn, bodies.of(EventIn)],
    services: InjectedServices,
    response: Response,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> EventOut:
    """
    Send an event to a run: it completes the `wait` step of that name, or is stored until such a step waits.

    The payload must conform to the step's schema. An approval accepts `{"approved": true}` or `false`, optionally with
    `by` and `comment`. The same `Idempotency-Key` returns the same event, with 200.
    """
    accepted = control.send_event(services.runs, run_id, event.name, event.payload, idempotency_key)
    response.status_code = 202 if accepted.created else 200
    return EventOut(id=accepted.id, answered=accepted.step)


async def _stream(services: Services, run_id: UUID, after: int) -> AsyncIterator[str]:
    silent = 0.0
    while True:
        try:
            state, rows = await threads.run_for_stream(views.history, services.database, run_id, after=after)
        except NotFound:
            # The run was deleted at the end of its retention.
            return
        except Unavailable:
            yield ": the database is unreachable\n\n"
            await asyncio.sleep(_UNREACHABLE)
            continue
        for row in rows:
            after, silent = row.id, 0.0
            yield f"id: {row.id}\nevent: {row.event}\ndata: {EntryOut.model_validate(row).model_dump_json()}\n\n"
        if not rows:
            if state in FINAL_RUNS:
                return
            silent += _POLL
            if silent >= _KEEP_ALIVE:
                silent = 0.0
                yield ": keep-alive\n\n"
            await asyncio.sleep(_POLL)
