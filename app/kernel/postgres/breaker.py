"""
Circuit breaker: after a server has timed out, further calls to it are refused at once, except for probes.

While the breaker is open, one caller per `probe_interval` is admitted as a probe. Its outcome closes the breaker or
keeps it open. Without a breaker, every caller would wait for its own timeout, on a thread that others need.
A timeout does not open the breaker when the server answered other callers meanwhile: it is slow, not silent.
"""

from __future__ import annotations

import threading
import time
from datetime import timedelta


class Breaker:
    """The circuit breaker of one server, in one process."""

    def __init__(self, probe_interval: timedelta) -> None:
        """While the breaker is open, one probe is admitted per `probe_interval`."""
        self._probe_interval = probe_interval.total_seconds()
        self._lock = threading.Lock()
        self._open = False
        self._next_probe = 0.0
        self._last_answer = float("-inf")

    def admits(self) -> bool:
        """Whether the server may be called now. An admitted caller reports the outcome: `answered` or `timed_out`."""
        if not self._open:
            return True
        with self._lock:
            now = time.monotonic()
            if self._open and now < self._next_probe:
                return False
            self._next_probe = now + self._probe_interval
            return True

    def answered(self) -> None:
        """Close the breaker: the server answered, possibly with an error."""
        self._last_answer = time.monotonic()
        self._open = False

    def timed_out(self, waited: float) -> None:
        """
        Open the breaker: the server did not answer a caller within `waited` seconds.

        The breaker stays closed when the server answered another caller in the second half of that time.
        """
        with self._lock:
            now = time.monotonic()
            if self._last_answer < now - waited / 2:
                self._open = True
                self._next_probe = now + self._probe_interval
