"""
Flights: computations of answers of this process, each for all calls here that ask for the same.

A computation goes on while anybody waits for it, here or in another process. A call that leaves stops no other one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from typing import Any

import redis

from app.api.openai.road import Waiting
from app.inference.cache.key import CacheKey
from app.inference.token_stream import EntryKind, StreamEntry
from app.kernel import log
from app.kernel.errors import ArrieroError, BrokerUnreachable

_log = log.get(__name__)

#: What comes of a computation; an error ends it.
_Item = StreamEntry | Waiting | ArrieroError | None


class Flight:
    """One computation, and the calls of this process that wait for it."""

    def __init__(
        self,
        key: CacheKey,
        run_id: str,
        source: AsyncGenerator[StreamEntry | Waiting],
        on_end: Callable[[Flight], Coroutine[Any, Any, None]],
        on_left: Callable[[Flight], Coroutine[Any, Any, None]],
    ) -> None:
        """
        Starts the computation. `on_end` is called with its entries; `on_left` when the last call here has left.

        `source` is closed when the computation is stopped.
        """
        self.key, self.run_id, self.entries = key, run_id, list[StreamEntry]()
        self._source, self._on_end, self._on_left = source, on_end, on_left
        self._calls: set[asyncio.Queue[_Item]] = set()
        self._last: _Item = None
        self.has_ended = False
        self.task = asyncio.create_task(self._compute(), name="cached-computation")

    @property
    def is_awaited(self) -> bool:
        """Whether a call here waits for it."""
        return bool(self._calls)

    @asynccontextmanager
    async def _joined(self) -> AsyncGenerator[asyncio.Queue[_Item]]:
        items: asyncio.Queue[_Item] = asyncio.Queue()
        for entry in self.entries:
            items.put_nowait(entry)
        if self.has_ended:
            items.put_nowait(self._last)
        self._calls.add(items)
        try:
            yield items
        finally:
            self._calls.discard(items)
            if not self._calls and not self.has_ended:
                await asyncio.shield(self._on_left(self))

    async def follow(self) -> AsyncGenerator[StreamEntry | Waiting]:
        """All entries from the first one on. Raises what the computation raised."""
        async with self._joined() as items:
            while (item := await items.get()) is not None:
                if isinstance(item, ArrieroError):
                    raise item
                yield item

    async def _compute(self) -> None:
        try:
            async with aclosing(self._source) as source:
                async for entry in source:
                    if isinstance(entry, StreamEntry):
                        self.entries.append(entry)
                        if entry.kind is EntryKind.DONE:
                            # Kept before anybody has it: who then asks again finds it.
                            await self._end()
                    self._give(entry)
        except ArrieroError as error:
            self._last = error
        except (redis.RedisError, OSError) as error:
            self._last = BrokerUnreachable(f"the broker is unreachable: {error}")
        except Exception as error:  # noqa: BLE001 the outermost loop of the task: its calls must not wait for ever
            _log.exception("cached_computation_failed", run_id=self.run_id)
            self._last = ArrieroError(f"the computation has failed ({type(error).__name__}); the log has the traceback")
        finally:
            await self._end()
            self._give(self._last)

    async def _end(self) -> None:
        if not self.has_ended:
            self.has_ended = True
            await self._on_end(self)

    def _give(self, item: _Item) -> None:
        for items in self._calls:
            items.put_nowait(item)
