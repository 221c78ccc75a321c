"""
The road of a request to a model: directly to a pool with a free slot, or else as a run that the scheduler sees.

Both give the same entries. A direct request whose pool has died goes on as a run, if the client has got no text yet.
A client that goes away stops its request at the next token.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Annotated, Any
from uuid import UUID

import redis
from fastapi import Depends, Request
from redis.asyncio import Redis

from app.api import threads
from app.api.admission import CallGate
from app.api.openai.ended_runs import EndedRuns
from app.api.openai.errors import TooManyCalls
from app.api.openai.token_reader import Subscription, TokenReader
from app.api.openai.wait_estimates import WaitEstimates
from app.catalog.model import Model
from app.inference import direct, token_stream
from app.inference.direct import DirectRequest
from app.inference.routing.fleet import FleetReader
from app.inference.token_stream import EntryKind, StreamEntry
from app.kernel import log
from app.kernel.database import Database
from app.kernel.errors import ArrieroError, BrokerUnreachable, FailureReason, NotFound
from app.workflows.runs import views
from app.workflows.runs.service import Runs
from app.workflows.state_machine.states import FINAL_RUNS, RunState

_log = log.get(__name__)

#: Seconds without an entry after which a client is told that it waits, and the pool or the run is checked.
CHECK_AFTER = 2.0
#: Most calls of this process at a time; each keeps its request and what the client has not read.
MAX_CALLS = 1_000
#: Seconds for an answer of Redis: more than the longest wait for entries.
_ANSWER_TIMEOUT = 40
#: Seconds for which a list of direct requests is kept after the last one.
_LIST_EXPIRES = 10


def connect(redis_url: str) -> Redis:
    """Return a client for requests and token streams; a connection is opened when it is needed."""
    return Redis.from_url(
        redis_url,
        # The library's own limit is 100. Every call sends a few short commands, each on a connection that is free.
        max_connections=2 * MAX_CALLS,
        socket_connect_timeout=2,
        socket_timeout=_ANSWER_TIMEOUT,
        health_check_interval=15,
        protocol=2,
    )


@dataclass(frozen=True, slots=True)
class Waiting:
    """Nothing has come for some seconds."""

    #: What the request waits for.
    detail: str
    #: Expected seconds until it begins; None when that is not known, or depends on the scheduler's decision.
    seconds: float | None = None
    #: `detail` for a caller of a namespace, where it differs.
    outline: str = ""


class Road:
    """The road of all requests of this process."""

    def __init__(
        self, runs: Runs, client: Redis, reader: TokenReader, estimates: WaitEstimates, gate: CallGate
    ) -> None:
        self._runs, self._redis, self.reader, self.estimates, self.gate = runs, client, reader, estimates, gate
        self._ended = EndedRuns(runs.database)
        #: What selectors and fallbacks know of the fleet.
        self.fleet = FleetReader(runs.database)
        self._tasks: set[asyncio.Task[None]] = set()
        self._active: set[UUID] = set()

    async def send(self, request: DirectRequest, model: Model) -> AsyncGenerator[StreamEntry | Waiting]:
        """
        Send a request, and yield its entries until it has ended. Closing the iterator stops the request.

        Raises TooManyCalls, BrokerUnreachable, and what a submission raises.
        """
        if len(self._active) >= MAX_CALLS:
            raise TooManyCalls(MAX_CALLS)
        self._active.add(request.run_id)
        try:
            async with aclosing(self._send(request, model)) as entries:
                async for entry in entries:
                    yield entry
        finally:
            self._active.discard(request.run_id)

    async def _send(self, request: DirectRequest, model: Model) -> AsyncGenerator[StreamEntry | Waiting]:
        key = token_stream.key(str(request.run_id), direct.STEP)
        message = request.encoded()
        requests = direct.requests_key(model.slug)
        try:
            async with self.reader.follow_new(key, ("RPUSH", requests, message)) as subscription:
                sent = _Sent(self, request, model, requests, message, subscription)
                try:
                    async with aclosing(sent.entries()) as entries:
                        async for entry in entries:
                            yield entry
                finally:
                    if not sent.ended:
                        self._in_background(sent.stop())
        except (redis.RedisError, OSError) as error:
            raise BrokerUnreachable(f"the broker is unreachable: {error}") from error

    async def withdraw(self, requests: str, message: str) -> bool:
        """Take a request back; False when a pool has it."""
        async with self._redis.pipeline(transaction=False) as pipeline:
            pipeline.lrem(requests, 1, message)
            pipeline.expire(requests, _LIST_EXPIRES)
            removed, _ = await pipeline.execute(raise_on_error=False)
        if isinstance(removed, redis.ResponseError):
            return True  # the key is no list: no pool can have it
        if isinstance(removed, redis.RedisError):
            raise removed
        return bool(removed)

    async def is_alive(self, pool_id: str) -> bool:
        """Whether a pool works on direct requests."""
        return bool(await self._redis.exists(direct.alive_key(pool_id)))

    async def stop_in_pool(self, pool_id: str, request: DirectRequest) -> None:
        """Make a pool stop a request."""
        async with self._redis.pipeline(transaction=False) as pipeline:
            pipeline.rpush(direct.stop_key(pool_id), str(request.run_id))
            pipeline.expire(direct.stop_key(pool_id), 60)
            await pipeline.execute()

    async def submit(self, request: DirectRequest) -> None:
        """Submit the request as a run, unless it is one already."""
        await threads.run_for_stream(self._runs.submit, request.submission())

    async def cancel(self, request: DirectRequest) -> None:
        """Cancel the run."""
        await threads.run_for_stream(self._runs.cancel, request.run_id, message="the client has gone away")

    async def ending(self, run_id: UUID, last: str) -> StreamEntry | None:
        """The last entry of a run as the database knows it; None while it has not ended, or does not exist."""
        if not await self._ended.has(run_id):
            return None
        return await threads.run_for_stream(_ending, self._runs.database, run_id, last)

    async def waiting(self, model: Model, run_id: UUID) -> Waiting:
        """What a run waits for, and for how long."""
        found = await self.estimates.of(model, run_id)
        return Waiting(found.detail, found.seconds if found.is_coming else None, found.outline)

    async def follow(self, request: DirectRequest) -> AsyncGenerator[StreamEntry | Waiting]:
        """Yield the entries of a run, from its first one until it has ended. Nothing stops the run."""
        try:
            async with self.reader.follow(
                token_stream.key(str(request.run_id), direct.STEP), token_stream.START
            ) as subscription:
                while True:
                    entry = await subscription.next(CHECK_AFTER) or await self.ending(request.run_id, subscription.last)
                    yield entry or Waiting(f"waiting for {request.model}; see: arriero fleet why {request.model}")
                    if entry is not None and entry.kind in (EntryKind.DONE, EntryKind.FAILED):
                        return
        except (redis.RedisError, OSError) as error:
            raise BrokerUnreachable(f"the broker is unreachable: {error}") from error

    async def has_ended(self, run_id: UUID) -> bool | None:
        """Whether the stream of a run has its last entry; None when there is no stream."""
        try:
            found: Any = await self._redis.xrevrange(token_stream.key(str(run_id), direct.STEP), count=1)
        except (redis.RedisError, OSError) as error:
            raise BrokerUnreachable(f"the broker is unreachable: {error}") from error
        entry = token_stream.read_entry(*found[0]) if found else None
        return None if entry is None else entry.kind in (EntryKind.DONE, EntryKind.FAILED)

    async def forget(self, run_id: UUID) -> None:
        """Remove the stream of a run."""
        with suppress(redis.RedisError, OSError):  # it expires soon
            await self._redis.delete(token_stream.key(str(run_id), direct.STEP))

    async def close(self) -> None:
        """Wait for what runs in the background."""
        await self.gate.close()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=2)

    def _in_background(self, action: Any) -> None:
        task: asyncio.Task[None] = asyncio.create_task(action)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Sent:
    """A request that was sent."""

    def __init__(
        self,
        road: Road,
        request: DirectRequest,
        model: Model,
        requests: str,
        message: str,
        subscription: Subscription,
    ) -> None:
        self._road, self._request, self._model, self._subscription = road, request, model, subscription
        self._requests, self._message = requests, message
        #: The pool that has taken it.
        self._pool: str | None = None
        #: It is a run that the scheduler sees.
        self._is_run = False
        self._attempt = 1
        self._has_text = self._has_begun = False
        self.ended = False

    async def entries(self) -> AsyncGenerator[StreamEntry | Waiting]:
        """The entries until the request has ended."""
        entry = await self._subscription.next(direct.TAKEN_WITHIN.total_seconds())
        if entry is None and await self._road.withdraw(self._requests, self._message):
            await self._become_run()
        while True:
            if entry is None:
                entry = await self._subscription.next(CHECK_AFTER)
            found = entry or await self._checked()
            entry = None
            if found is None:
                yield await self._waiting()
                continue
            if isinstance(found, StreamEntry) and not self._accept(found):
                yield StreamEntry(found.id, EntryKind.FAILED, _lost())
                await self.stop()
                self.ended = True
                return
            self.ended = found.kind in (EntryKind.DONE, EntryKind.FAILED)
            yield found
            if self.ended:
                return

    def _accept(self, entry: StreamEntry) -> bool:
        """Note what an entry says. False when another attempt begins after the client has got text."""
        if entry.kind is EntryKind.BEGUN:
            self._has_begun = True
            self._is_run = self._is_run or entry.attempt > 1
            if not self._is_run:
                self._pool = entry.value
        restarted, self._attempt = entry.attempt > self._attempt, max(entry.attempt, self._attempt)
        if restarted and self._has_text and entry.kind is not EntryKind.DONE:
            return False
        self._has_text = self._has_text or entry.is_text
        return True

    async def _checked(self) -> StreamEntry | None:
        """Nothing has come for a while: the last entry, if the request has ended without one."""
        if not self._is_run:
            if self._pool is not None and await self._road.is_alive(self._pool):
                return None
            if self._subscription.entries.qsize():
                return None
            # Its pool has died. If the run was recorded, its lease will expire; otherwise it is submitted now.
            _log.warning("direct_request_lost", run_id=str(self._request.run_id), pool=self._pool)
            await self._become_run()
            return None
        found = await self._road.ending(self._request.run_id, self._subscription.last)
        return None if self._subscription.entries.qsize() else found

    async def _become_run(self) -> None:
        await self._road.submit(self._request)
        self._is_run = True

    async def _waiting(self) -> Waiting:
        if self._is_run and not self._has_begun:
            return await self._road.waiting(self._model, self._request.run_id)
        return Waiting("working on the prompt")

    async def stop(self) -> None:
        """Stop the request, wherever it is."""
        self.ended = True
        with suppress(redis.RedisError, OSError):
            if not self._is_run:
                if self._pool is None and await self._road.withdraw(self._requests, self._message):
                    return
                while self._pool is None and (entry := await self._subscription.next(CHECK_AFTER)) is not None:
                    self._accept(entry)
                if self._pool is not None:
                    await self._road.stop_in_pool(self._pool, self._request)
        with suppress(ArrieroError):  # a request that was not recorded yet is no run: its pool will do so
            await self._road.cancel(self._request)


def _ending(database: Database, run_id: UUID, last: str) -> StreamEntry | None:
    try:
        run = views.run(database, run_id, 0).run
    except NotFound:
        return None
    if run.state not in FINAL_RUNS:
        return None
    if run.state == RunState.SUCCEEDED:
        text = "".join(views.text_of(database, run_id, "output", direct.STEP))
        return StreamEntry(last, EntryKind.DONE, text)
    error = run.error or {}
    reason = FailureReason.CANCELLED if run.state == RunState.CANCELLED else FailureReason.INTERNAL
    failed = {"reason": error.get("reason", reason), "message": error.get("message", f"the run was {run.state}")}
    return StreamEntry(last, EntryKind.FAILED, json.dumps(failed))


def _lost() -> str:
    message = "the pool died while it wrote this text; send the request again"
    return json.dumps({"reason": FailureReason.WORKER_LOST, "message": message})


async def _of_app(request: Request) -> Road:
    road: Road = request.app.state.road
    return road


#: The type of an endpoint's argument that receives the road.
InjectedRoad = Annotated[Road, Depends(_of_app)]
