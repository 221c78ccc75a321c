"""
The wake-up: a message that triggers a reconcile pass.

It is a hint: beat sends the same message each tick, so that a lost one costs one tick.
A process that sends steps to the queue of a model sends a wake-up too, so that the model is started at once. It sends
at most one in each pause.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

from app.kernel.broker import CONTROL_QUEUE, PRIORITIES, Publisher, is_model_queue
from app.scheduler.tasks import RECONCILE

#: Least seconds between two wake-ups of one process.
_PAUSE = 0.2
#: Seconds after which a message is obsolete: beat has sent its own since.
_EXPIRES = 10.0


def wake_reconciler(publisher: Publisher) -> bool:
    """Trigger a reconcile pass; returns False when the broker cannot be reached."""
    return publisher.publish(
        RECONCILE, (), queue=CONTROL_QUEUE, priority=PRIORITIES["interactive"], description="wake-up", expires=_EXPIRES
    )


class WakingPublisher:
    """Publishes messages, and a wake-up when one goes to the queue of a model."""

    def __init__(self, publisher: Publisher) -> None:
        """Publishes through another publisher."""
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
        """Publish a message; returns False when the broker cannot be reached."""
        sent = self._publisher.publish(
            task, args, queue=queue, priority=priority, description=description, expires=expires
        )
        if is_model_queue(queue) and self._is_due():
            wake_reconciler(self._publisher)
        return sent

    def depth(self, queue: str) -> int:
        """The number of messages in the queue. Raises BrokerUnreachable."""
        return self._publisher.depth(queue)

    def _is_due(self) -> bool:
        now = time.monotonic()
        with self._lock:
            due = now - self._last >= _PAUSE
            if due:
                self._last = now
        return due
