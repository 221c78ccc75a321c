"""
The consumer of a worker: Celery's own, made to survive the loss of the broker.

When the broker is lost, Celery 5.7 closes the connection twice. If the first attempt fails half-way, the second one
tries to restore unacknowledged messages through a transport that has no connection any more. The AttributeError that
follows ends the whole worker.
"""

from __future__ import annotations

from typing import Any

from celery.worker import consumer


class Consumer(consumer.Consumer):
    """Celery's consumer, which restores no messages on a lost connection: the sweep publishes their steps again."""

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """Close the lost connection without restoring its messages."""
        connection: Any = self.connection
        if (channel := connection._default_channel) is not None:  # the public property would connect again
            channel.do_restore = False
        super().on_connection_error_after_connected(exc)
