"""
The wake: a message that something may be to be planned, for whoever reconciles.

It is a hint: beat sends the same each tick, and one that is lost costs that long.
Who sends steps to a model's queue nudges too, at the most every so often: a model that nobody serves is then started
at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

from app.kernel.broker import CONTROL_QUEUE, PRIORITIES, Publisher, is_model_queue
from app.scheduler.tasks import RECONCILE

#: Seconds between two nudges of one process, at the least.
_PAUSE = 0.2
#: Seconds after which nobody needs it any more: beat has sent its own meanwhile.
_EXPIRES = 10.0


def wake_reconciler(publisher: Publisher) -> bool:
    """Ask for a turn of the reconciler; False when the broker cannot be reached."""
    return publisher.publish(
        RECONCILE, (), queue=CONTROL_QUEUE, priority=PRIORITIES["interactive"], description="wake-up", expires=_EXPIRES
    )


class WakingPublisher:
    """Sends messages, and nudges when one goes to a model's queue."""

    def __init__(self, publisher: Publisher) -> None:
        """Sends through another publisher."""
        self._publisher = publisher
        self._lock = threading.Lock()
        self._last = float("-inf")

    def publish(
        self,
        task: str,
        args: Sequence[Any],
        *,
        queue: str,
        priority: int = PRIORITIES["standard"],
        description: str = "",
        expires: float | None = None,
    ) -> bool:
        """As every publisher does."""
        sent = self._publisher.publish(
            task, args, queue=queue, priority=priority, description=description, expires=expires
        )
        if is_model_queue(queue) and self._is_due():
            wake_reconciler(self._publisher)
        return sent

    def depth(self, queue: str) -> int:
        """Messages that wait in the queue. Raises BrokerUnreachable."""
        return self._publisher.depth(queue)

    def _is_due(self) -> bool:
        now = time.monotonic()
        with self._lock:
            due = now - self._last >= _PAUSE
            if due:
                self._last = now
        return due
