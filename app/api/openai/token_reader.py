"""
The reader of token streams: one connection to Redis follows the streams of all requests of this process.

A reader that joins reads what is there already, and then what comes. While Redis is away nothing is lost: the reader
goes on after the last entry that it got.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import redis
from redis.asyncio import Redis

from app.inference import token_stream
from app.inference.token_stream import StreamEntry
from app.kernel import ids, log

_log = log.get(__name__)

#: Milliseconds of one wait for entries; seconds before another try while Redis is away.
_BLOCK, _PAUSE = 30_000, 0.5
#: Entries that are read of a stream at once.
_COUNT = 1_000
#: Seconds after which the stream that wakes the reader expires.
_WAKE_EXPIRES = 120


@dataclass(slots=True, eq=False)
class Subscription:
    """What one request receives of a stream."""

    key: str
    #: The id of the last received entry.
    last: str
    entries: asyncio.Queue[StreamEntry] = field(default_factory=asyncio.Queue)

    async def next(self, seconds: float) -> StreamEntry | None:
        """The next entry; None when none comes within `seconds`."""
        try:
            return self.entries.get_nowait()
        except asyncio.QueueEmpty:
            pass
        try:
            async with asyncio.timeout(seconds):
                return await self.entries.get()
        except TimeoutError:
            return None


class TokenReader:
    """Follows token streams."""

    def __init__(self, client: Redis) -> None:
        self._redis = client
        #: A stream whose entries only interrupt the wait, so that a new stream is followed at once.
        self._wake_key = f"arriero:tokens-wake:{ids.new_secret()[:16]}"
        self._woken = "$"
        self._subscriptions: dict[str, set[Subscription]] = {}
        #: By followed key, the id of the last entry that was read.
        self._positions: dict[str, str] = {}
        self._waiting = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start reading, on the running event loop."""
        self._task = asyncio.create_task(self._read_all(), name="token-reader")

    async def close(self) -> None:
        """Stop reading."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    @asynccontextmanager
    async def follow_new(self, key: str, command: tuple[str, ...] = ()) -> AsyncIterator[Subscription]:
        """
        Follow a stream that has no entry yet. `command` is sent to Redis with the wake-up of the reader, in one
        round trip.

        Raises redis.RedisError.
        """
        subscription = Subscription(key, token_stream.START)
        self._add(subscription)
        try:
            async with self._redis.pipeline(transaction=False) as pipeline:
                if command:
                    pipeline.execute_command(*command)
                self._wake(pipeline)
                # A list of another type takes no request; then no pool takes it, and it becomes a run.
                for answer in await pipeline.execute(raise_on_error=False):
                    if isinstance(answer, redis.RedisError) and not isinstance(answer, redis.ResponseError):
                        raise answer
            yield subscription
        finally:
            self._remove(subscription)

    @asynccontextmanager
    async def follow(self, key: str, after: str) -> AsyncIterator[Subscription]:
        """Follow a stream from the entry after the id `after`. Raises redis.RedisError."""
        subscription = Subscription(key, after)
        while True:
            await self._catch_up(subscription)
            if not _before(subscription.last, self._positions.get(key, token_stream.START)):
                break
        self._add(subscription)
        try:
            async with self._redis.pipeline(transaction=False) as pipeline:
                self._wake(pipeline)
                await pipeline.execute()
            yield subscription
        finally:
            self._remove(subscription)

    async def _catch_up(self, subscription: Subscription) -> None:
        found: Any = await self._redis.xrange(subscription.key, f"({subscription.last}", "+")
        for id_, fields in found:
            _deliver(subscription, id_, fields)

    def _wake(self, pipeline: Redis) -> None:
        pipeline.xadd(self._wake_key, {"w": ""}, maxlen=1, approximate=False)
        pipeline.expire(self._wake_key, _WAKE_EXPIRES)

    def _add(self, subscription: Subscription) -> None:
        self._subscriptions.setdefault(subscription.key, set()).add(subscription)
        self._positions.setdefault(subscription.key, subscription.last)
        self._waiting.set()

    def _remove(self, subscription: Subscription) -> None:
        others = self._subscriptions.get(subscription.key, set())
        others.discard(subscription)
        if not others:
            self._subscriptions.pop(subscription.key, None)
            self._positions.pop(subscription.key, None)
        if not self._subscriptions:
            self._waiting.clear()

    async def _read_all(self) -> None:
        self._woken = token_stream.START
        while True:
            try:
                await self._waiting.wait()
                await self._read()
            except (redis.RedisError, OSError) as error:
                _log.warning("tokens_not_read", error=str(error))
                await asyncio.sleep(_PAUSE)
                if isinstance(error, redis.ResponseError):
                    await self._drop_wrong_types()
            except Exception:  # noqa: BLE001 the outermost loop of the task: all streams depend on it
                _log.exception("token_reader_interrupted")
                await asyncio.sleep(_PAUSE)

    async def _drop_wrong_types(self) -> None:
        """Follow no key that is no stream: it would stop the others. Its readers find the outcome in the database."""
        try:
            for key in list(self._positions):
                if await self._redis.type(key) not in (b"stream", b"none"):
                    _log.warning("token_stream_has_a_wrong_type", key=key)
                    self._positions.pop(key, None)
        except (redis.RedisError, OSError):
            return  # the next read fails again

    async def _read(self) -> None:
        positions: dict[Any, Any] = {self._wake_key: self._woken, **self._positions}
        found: Any = await self._redis.xread(positions, count=_COUNT, block=_BLOCK)
        for name, entries in found or ():
            key = name.decode()
            if key == self._wake_key:
                self._woken = entries[-1][0].decode()
                continue
            subscriptions = self._subscriptions.get(key, set())
            for id_, fields in entries:
                for subscription in subscriptions:
                    _deliver(subscription, id_, fields)
            if key in self._positions:
                self._positions[key] = entries[-1][0].decode()


def _deliver(subscription: Subscription, id_: bytes, fields: dict[bytes, bytes]) -> None:
    entry_id = id_.decode()
    if not _before(subscription.last, entry_id):
        return
    subscription.last = entry_id
    entry = token_stream.read_entry(id_, fields)
    if entry is not None:
        subscription.entries.put_nowait(entry)


def _before(first: str, second: str) -> bool:
    """Whether an id comes before another one."""
    return _numbers(first) < _numbers(second)


def _numbers(id_: str) -> tuple[int, int]:
    attempt, _, count = id_.partition("-")
    return int(attempt), int(count or 0)
