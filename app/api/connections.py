"""
Connections of clients: uvicorn's protocol with a limit on the time in which a request arrives.

The headers of a request, and then its body, may take `GRACE` seconds and one more for each `RATE` bytes that have come.
A slower connection is closed: it would hold a socket for as long as its client likes. Time in which the server itself
reads nothing does not count.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

#: Seconds for the headers of a request, and for its body.
GRACE = 20.0
#: Bytes a second that add to that time.
RATE = 500
#: Seconds between two looks at a connection.
INTERVAL = 5.0
#: What the client still has to send in these states: headers, a body.
_INCOMPLETE = (h11.IDLE, h11.SEND_BODY)


class TimedProtocol(H11Protocol):
    """HTTP/1.1 on one connection, closed when a request arrives too slowly."""

    _since: float
    _received: int
    _check: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in uvicorn
        """Begin to measure."""
        super().connection_made(transport)
        self._restart()
        self._check = self.loop.call_later(INTERVAL, self._close_if_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop measuring."""
        self._check.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count what came; the time begins again with the body, and with the next request."""
        before: Any = self.conn.their_state, self.cycle
        self._received += len(data)
        super().data_received(data)
        if before != (self.conn.their_state, self.cycle):
            self._restart()

    def on_response_complete(self) -> None:
        """Begin to measure the next request."""
        super().on_response_complete()
        self._restart()

    def _restart(self) -> None:
        self._since, self._received = self.loop.time(), 0

    def _close_if_slow(self) -> None:
        now = self.loop.time()
        if self.flow.read_paused:
            self._restart()
        elif self.conn.their_state in _INCOMPLETE and now > self._since + GRACE + self._received / RATE:
            self.transport.close()
            return
        self._check = self.loop.call_later(INTERVAL, self._close_if_slow)
