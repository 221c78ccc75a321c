"""
Calls of models: what the endpoints of OpenAI's form have in common.

A plain answer is awaited; a stream begins when its first entry is known, so that an invalid request still gets its HTTP
status. While a request waits longer, the stream has comments, which clients ignore.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, aclosing
from typing import Any
from uuid import UUID

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from app.access.callers import Caller
from app.api import problems
from app.api.openai import errors
from app.api.openai.errors import ModelNotFound, RequestFailed
from app.api.openai.road import Road, Waiting
from app.api.services import Services
from app.catalog.model import Model
from app.inference.direct import DirectRequest
from app.inference.openai.chunks import Chunks
from app.inference.token_stream import EntryKind, StreamEntry
from app.kernel import clock
from app.kernel.errors import ArrieroError, Conflict

#: The header with the id of the run.
RUN_HEADER = "X-Arriero-Run"
#: What comes of a request.
Entries = AsyncGenerator[StreamEntry | Waiting]


class ModelCall:
    """One call of a model."""

    def __init__(
        self, services: Services, road: Road, caller: Caller, body: BaseModel, model: str, priority: str
    ) -> None:
        """Raises ModelNotFound."""
        found = services.catalog.find(model)
        if found is None:
            raise ModelNotFound("model", model, services.catalog.names)
        self.model: Model = found
        self._road = road
        document = body.model_dump(mode="json", by_alias=True, exclude_unset=True)
        self.request = DirectRequest.new(model, document, priority, caller.labels({}), int(clock.now().timestamp()))

    @property
    def run_id(self) -> UUID:
        """The id of its run."""
        return self.request.run_id

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers of its answer."""
        return {RUN_HEADER: str(self.run_id), "X-Request-Id": str(self.run_id)}

    async def answer(self, request: Request, form: Callable[[Any], Any] = lambda document: document) -> Response:
        """
        Return the whole answer, in another form if one is given. A client that goes away stops the call.

        Raises RequestFailed, BrokerUnreachable, and what a submission raises.
        """
        answering = asyncio.create_task(self._document())
        leaving = asyncio.create_task(_left(request))
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                return Response(status_code=499)
            return problems.AsciiResponse(form(answering.result()), headers=dict(self.headers))
        finally:
            for task in (answering, leaving):
                task.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)

    async def stream(self, chunks: Chunks) -> StreamingResponse:
        """
        Return a stream of chunks as server-sent events.

        Raises what `answer` raises, if that is known before the first token.
        """
        return self.streamed(_events(*await self.begun(), chunks))

    def streamed(self, events: AsyncIterator[str]) -> StreamingResponse:
        """Return a stream of server-sent events."""
        headers = {**self.headers, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)

    async def begun(self) -> tuple[StreamEntry | Waiting, Entries]:
        """
        Send the request, and return its first entry beyond its beginning, and those that follow.

        Raises what `answer` raises, if that is known before the first token.
        """
        entries = self.entries()
        async with AsyncExitStack() as stack:
            stack.push_async_callback(entries.aclose)
            first = await anext(entries)
            while isinstance(first, StreamEntry) and first.kind is EntryKind.BEGUN:
                first = await anext(entries)
            if isinstance(first, StreamEntry) and first.kind is EntryKind.FAILED:
                raise _failed(first)
            stack.pop_all()
        return first, entries

    def entries(self) -> Entries:
        """Send the request, and return what comes until it has ended. Closing the iterator stops the request."""
        return self._road.send(self.request, self.model)

    async def _document(self) -> Any:
        async with aclosing(self.entries()) as entries:
            async for entry in entries:
                if isinstance(entry, Waiting):
                    continue
                if entry.kind is EntryKind.FAILED:
                    raise _failed(entry)
                if entry.kind is EntryKind.DONE:
                    return entry.json()
        raise Conflict(f"run {self.run_id} has ended without an answer")


async def _events(first: StreamEntry | Waiting, entries: Entries, chunks: Chunks) -> AsyncIterator[str]:
    """The server-sent events of a stream. Closing it stops the call."""
    async with aclosing(entries):
        yield _event(chunks.first())
        try:
            entry: StreamEntry | Waiting | None = first
            while entry is not None:
                for event in _events_of(entry, chunks):
                    yield event
                if isinstance(entry, StreamEntry) and entry.kind is EntryKind.DONE:
                    yield "data: [DONE]\n\n"
                    return
                entry = await anext(entries, None)
        except ArrieroError as error:
            yield _event(errors.document(str(error), 500))


def _events_of(entry: StreamEntry | Waiting, chunks: Chunks) -> list[str]:
    if isinstance(entry, Waiting):
        return [f": {entry.detail}\n\n"]
    match entry.kind:
        case EntryKind.TEXT:
            return [_event(chunks.piece(entry.value))]
        case EntryKind.PIECES:
            return [_event(chunk) for chunk in chunks.pieces(entry.json())]
        case EntryKind.DONE:
            return [_event(chunk) for chunk in chunks.last(entry.json())]
        case EntryKind.FAILED:
            failed = entry.json()
            return [_event(errors.of_failure(failed["reason"], failed["message"])[1])]
        case EntryKind.BEGUN:
            return []


def _event(content: Any) -> str:
    # Without ids: some clients take a comment after an id for an event.
    return f"data: {json.dumps(content, ensure_ascii=True, separators=(',', ':'))}\n\n"


def _failed(entry: StreamEntry) -> RequestFailed:
    failed = entry.json()
    return RequestFailed(failed["reason"], failed["message"])


async def _left(request: Request) -> None:
    """Wait until the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
