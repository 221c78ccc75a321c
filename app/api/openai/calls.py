"""
Calls of models: what the endpoints of OpenAI's form have in common.

A plain answer is awaited; a stream begins when its first entry is known, so that an invalid request still gets its HTTP
status. While a request waits longer, the stream has comments, which clients ignore.
An answer comes from the response cache, or else from a model; in both cases the same entries do.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from typing import Any
from uuid import UUID

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from app.access import namespaces
from app.access.callers import Caller
from app.api import problems, threads
from app.api.admission import CallAdmission, openai_headers, refuse_shed
from app.api.cache.answers import CachedCall
from app.api.openai import deadlines, errors
from app.api.openai.errors import DeadlineUnmet, RequestFailed
from app.api.openai.fallback import RoutedCall
from app.api.openai.options import CallOptions
from app.api.openai.road import Road, Waiting
from app.api.services import Services
from app.catalog.model import Model
from app.inference.cache import policy
from app.inference.cache.policy import CacheStatus
from app.inference.direct import WORKFLOW, DirectRequest
from app.inference.hooks import selection
from app.inference.hooks.selection import HookTarget
from app.inference.openai.chunks import Chunks
from app.inference.token_stream import EntryKind, StreamEntry
from app.kernel.errors import ArrieroError, Conflict

#: The header with the id of the run.
RUN_HEADER = "X-Arriero-Run"
#: What the response cache did, a `CacheStatus`.
CACHE_HEADER = "X-Arriero-Cache"
#: What comes of a request.
Entries = AsyncGenerator[StreamEntry | Waiting]


class ModelCall:
    """One call of a model."""

    def __init__(
        self,
        services: Services,
        road: Road,
        caller: Caller,
        body: BaseModel,
        model: str,
        priority: str,
        options: CallOptions | None = None,
    ) -> None:
        """
        `model` is a name, an alias or a selector. Without options nothing is cached.

        Raises LoadShed, ModelNotFound, and InvalidInput for a wrong header, or a selector that no model suits.
        """
        refuse_shed(services, priority)
        self._road, self._caller, self._budgets = road, caller, services.budgets
        self._admitted: list[CallAdmission] = []
        document = body.model_dump(mode="json", by_alias=True, exclude_unset=True)
        self._routed = RoutedCall(services, road, caller, document, model, priority)
        self._deadline = deadlines.deadline_of(
            options.prefer if options is not None else None, priority, services.settings.api.wait_timeout
        )
        self._answers = options.answers if options is not None else None
        asked = policy.BYPASS
        if options is not None and self._answers is not None:
            asked = policy.policy_of(document, options.cache_control)
        namespace = self.request.labels.get(namespaces.LABEL, namespaces.DEFAULT)
        if self._has_hooks(services, namespace):  # a kept answer would pass none of them
            asked = policy.BYPASS
        #: What the response cache does for it.
        self.cached = CachedCall(self.request, self.model, namespace, asked, self.computed)

    def _has_hooks(self, services: Services, namespace: str) -> bool:
        """Whether a hook looks at the call, by its model or one of those that may answer instead."""
        names = (self.model.name, *self.model.fallback.models)
        targets = [HookTarget(name, WORKFLOW, namespace) for name in names]
        return any(selection.selected(services.settings.hooks, target) for target in targets)

    @property
    def model(self) -> Model:
        """The model that answers, or is tried now."""
        return self._routed.model

    @property
    def request(self) -> DirectRequest:
        """The request to that model."""
        return self._routed.request

    @property
    def run_id(self) -> UUID:
        """The id of the call, and of its run, unless the answer is cached."""
        return self.request.run_id

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers of its answer; they are final with the first entry."""
        cached = self.cached
        found = {RUN_HEADER: str(cached.run_id), "X-Request-Id": str(self.run_id), CACHE_HEADER: cached.status.value}
        if cached.status in (CacheStatus.HIT, CacheStatus.NEAR):
            found["Age"] = str(int(cached.age))
        if cached.status is CacheStatus.NEAR:
            found["X-Arriero-Similarity"] = f"{cached.similarity:.4f}"
        if self._deadline.is_preferred:
            found["Preference-Applied"] = f"wait={self._deadline.seconds:.0f}"
        limits = openai_headers(self._admitted[0].standings) if self._admitted else {}
        return {**found, **self._routed.headers, **limits}

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
        return self.streamed(self._events(*await self.begun(), chunks))

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
            has_begun = not self._deadline.is_preferred
            while (first.kind is EntryKind.BEGUN) if isinstance(first, StreamEntry) else not has_begun:
                has_begun = has_begun or isinstance(first, StreamEntry)
                first = await anext(entries)
            if isinstance(first, StreamEntry) and first.kind is EntryKind.FAILED:
                raise _failed(first)
            stack.pop_all()
        return first, entries

    def entries(self) -> Entries:
        """
        Return what comes until the call has ended. Closing the iterator stops it.

        It counts once against the limits of its caller, however it is answered. Raises LimitReached, DeadlineUnmet.
        """
        found = deadlines.within(self._deadline, self._found())
        return self._road.gate.metered(self._caller, self.request, found, self._admitted)

    async def decide(self) -> None:
        """Decide the model of a selector. Raises NoModelAvailable."""
        await self._routed.decide()

    async def _found(self) -> Entries:
        await self.decide()
        self.cached.request, self.cached.model = self.request, self.model
        source = self._answers.entries(self.cached) if self._answers is not None else self.computed()
        async with aclosing(source) as entries:
            async for entry in entries:
                if self._caller.namespace is not None and isinstance(entry, Waiting) and entry.outline:
                    yield replace(entry, detail=entry.outline)
                else:
                    yield entry

    async def computed(self) -> Entries:
        """
        Send the request to a model, and return what comes. Closing the iterator stops the request.

        Raises BudgetUsedUp: a kept answer costs nothing, so only what is computed needs a budget.
        """
        await self._afford()
        async with aclosing(self._routed.entries()) as entries:
            async for entry in entries:
                if self.model is not self.cached.model:  # a fallback, whose answer is not that of the cache's key
                    self.cached.is_kept, self.cached.run_id = False, self.request.run_id
                yield entry

    async def _afford(self) -> None:
        request, budgets = self.request, self._budgets
        namespace = request.labels.get(namespaces.LABEL, namespaces.DEFAULT)
        workflow, models = request.submission().definition.workflow, (request.model,)
        if budgets.is_fresh(namespace):
            budgets.check(namespace, workflow, models, request.priority)
        else:
            await threads.run_for_request(budgets.check, namespace, workflow, models, request.priority)

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

    async def _events(self, first: StreamEntry | Waiting, entries: Entries, chunks: Chunks) -> AsyncIterator[str]:
        """The server-sent events of a stream. Closing it stops the call."""
        async with aclosing(entries):
            chunks.model = self.model.name
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
                    chunks.model = self.model.name
            except DeadlineUnmet as error:
                yield _event(errors.document(str(error), 503, code=errors.DEADLINE))
            except ArrieroError as error:
                yield _event(errors.document(str(error), 500))


def _events_of(entry: StreamEntry | Waiting, chunks: Chunks) -> list[str]:
    if isinstance(entry, Waiting):
        return [f": {' '.join(entry.detail.split())}\n\n"]
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
