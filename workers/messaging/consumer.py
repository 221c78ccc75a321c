"""
The consumer of a worker: Celery's own, which goes on whenever the broker comes back.

When a broker is lost, Celery 5.7 closes the connection twice. Where the first time fails half-way, the second one tries
to put back messages that are not acknowledged, through a transport that has let go of its connection already: an
AttributeError that ends the whole worker.
"""

from __future__ import annotations

from typing import Any

from celery.worker import consumer


class Consumer(consumer.Consumer):
    """Celery's consumer, which puts nothing back on a connection that is lost: the sweep finds those steps."""

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """Close what is lost."""
        connection: Any = self.connection
        if (channel := connection._default_channel) is not None:  # the public property would connect anew
            channel.do_restore = False
        super().on_connection_error_after_connected(exc)
