"""
The answers of calls: kept ones, those that are being computed for another call, or new ones.

A call that may be cached joins its key: it finds an answer, follows the computation of one, or computes it. A call that
follows a computation of another process reads its token stream, and computes by itself when that process has died or
the computation has failed, unless its client has got text already.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from uuid import UUID
from weakref import WeakValueDictionary

import redis
from redis.asyncio import Redis

from app.api.cache.builds import Builds
from app.api.cache.flights import Flight
from app.api.cache.near import SimilarChats
from app.api.openai.road import CHECK_AFTER, Road, Waiting
from app.catalog.model import Model
from app.inference import direct, token_stream
from app.inference.cache import key as keys
from app.inference.cache.answer import CachedAnswer, readdressed
from app.inference.cache.key import CacheKey
from app.inference.cache.policy import BYPASS, CachePolicy, CacheStatus
from app.inference.cache.store import RENEWED_EACH, CacheStore
from app.inference.direct import DirectRequest
from app.inference.token_stream import EntryKind, StreamEntry
from app.kernel import ids, log
from app.kernel.errors import BrokerUnreachable, FailureReason
from app.kernel.settings import Settings

_log = log.get(__name__)

#: How often a call follows another one's computation before it computes by itself.
_MOST_FOLLOWED = 2
#: What comes of a call.
_Entries = AsyncGenerator[StreamEntry | Waiting]


@dataclass(slots=True)
class CachedCall:
    """A call, and what the cache did for it, which is known with its first entry."""

    request: DirectRequest
    model: Model
    namespace: str
    policy: CachePolicy
    #: Sends the request.
    compute: Callable[[], _Entries]
    status: CacheStatus = CacheStatus.BYPASS
    #: The run that has computed the answer, or computes it.
    run_id: UUID = field(init=False)
    #: Seconds since the answer was computed.
    age: float = 0.0
    #: Of a similar chat: the cosine of the last messages.
    similarity: float = 0.0
    #: Whether the client has got text.
    has_text: bool = False
    #: False when the answer is not that of the requested model, and is not kept.
    is_kept: bool = True

    def __post_init__(self) -> None:
        """By default it is the call's own run."""
        self.run_id = self.request.run_id


class Answers:
    """The answers of the calls of this process."""

    def __init__(
        self, client: Redis, road: Road, settings: Settings, find_model: Callable[[str], Model | None]
    ) -> None:
        """Does not connect. `find_model` finds a model of the catalogue."""
        own = settings.cache
        self._road, self.is_enabled, process = road, own.enabled, ids.new_secret()[:16]
        self.store = CacheStore(client, process, own.ttl, own.max_entry_bytes, own.max_bytes)
        self._similar = SimilarChats(client, road, own, find_model)
        self._builds = Builds(settings.data_dir)
        self._flights: dict[str, Flight] = {}
        #: Keys of computations of other processes that calls here follow.
        self._followed: dict[CacheKey, int] = {}
        #: While a call joins a key, others of this process wait: they are to find its computation.
        self._joining: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._renewal: asyncio.Task[None] | None = None

    async def entries(self, call: CachedCall) -> _Entries:
        """The entries of a call until it has ended. Closing the iterator stops it, unless others wait for the same."""
        is_cached = self.is_enabled and call.policy != BYPASS
        async with aclosing(self._cached(call) if is_cached else call.compute()) as entries:
            async for entry in entries:
                call.has_text = call.has_text or (isinstance(entry, StreamEntry) and entry.is_text)
                yield entry

    async def close(self) -> None:
        """Stop all computations."""
        tasks = [flight.task for flight in self._flights.values()] + ([self._renewal] if self._renewal else [])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _cached(self, call: CachedCall) -> _Entries:
        request = call.request
        build = self._builds.of(call.model)
        key = keys.key_of(call.namespace, call.model.name, build, request.body, request.priority)
        # A computation that others join has one model, so that each call can tell which one answered.
        is_shared = call.policy.reads and call.policy.writes and not call.model.fallback.models
        try:
            async with aclosing(self._shared(call, key) if is_shared else await self._alone(call, key)) as entries:
                async for entry in entries:
                    yield entry
        except (redis.RedisError, OSError) as error:
            raise BrokerUnreachable(f"the broker is unreachable: {error}") from error

    async def _alone(self, call: CachedCall, key: CacheKey) -> _Entries:
        """A call that must not get a kept answer, or whose own must not be kept."""
        if call.policy.reads and (found := await self.store.find(key, call.policy)) is not None:
            answer = CachedAnswer.decoded(found.answer)
            if answer is not None:
                await self._note(call, key, CacheStatus.HIT)
                return self._kept(call, answer, found.age)
        await self._note(call, key, CacheStatus.MISS)
        return self._recorded(call, key) if call.policy.writes else call.compute()

    async def _shared(self, call: CachedCall, key: CacheKey) -> _Entries:
        for _ in range(_MOST_FOLLOWED):
            source = await self._join(call, key)
            if source is None:
                break
            is_own = call.status is not CacheStatus.SHARED
            async with aclosing(source) as entries:
                async for entry in entries:
                    if is_own or isinstance(entry, Waiting):
                        yield entry
                    elif entry.kind is not EntryKind.FAILED or call.has_text:
                        yield self._for(call, entry)
                    if isinstance(entry, StreamEntry) and entry.kind in (EntryKind.DONE, EntryKind.FAILED):
                        if is_own or entry.kind is EntryKind.DONE or call.has_text:
                            return
                        break
                else:
                    if is_own or call.has_text:
                        return
        await self._note(call, key, CacheStatus.MISS)
        call.run_id = call.request.run_id
        async with aclosing(call.compute()) as entries:
            async for entry in entries:
                yield entry

    async def _join(self, call: CachedCall, key: CacheKey) -> _Entries | None:
        """The kept answer, the computation for another call, or the new one for this call."""
        own = str(call.request.run_id)
        lock = self._joining.setdefault(key.flight, asyncio.Lock())
        async with lock:
            joined = await self.store.join(key, own, call.policy)
            if joined.status is CacheStatus.MISS:
                flight = Flight(key, own, self._computed(call, key), lambda one: self._ended(one, call), self._left)
                self._flights[own] = flight
        call.status = joined.status
        match joined.status:
            case CacheStatus.HIT:
                answer = CachedAnswer.decoded(joined.answer)
                return None if answer is None else self._kept(call, answer, joined.age)
            case CacheStatus.SHARED:
                call.run_id = UUID(joined.run_id)
                local = self._flights.get(joined.run_id)
                return local.follow() if local is not None else self._follow(key, call.run_id, call)
            case _:
                call.run_id = call.request.run_id
                self._renew()
                return flight.follow()

    async def _computed(self, call: CachedCall, key: CacheKey) -> _Entries:
        """The answer of a similar chat, or a new one."""
        chat = await self._similar.embedded(call.request, call.namespace, self._builds.of(call.model))
        near = None if chat is None else await self._similar.find(chat)
        if near is not None:
            found = await self.store.find(replace(key, digest=near[0]), call.policy)
            answer = None if found is None else CachedAnswer.decoded(found.answer)
            if found is not None and answer is not None:
                call.similarity, call.is_kept = near[1], False
                await self._note(call, key, CacheStatus.NEAR)
                async with aclosing(self._kept(call, answer, found.age)) as entries:
                    async for entry in entries:
                        yield entry
                return
        async with aclosing(call.compute()) as entries:
            async for entry in entries:
                yield entry
        if chat is not None and call.is_kept:
            await self._similar.add(chat, key.digest)

    async def _kept(self, call: CachedCall, answer: CachedAnswer, age: float) -> _Entries:
        call.run_id, call.age = UUID(answer.run_id), age
        for entry in answer.stream(str(call.request.run_id), call.request.created):
            yield entry

    def _for(self, call: CachedCall, entry: StreamEntry) -> StreamEntry:
        """The entry of another call's computation, for this call."""
        if entry.kind is EntryKind.DONE:
            return readdressed(entry, str(call.request.run_id), call.request.created)
        return entry

    async def _recorded(self, call: CachedCall, key: CacheKey) -> _Entries:
        """Compute, and keep the answer."""
        kept: list[StreamEntry] = []
        async with aclosing(call.compute()) as entries:
            async for entry in entries:
                if isinstance(entry, StreamEntry):
                    kept.append(entry)
                    if entry.kind is EntryKind.DONE and call.is_kept:
                        await self._keep(key, str(call.request.run_id), kept)
                yield entry

    async def _follow(self, key: CacheKey, run_id: UUID, call: CachedCall) -> _Entries:
        """The entries of a computation of another process, from its token stream. Ends early when it has died."""
        self._followed[key] = self._followed.get(key, 0) + 1
        self._renew()
        pool, attempt, kept = None, 1, list[StreamEntry]()
        try:
            async with self._road.reader.follow(
                token_stream.key(str(run_id), direct.STEP), token_stream.START
            ) as subscription:
                while True:
                    entry = await subscription.next(CHECK_AFTER)
                    if entry is None:
                        if await self._is_alive(key, run_id, pool):
                            yield await self._road.waiting(call.model, run_id)
                            continue
                        entry = await self._road.ending(run_id, subscription.last)
                        if entry is None:
                            _log.warning("computation_lost", run_id=str(run_id))
                            if call.has_text:
                                yield StreamEntry(subscription.last, EntryKind.FAILED, _lost())
                            return
                    if entry.kind is EntryKind.BEGUN:
                        pool = entry.value
                    if entry.attempt > attempt and call.has_text and entry.kind is not EntryKind.DONE:
                        yield StreamEntry(entry.id, EntryKind.FAILED, _lost())
                        return
                    attempt = max(entry.attempt, attempt)
                    kept.append(entry)
                    if (
                        entry.kind is EntryKind.DONE
                        and _is_of(entry, call.model)
                        and not await self.store.is_computed(key, str(run_id))
                    ):
                        await self._keep(key, str(run_id), kept)  # who computed it has died
                    yield entry
                    if entry.kind in (EntryKind.DONE, EntryKind.FAILED):
                        return
        finally:
            self._followed[key] -= 1
            if not self._followed[key]:
                del self._followed[key]

    async def _is_alive(self, key: CacheKey, run_id: UUID, pool: str | None) -> bool:
        """Whether somebody works on a computation: the process that began it, or the pool that has taken it."""
        if await self.store.is_computed(key, str(run_id)):
            return True
        return pool is not None and await self._road.is_alive(pool)

    async def _ended(self, flight: Flight, call: CachedCall) -> None:
        self._flights.pop(flight.run_id, None)
        await self._keep(flight.key, flight.run_id, flight.entries if call.is_kept else [])

    async def _left(self, flight: Flight) -> None:
        """The last call of this process has left a computation."""
        is_unwanted = True
        with suppress(redis.RedisError, OSError):
            is_unwanted = await self.store.leave(flight.key, flight.run_id)
        if is_unwanted and not flight.is_awaited:
            flight.task.cancel()

    async def _keep(self, key: CacheKey, run_id: str, entries: list[StreamEntry]) -> None:
        """Keep the answer of a computation that has ended, if it has one, and release its key."""
        answer = CachedAnswer.of(run_id, entries)
        try:
            await self.store.end(key, run_id, b"" if answer is None else answer.encoded())
        except (redis.RedisError, OSError) as error:
            _log.warning("answer_not_cached", error=str(error))

    async def _note(self, call: CachedCall, key: CacheKey, status: CacheStatus) -> None:
        call.status = status
        await self.store.count(key, status)

    def _renew(self) -> None:
        if self._renewal is None or self._renewal.done():
            self._renewal = asyncio.create_task(self._renew_all(), name="cache-leases")

    async def _renew_all(self) -> None:
        while self._flights or self._followed:
            await asyncio.sleep(RENEWED_EACH.total_seconds())
            led = [(flight.key, flight.run_id) for flight in self._flights.values() if not flight.has_ended]
            try:
                await self.store.renew(led, self._followed)
                for flight in list(self._flights.values()):
                    if not flight.is_awaited:
                        await self._left(flight)
            except (redis.RedisError, OSError) as error:
                _log.warning("cache_leases_not_renewed", error=str(error))
            except Exception:  # noqa: BLE001 the outermost loop of the task: all leases depend on it
                _log.exception("cache_leases_not_renewed")


def _is_of(answer: StreamEntry, model: Model) -> bool:
    """Whether the model of the key wrote the answer: who computed it had perhaps another one answer."""
    document = answer.json()
    return isinstance(document, dict) and document.get("model") == model.name


def _lost() -> str:
    message = "the process that computed this text died; send the request again"
    return json.dumps({"reason": FailureReason.WORKER_LOST, "message": message})
