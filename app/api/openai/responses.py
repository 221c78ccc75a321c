"""
The endpoints of responses, the newer form of OpenAI's API: create, read, continue, cancel, delete.

A response is a run like every other call. In the background it goes on without its client, and is read later.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import Path, Query, Request, Response
from fastapi.responses import StreamingResponse

from app.access.callers import Caller, KeyScope
from app.api import bodies, problems, threads
from app.api.admission import admit_submission
from app.api.callers import InjectedCaller, requires
from app.api.openai import continuation, errors, images, responses_store
from app.api.openai.calls import RUN_HEADER, Entries, ModelCall
from app.api.openai.endpoints import body_of
from app.api.openai.errors import OpenAIRoute, ResponseNotFound
from app.api.openai.options import InjectedOptions
from app.api.openai.road import InjectedRoad, Waiting
from app.api.routers import ApiRouter
from app.api.services import InjectedServices, Services
from app.inference.direct import DirectRequest
from app.inference.openai.responses import document
from app.inference.openai.responses.document import ResponseStatus
from app.inference.openai.responses.events import ResponseEvent, ResponseEvents
from app.inference.openai.responses.request import ResponsesRequest
from app.inference.token_stream import EntryKind, StreamEntry
from app.kernel.errors import ArrieroError, InvalidInput, Problem
from app.workflows import retention

router = ApiRouter(
    prefix="/v1/responses", tags=["openai"], dependencies=[requires(KeyScope.SUBMIT)], route_class=OpenAIRoute
)
#: For what only reads.
_READS = [requires(KeyScope.SUBMIT, KeyScope.READ)]

_ID = Annotated[str, Path(max_length=200, description="`resp_…`")]
_STATUSES = (400, 402, 404, 409, 413, 415, 429, 500, 503, 504)
_OBJECT = {"application/json": {"schema": {"type": "object"}}}
_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The response, or with `stream` its events as server-sent events",
        "content": {**_OBJECT, "text/event-stream": {}},
        "headers": {RUN_HEADER: {"schema": {"type": "string"}, "description": "The id of the run"}},
    },
    **errors.documented(*_STATUSES),
}
_FOUND: dict[int | str, dict[str, Any]] = {
    200: {"description": "In OpenAI's form", "content": _OBJECT},
    **errors.documented(400, 404, 500, 503),
}


@router.post("", summary="Create a response", responses=_ANSWER, openapi_extra=bodies.documented_as(ResponsesRequest))
async def create(
    request: Request,
    services: InjectedServices,
    road: InjectedRoad,
    caller: InjectedCaller,
    options: InjectedOptions,
    body: Annotated[ResponsesRequest, body_of(ResponsesRequest)],
) -> Response:
    """
    The model's answer to the input, after the conversation of `previous_response_id`, or in a `conversation`.

    With `background` it returns at once, and the response is read later. With `store: false` it cannot be read again.
    Each response is a run of its own: none is cached.
    """
    if body.conversation is not None:
        await continuation.require(services, caller, body.conversation.id, body.user, "conversation")
    body = await images.accepted(services, caller, body)
    before = await responses_store.conversation_before(services, road, caller, body.previous_response_id)
    try:
        chat = await threads.run_for_request(body.translated, before)
    except ValueError as error:
        where = "input" if str(error).startswith(("input", "the conversation")) else ""
        raise InvalidInput([Problem(where, str(error))], "request") from None
    # One in the background waits for as long as it takes.
    options = replace(options, answers=None, prefer=None if body.background else options.prefer)
    call = ModelCall(services, road, caller, chat, body.model, body.priority, options)
    images.require_reader(services, call.model, chat)

    def events() -> ResponseEvents:
        return ResponseEvents(body, str(call.run_id), call.request.created)

    if body.background:
        await call.decide()
        await threads.run_for_request(_submit, services, caller, call.request)
        if body.stream:
            return call.streamed(_events(None, road.follow(call.request), events))
        queued = document.outline(body, str(call.run_id), call.request.created, ResponseStatus.QUEUED)
        return problems.AsciiResponse(queued, headers=dict(call.headers))
    if body.stream:
        return call.streamed(_events(*await call.begun(), events))
    return await call.answer(request, lambda found: document.answered(body, str(call.run_id), found))


def _submit(services: Services, caller: Caller, request: DirectRequest) -> None:
    """Submit a call in the background: a run like any other, with the fallbacks of its model."""
    admit_submission(services, caller, caller.namespace_of(request.labels))
    services.runs.submit(replace(request.submission(), is_routed=False))


@router.get("/{response_id}", summary="A response", responses=_ANSWER, dependencies=_READS)
async def retrieve(
    response_id: _ID,
    services: InjectedServices,
    road: InjectedRoad,
    caller: InjectedCaller,
    stream: Annotated[bool, Query(description="its events, also of one that has ended")] = False,
    starting_after: Annotated[int | None, Query(ge=-1, description="only events after this number")] = None,
) -> Response:
    """A stored response. With `stream`, its events from the first one, or after `starting_after`."""
    found = await responses_store.load(services, road, caller, response_id)
    if not stream:
        return problems.AsciiResponse(found.document())
    after = -1 if starting_after is None else starting_after

    def events() -> ResponseEvents:
        return ResponseEvents(found.request, str(found.run_id), found.created)

    written = _events(None, road.follow(found.direct_request()), events, after)
    return StreamingResponse(written, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


@router.delete("/{response_id}", summary="Delete a response", responses={**_FOUND, **errors.documented(409)})
async def delete(response_id: _ID, services: InjectedServices, road: InjectedRoad, caller: InjectedCaller) -> Response:
    """Delete a response that has ended, with its run and its texts."""
    found = await responses_store.load(services, road, caller, response_id)
    if not found.has_ended:
        problem = Problem("response_id", "the response is still in progress", "one that has ended; cancel it first")
        raise InvalidInput([problem], "request")
    if not await threads.run_for_request(retention.remove_ended_run, services.database, found.run_id):
        raise ResponseNotFound("response", response_id)
    await road.forget(found.run_id)
    return problems.AsciiResponse({"id": response_id, "object": "response", "deleted": True})


@router.post("/{response_id}/cancel", summary="Cancel a response", responses=_FOUND)
async def cancel(response_id: _ID, services: InjectedServices, road: InjectedRoad, caller: InjectedCaller) -> Response:
    """Cancel a response in the background. One that has ended stays as it is."""
    found = await responses_store.load(services, road, caller, response_id)
    if not found.request.background:
        problem = Problem("response_id", "only a response in the background can be cancelled", "close the connection")
        raise InvalidInput([problem], "request")
    if not found.has_ended:
        await threads.run_for_request(services.runs.cancel, found.run_id, message="the client cancelled the response")
        found = await responses_store.load(services, road, caller, response_id)
    if not found.has_ended:  # its pool stops at the next token
        return problems.AsciiResponse(
            document.outline(found.request, str(found.run_id), found.created, ResponseStatus.CANCELLED)
        )
    return problems.AsciiResponse(found.document())


@router.get(
    "/{response_id}/input_items", summary="The input items of a response", responses=_FOUND, dependencies=_READS
)
async def input_items(
    response_id: _ID,
    services: InjectedServices,
    road: InjectedRoad,
    caller: InjectedCaller,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Annotated[Literal["asc", "desc"], Query(description="by default the last item first")] = "desc",
    after: Annotated[str | None, Query(max_length=200, description="the id of an item")] = None,
) -> Response:
    """The items that the response was created with, without those of the responses before."""
    found = await responses_store.load(services, road, caller, response_id)
    items = document.input_items(found.request, str(found.run_id))
    if order == "desc":
        items.reverse()
    if after is not None:
        place = next((place for place, item in enumerate(items) if item["id"] == after), None)
        if place is None:
            raise InvalidInput([Problem("after", f"there is no item {after!r}", "the id of an item")], "request")
        items = items[place + 1 :]
    page = items[:limit]
    ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
    return problems.AsciiResponse({"object": "list", "data": page, **ends, "has_more": len(items) > limit})


async def _events(
    first: StreamEntry | Waiting | None, entries: Entries, make: Callable[[], ResponseEvents], after: int = -1
) -> AsyncIterator[str]:
    """
    The server-sent events of a stream, those after a number.

    Without a first entry the run is known, and the events begin at once; otherwise with the first entry of the model
    that answers, whose run is that of the response.
    """
    async with aclosing(entries):
        events = None
        if first is None:
            events = make()
            for text in _texts(events.begin(), after):
                yield text
        attempt = 1
        try:
            entry = first if first is not None else await anext(entries, None)
            while entry is not None:
                if isinstance(entry, Waiting):
                    yield f": {entry.detail}\n\n"
                elif events is not None or entry.kind is not EntryKind.BEGUN:
                    if events is None:
                        events, attempt = make(), entry.attempt
                        for text in _texts(events.begin(), after):
                            yield text
                    if entry.attempt > attempt and entry.kind is EntryKind.BEGUN and events.has_text:
                        yield _text(
                            events.error("worker_lost", "the text begins again; read the response when it has ended")
                        )
                        return
                    attempt = entry.attempt
                    for text in _texts(_of_entry(entry, events), after):
                        yield text
                    if entry.kind in (EntryKind.DONE, EntryKind.FAILED):
                        return
                entry = await anext(entries, None)
        except ArrieroError as error:
            yield _text((events or make()).error(None, str(error)))


def _of_entry(entry: StreamEntry, events: ResponseEvents) -> Iterable[ResponseEvent]:
    match entry.kind:
        case EntryKind.TEXT:
            return events.piece(entry.value)
        case EntryKind.PIECES:
            return events.pieces(entry.json())
        case EntryKind.DONE:
            return events.last(entry.json())
        case EntryKind.FAILED:
            failed = entry.json()
            return events.failed(failed["reason"], failed["message"])
        case EntryKind.BEGUN:
            return ()


def _texts(events: Iterable[ResponseEvent], after: int) -> list[str]:
    return [_text(event) for event in events if event["sequence_number"] > after]


def _text(event: ResponseEvent) -> str:
    return f"event: {event['type']}\ndata: {json.dumps(event, ensure_ascii=True, separators=(',', ':'))}\n\n"
