"""
A limit on the rate at which a worker takes steps, which an operator sets in Flower.

Messages beyond it stay in their queue: in their order, visible, and for any other worker. Celery's own limit takes them
all into the memory of one worker, where they wait unseen.
"""

from __future__ import annotations

import time
from collections.abc import Callable

#: Most steps that may be taken at once after a pause, in seconds of the rate; at least one step.
_BURST = 1.0


class StepRate:
    """The limit of one process. Without one, everything is taken at once."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._limit, self._left, self._at = 0.0, 0.0, 0.0

    @property
    def per_second(self) -> float:
        """Steps per second; 0 without a limit."""
        return self._limit

    def set(self, per_second: float) -> None:
        """Limit the rate; 0 removes the limit."""
        self._limit, self._left, self._at = per_second, min(1.0, self._most(per_second)), self._now()

    def allows(self) -> bool:
        """Whether a step may be taken now."""
        if not self._limit:
            return True
        now = self._now()
        self._left = min(self._most(self._limit), self._left + (now - self._at) * self._limit)
        self._at = now
        return self._left >= 1

    def take(self) -> None:
        """Count a step that was taken."""
        if self._limit:
            self._left -= 1

    @staticmethod
    def _most(per_second: float) -> float:
        return max(1.0, per_second * _BURST)


#: That of this process.
RATE = StepRate()
