"""
A pool of connections that closes those that are idle.

Each connection is a process of the server, with its own memory. So a process that does nothing has no connection, and
the server of an idle installation has none of these processes.

A thread closes idle connections; it runs only while the pool has some.
"""

from __future__ import annotations

import threading
import time
from typing import Any, cast

from sqlalchemy.pool import ConnectionPoolEntry, QueuePool
from sqlalchemy.util.queue import Queue

#: Seconds after which an idle connection is closed. A new one costs 5 ms of processor time.
IDLE_SECONDS = 1.0

_RETURNED = "returned_at"


class IdlePool(QueuePool):
    """SQLAlchemy's pool with a limit on the time for which a connection is idle. The last one returned is used next."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more | {"use_lifo": True})
        self._idle = cast("Queue[ConnectionPoolEntry]", self._pool)
        #: The thread that closes idle connections, while it runs; changed under the mutex of the queue.
        self._closing: threading.Thread | None = None
        self._disposed = threading.Event()

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        record.info[_RETURNED] = time.monotonic()
        super()._do_return_conn(record)
        with self._idle.mutex:
            if self._closing is not None:
                return
            self._closing = threading.Thread(target=self._close_idle, name="idle-connections", daemon=True)
            self._closing.start()

    def dispose(self) -> None:
        """Close all idle connections, and end the thread."""
        super().dispose()
        self._disposed.set()
        thread = self._closing
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=5)

    def _close_idle(self) -> None:
        while (left := self._close_oldest()) is not None:
            self._disposed.wait(left)

    def _close_oldest(self) -> float | None:
        """Close the oldest connection if it was idle for long. Returns the seconds until the next one, or None."""
        with self._idle.mutex:
            queue = self._idle.queue
            if not queue:
                self._closing = None
                return None
            left = float(queue[0].info.get(_RETURNED, 0.0)) + IDLE_SECONDS - time.monotonic()
            if left > 0 and not self._disposed.is_set():
                return left
            record: ConnectionPoolEntry = queue.popleft()
        try:
            record.close()
        finally:
            self._dec_overflow()
        return 0.0
