"""A pace: at most so many bytes in a second, for all threads that share it."""

from __future__ import annotations

import threading
import time


class Pace:
    """Lets bytes pass at a rate, and at once without one."""

    def __init__(self, rate: int | None, stopped: threading.Event) -> None:
        """`rate` is in bytes per second. Nobody waits once `stopped` is set."""
        self._rate, self._stopped = rate, stopped
        self._lock = threading.Lock()
        #: When all bytes so far will have passed, by the monotonic clock.
        self._free_at = 0.0

    def spend(self, count: int) -> None:
        """Wait until this many bytes more may pass."""
        if self._rate is None:
            return
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now) + count / self._rate
            pause = self._free_at - now
        self._stopped.wait(pause)
