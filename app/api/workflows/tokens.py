"""The resource `tokens` of a step: its text while it is written, as server-sent events that can be resumed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any
from uuid import UUID

import redis
from fastapi import Header
from fastapi.responses import StreamingResponse

from app.access.callers import KeyScope
from app.api import problems, threads
from app.api.callers import requires
from app.api.openai.road import InjectedRoad, Road
from app.api.routers import ApiRouter
from app.api.services import InjectedServices, Services
from app.api.workflows.run_ids import ResolvedRunId
from app.inference import token_stream
from app.inference.token_stream import EntryKind
from app.kernel.errors import BrokerUnreachable, InvalidInput, NotFound, Problem
from app.workflows.runs import views
from app.workflows.state_machine.states import FINAL_STEPS

router = ApiRouter(prefix="/v1/runs/{run_id}/steps/{key}/tokens", tags=["runs"], dependencies=[requires(KeyScope.READ)])

#: Seconds between two checks of the step's state while nothing comes, and comments that keep the connection open.
_CHECK = 5.0
_DOCUMENTED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}, "description": "`begun`, `text`, `pieces`, `done`, `failed`"}
}
_IN_JSON = (EntryKind.PIECES, EntryKind.DONE, EntryKind.FAILED)


@router.get(
    "",
    summary="The tokens of a step",
    responses=problems.documented(404, 422, others=_DOCUMENTED),
    response_class=StreamingResponse,
)
async def stream(
    run_id: ResolvedRunId,
    key: str,
    services: InjectedServices,
    road: InjectedRoad,
    last_event_id: Annotated[
        str | None, Header(description="resume after this event: `<attempt>-<n>`", pattern=r"^\d{1,6}-\d{1,9}$")
    ] = None,
) -> StreamingResponse:
    """
    The text of an `openai` step, or of an interactive `generate` step, from its first token or from `Last-Event-ID` on.

    Each event has the id `<attempt>-<n>`, with n counting from 1. `begun` starts an attempt, `text` has a piece of text
    as JSON, `pieces` a list of pieces of several choices, or with tool calls or log-probabilities, `done` the output,
    `failed` the reason. A stream is kept for ten minutes after its end; then, and for other
    steps, there are no events. The stream ends with the step.
    """
    await threads.run_for_stream(_require, services, run_id, key)
    after = last_event_id or token_stream.START
    return StreamingResponse(_events(road, services, run_id, key, after), media_type="text/event-stream")


async def _events(road: Road, services: Services, run_id: UUID, key: str, after: str) -> AsyncIterator[str]:
    try:
        async with road.reader.follow(token_stream.key(str(run_id), key), after) as subscription:
            while True:
                entry = await subscription.next(_CHECK)
                if entry is None:
                    if await threads.run_for_stream(_has_ended, services, run_id, key):
                        return
                    yield ": waiting\n\n"
                    continue
                data = entry.value if entry.kind in _IN_JSON else json.dumps(entry.value)
                yield f"id: {entry.id}\nevent: {entry.kind}\ndata: {data}\n\n"
                if entry.kind is EntryKind.DONE:
                    return
                if entry.kind is EntryKind.FAILED and await threads.run_for_stream(_has_ended, services, run_id, key):
                    return  # otherwise another attempt may follow
    except redis.RedisError as error:
        problem = BrokerUnreachable(f"the broker is unreachable: {error}")
        yield f"event: error\ndata: {json.dumps(str(problem))}\n\n"


def _require(services: Services, run_id: UUID, key: str) -> None:
    """Raises NotFound when there is no such step or item, InvalidInput for a name that none can have."""
    if len(key) > 80:
        raise InvalidInput([Problem("key", "it is longer than any step's key", "the key of a step")], "request")
    if views.step_state(services.database, run_id, key) is None:
        raise NotFound("step", key)


def _has_ended(services: Services, run_id: UUID, key: str) -> bool:
    state = views.step_state(services.database, run_id, key)
    return state is None or state in FINAL_STEPS
