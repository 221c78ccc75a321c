"""
Client connections: uvicorn's protocol with bounds on what a client can hold, and for how long.

The headers of a request, and then its body, may take `GRACE` seconds, plus one second per `RATE` received bytes, and at
most `GRACE` seconds without any byte. A client that does not read its answer is disconnected after the write timeout:
by then at most `SEND_BUFFER` bytes in the kernel and uvicorn's 64 KiB wait for it, and what produces the answer waits.
A slower connection is closed; otherwise its client could keep the socket, and a call, without a limit. Time in which
the server itself does not read is not counted. Connections over the limit of the process are closed unread.
"""

from __future__ import annotations

import asyncio
import socket
from datetime import timedelta
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from app.kernel import log

_log = log.get(__name__)

#: Seconds for the headers of a request, and again for its body; and most seconds without a byte of them.
GRACE = 20.0
#: Received bytes that extend this time by one second.
RATE = 500
#: Seconds between two checks of a connection.
INTERVAL = 5.0
#: Most bytes of the line and the headers of a request.
MAX_HEAD = 32 * 1024
#: Bytes of an answer that the kernel keeps for a client that does not read.
SEND_BUFFER = 256 * 1024
#: States in which the client still has to send headers or a body.
_INCOMPLETE = (h11.IDLE, h11.SEND_BODY)


class TimedProtocol(H11Protocol):
    """The HTTP/1.1 protocol of one connection, which is closed when its client is too slow."""

    #: Most connections of the process; 0 means no limit.
    max_connections = 0
    #: Seconds after which a client that does not read is disconnected.
    write_timeout = 30.0

    _since: float
    _last: float
    _received: int
    _unread_since: float | None = None
    _check: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in uvicorn
        """Start measuring the time."""
        super().connection_made(transport)
        self._restart()
        if self.max_connections and len(self.connections) > self.max_connections:
            _log.warning("connection_refused", connections=self.max_connections)
            transport.abort()
            return
        kept: socket.socket | None = transport.get_extra_info("socket")
        if kept is not None:
            kept.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER // 2)  # the kernel doubles it
        self._check = self.loop.call_later(INTERVAL, self._close_if_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop measuring the time."""
        if self._check is not None:
            self._check.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count the received bytes; the time starts again at the body and at the next request."""
        before: Any = self.conn.their_state, self.cycle
        self._received += len(data)
        self._last = self.loop.time()
        super().data_received(data)
        if before != (self.conn.their_state, self.cycle):
            self._restart()

    def on_response_complete(self) -> None:
        """Start the time of the next request."""
        super().on_response_complete()
        self._restart()

    def _restart(self) -> None:
        self._since = self._last = self.loop.time()
        self._received = 0

    def _close_if_slow(self) -> None:
        now = self.loop.time()
        if self._does_not_read(now):
            _log.info("connection_closed", reason="the client does not read", client=self.client)
            self.transport.abort()
            return
        if self.flow.read_paused:
            self._restart()
        elif self._does_not_send(now):
            self.transport.abort() if self.transport.get_write_buffer_size() else self.transport.close()
            return
        self._check = self.loop.call_later(INTERVAL, self._close_if_slow)

    def _does_not_send(self, now: float) -> bool:
        """Whether the client owes headers or a body, and is too slow. Between two requests uvicorn's timeout holds."""
        if self.conn.their_state not in _INCOMPLETE or (self.cycle is not None and self._is_between_requests()):
            return False
        return now > self._since + GRACE + self._received / RATE or now > self._last + GRACE

    def _is_between_requests(self) -> bool:
        return self.conn.their_state is h11.IDLE and self._received == 0

    def _does_not_read(self, now: float) -> bool:
        """Whether the client has left room for nothing, or has not taken the rest of its answer, for too long."""
        is_over = self.transport.is_closing() or (self.cycle is not None and self.cycle.response_complete)
        unread = self.flow.write_paused or (is_over and self.transport.get_write_buffer_size() > 0)
        if not unread:
            self._unread_since = None
            return False
        if self._unread_since is None:
            self._unread_since = now
        return now >= self._unread_since + self.write_timeout


def bounded(max_connections: int, write_timeout: timedelta) -> type[TimedProtocol]:
    """Return the protocol with the bounds of the settings."""
    seconds = write_timeout.total_seconds()
    return type("BoundedProtocol", (TimedProtocol,), {"max_connections": max_connections, "write_timeout": seconds})
