"""Events: what happened to a run, as a list or as it happens; and what it is told from outside."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from app.api import problems, threads
from app.api.services import Services, Use
from app.kernel.errors import NotFound, Unavailable
from app.workflows.runs import control, views
from app.workflows.state_machine.states import FINAL_RUNS

router = APIRouter(prefix="/v1/runs/{run_id}/events", tags=["runs"])

#: Seconds between two looks for what is new, between two signs of life, and until an absent database is asked anew.
_LOOK, _ALIVE, _AWAY = 0.25, 15.0, 1.0
_STREAM = "text/event-stream"


class EntryOut(BaseModel):
    """One thing that happened to a run."""

    model_config = ConfigDict(from_attributes=True)

    id: int
    at: datetime
    step: str | None = Field(description="the step or item that it happened to; null for the run")
    attempt: int | None
    what: str = Field(description="the state that it came to, or what else happened")
    cause: dict[str, Any] | None


class HistoryOut(BaseModel):
    """What happened to a run, the first first."""

    events: list[EntryOut]
    next_after: int | None = Field(description="give it as `after` for the next page; null on the last")


class EventIn(BaseModel):
    """Something that a run is told."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=64, description="the event; for an approval, the id of its step")
    payload: Any = None


class EventOut(BaseModel):
    """What became of it."""

    id: UUID
    answered: str | None = Field(description="the step that waited for it; null while it waits for one")


@router.get(
    "",
    summary="What happened to a run",
    response_model=HistoryOut,
    responses=problems.documented(404, 422, besides={200: {"content": {_STREAM: {"schema": {"type": "string"}}}}}),
)
def history(
    run_id: UUID,
    request: Request,
    services: Use,
    after: Annotated[int, Query(ge=0, description="the id of the last one that is known")] = 0,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
    last_event_id: Annotated[int, Header(ge=0, description="the same, as event streams send it")] = 0,
) -> Any:
    """
    Every transition of the run and its steps with its time and cause, the first first.

    With `Accept: text/event-stream` as server-sent events, those that are still to come too, until the run has ended.
    """
    after = max(after, last_event_id)
    if _STREAM in request.headers.get("accept", ""):
        views.history(services.database, run_id, limit=1)
        stream = _stream(services, run_id, after)
        return StreamingResponse(stream, media_type=_STREAM, headers={"Cache-Control": "no-store"})
    _, rows = views.history(services.database, run_id, after=after, limit=limit + 1)
    found = [EntryOut.model_validate(row) for row in rows[:limit]]
    return HistoryOut(events=found, next_after=found[-1].id if len(rows) > limit else None)


@router.post("", status_code=202, summary="Tell a run", responses=problems.documented(404, 409, 413, 422))
def tell(
    run_id: UUID,
    event: EventIn,
    services: Use,
    response: Response,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> EventOut:
    """
    Give a run an event: it answers the `wait` step of that name, or waits for it.

    The payload must conform to the step's schema. An approval takes `{"approved": true}` or `false`, with `by` and
    `comment` if wanted. The same `Idempotency-Key` gives the same event again, with 200.
    """
    told = control.tell(services.runs, run_id, event.name, event.payload, idempotency_key)
    response.status_code = 202 if told.created else 200
    return EventOut(id=told.id, answered=told.step)


async def _stream(services: Services, run_id: UUID, after: int) -> AsyncIterator[str]:
    silent = 0.0
    while True:
        try:
            state, rows = await threads.of_stream(views.history, services.database, run_id, after=after)
        except NotFound:
            # Its retention ended while somebody watched.
            return
        except Unavailable:
            yield ": the database is away\n\n"
            await asyncio.sleep(_AWAY)
            continue
        for row in rows:
            after, silent = row.id, 0.0
            yield f"id: {row.id}\nevent: {row.what}\ndata: {EntryOut.model_validate(row).model_dump_json()}\n\n"
        if not rows:
            if state in FINAL_RUNS:
                return
            silent += _LOOK
            if silent >= _ALIVE:
                silent = 0.0
                yield ": still there\n\n"
            await asyncio.sleep(_LOOK)
