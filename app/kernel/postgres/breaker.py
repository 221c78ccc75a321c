"""
A circuit breaker: a server that did not answer in time is left alone for a moment, and its callers are refused at once.

While it is open, one caller each `pause` is let through as a probe; what becomes of it closes the breaker, or keeps it
open. Otherwise every caller would wait until its own timeout, on a thread that others need. For a server that answers
others meanwhile it stays closed: such a server is slow, not silent.
"""

from __future__ import annotations

import threading
import time
from datetime import timedelta


class Breaker:
    """The circuit breaker of one server, in one process."""

    def __init__(self, pause: timedelta) -> None:
        """While it is open, there is one probe each `pause`."""
        self._pause = pause.total_seconds()
        self._lock = threading.Lock()
        self._open = False
        self._next_probe = 0.0
        self._last_answer = float("-inf")

    def admits(self) -> bool:
        """Whether the server may be called now. Who is admitted says what came of it: `answered` or `timed_out`."""
        if not self._open:
            return True
        with self._lock:
            now = time.monotonic()
            if self._open and now < self._next_probe:
                return False
            self._next_probe = now + self._pause
            return True

    def answered(self) -> None:
        """The server answered, be it with an error: close."""
        self._last_answer = time.monotonic()
        self._open = False

    def timed_out(self, waited: float) -> None:
        """
        The server did not answer a caller that waited for so many seconds: open, unless it answered another in their
        second half.
        """
        with self._lock:
            now = time.monotonic()
            if self._last_answer < now - waited / 2:
                self._open = True
                self._next_probe = now + self._pause
