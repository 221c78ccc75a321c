"""
The job that deletes conversations whose retention is over.

A pass is bounded in time and takes one conversation at a time: each is looked at again under its lock, and stays if
something was appended meanwhile. One that cannot be deleted is logged with the reason, and does not stop the others.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from uuid import UUID

import psycopg
import redis

from app.kernel import addresses, broker, log
from app.kernel.errors import BrokerUnreachable, DatabaseUnreachable, Unavailable
from app.memory.conversations import retention
from app.memory.conversations.hot import HotConversations
from app.memory.deletion import Deletion
from workers.runtime import Runtime

_log = log.get(__name__)

#: Most seconds of a pass: a worker that stops waits for it.
_SECONDS = 5.0
#: Conversations that are looked for at a time.
_PART = 100

_RUNNING = threading.Lock()


class _Connection:
    """A connection to Redis for one pass."""

    def __init__(self, url: str) -> None:
        self._client = broker.connect(url)

    @contextmanager
    def connection(self) -> Iterator[redis.Redis]:
        """Yield the connection. Raises BrokerUnreachable."""
        try:
            yield self._client
        except (redis.RedisError, OSError) as error:
            raise BrokerUnreachable(f"the broker is unreachable: {error}") from error

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


def run_conversation_expiry(runtime: Runtime) -> None:
    """Delete conversations whose retention is over."""
    if not _RUNNING.acquire(blocking=False):
        return
    connection = _Connection(addresses.of(runtime.settings).redis_url)
    try:
        settings = runtime.settings.conversations
        hot = HotConversations(runtime.runs.database, connection, settings)
        end = time.monotonic() + _SECONDS
        removed = expire(Deletion(runtime.runs, hot), runtime, settings.retention, lambda: time.monotonic() < end)
        if removed:
            _log.info("conversations_expired", removed=removed)
    except Unavailable as error:
        _log.warning("conversation_expiry_postponed", error=str(error))
    finally:
        connection.close()
        _RUNNING.release()


def expire(deletion: Deletion, runtime: Runtime, default: timedelta | None, in_time: Callable[[], bool]) -> int:
    """Delete while `in_time()` is true; returns how many conversations."""
    removed = 0
    passed: list[UUID] = []
    while in_time():
        with runtime.runs.database.work() as work:
            found = retention.expired(work, default, _PART, passed)
        if not found:
            break
        for one in found:
            if not in_time():
                break
            try:
                if deletion.expire(one.namespace, one.id, one.updated_at):
                    removed += 1
                else:
                    passed.append(one.id)
            except DatabaseUnreachable:
                raise
            except psycopg.Error as error:
                _log.warning("conversation_not_expired", conversation_id=str(one.id), error=str(error))
                passed.append(one.id)
    return removed
