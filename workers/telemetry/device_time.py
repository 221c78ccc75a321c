"""
The busy time of a pool's devices, divided among the requests that it works on at the same time.

At each instant the requests in flight share the devices equally: of two, each gets half a second of a second. The
shares of all requests add up to the time in which there was one at least, to the nanosecond; idle time is nobody's.
A request is in flight from when the pool has taken it to its end, whether it succeeds, fails or is cancelled.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class SharedDeviceTime:
    """Divides the time. Threads may begin and end requests at any time; each takes a microsecond."""

    def __init__(self, now: Callable[[], int] = time.monotonic_ns) -> None:
        """`now` is a clock in nanoseconds that never goes back."""
        self._now = now
        self._lock = threading.Lock()
        self._in_flight, self._at = 0, 0
        #: What a request would have got that was in flight all the time, and what of it could not be divided yet.
        self._each, self._rest = 0, 0

    def begin(self) -> int:
        """A request begins. Returns a mark for its end."""
        with self._lock:
            self._advance()
            self._in_flight += 1
            return self._each

    def end(self, mark: int) -> int:
        """The request of a mark ends, once. Returns its share in whole microseconds."""
        with self._lock:
            self._advance()
            self._in_flight -= 1
            return (self._each - mark) // 1000

    def _advance(self) -> None:
        now = self._now()
        if self._in_flight:
            each, self._rest = divmod(now - self._at + self._rest, self._in_flight)
            self._each += each
        else:
            self._rest = 0
        self._at = now
