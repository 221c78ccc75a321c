"""
Client connections: uvicorn's protocol with a limit on the time for receiving a request.

The headers of a request, and then its body, may take `GRACE` seconds, plus one second per `RATE` received bytes.
A slower connection is closed; otherwise its client could keep the socket open without a limit. Time in which the server
itself does not read is not counted.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

#: Seconds for the headers of a request, and again for its body.
GRACE = 20.0
#: Received bytes that extend this time by one second.
RATE = 500
#: Seconds between two checks of a connection.
INTERVAL = 5.0
#: States in which the client still has to send headers or a body.
_INCOMPLETE = (h11.IDLE, h11.SEND_BODY)


class TimedProtocol(H11Protocol):
    """The HTTP/1.1 protocol of one connection, which is closed when a request arrives too slowly."""

    _since: float
    _received: int
    _check: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in uvicorn
        """Start measuring the time."""
        super().connection_made(transport)
        self._restart()
        self._check = self.loop.call_later(INTERVAL, self._close_if_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop measuring the time."""
        self._check.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count the received bytes; the time starts again at the body and at the next request."""
        before: Any = self.conn.their_state, self.cycle
        self._received += len(data)
        super().data_received(data)
        if before != (self.conn.their_state, self.cycle):
            self._restart()

    def on_response_complete(self) -> None:
        """Start the time of the next request."""
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
