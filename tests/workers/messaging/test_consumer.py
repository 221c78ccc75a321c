"""The consumer of a worker, when the broker dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kombu import Consumer as Messages
from kombu import Queue

from app.kernel import broker
from app.kernel.embedded import ValkeyServer
from app.kernel.sections.servers import BrokerSettings
from workers.application import CONSUMER, THREAD_POOL


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ValkeyServer]:
    made = ValkeyServer(tmp_path / "valkey")
    made.start()
    yield made
    made.stop()


def test_a_broker_that_dies_with_an_unacknowledged_message_does_not_end_the_worker(server: ValkeyServer) -> None:
    """One message is unacknowledged, and two channels wait for more."""
    app = broker.celery_app(server.url, BrokerSettings())
    consumer = app.WorkController(
        hostname="worker@here", pool_cls=THREAD_POOL, consumer_cls=CONSUMER, concurrency=1
    ).consumer
    connection = consumer.connection = app.connection_for_read()
    queue, taken = Queue("late"), list[object]()
    with connection.Producer() as producer:
        producer.publish({}, routing_key="late", declare=[queue])

    def consume(channel: Any) -> None:
        channel.brpop_timeout = 60  # the call is still blocked when the broker dies
        Messages(channel, [queue], callbacks=[lambda *message: taken.append(message)]).consume()

    consume(connection.default_channel)
    connection.drain_events(timeout=30)
    assert len(taken) == 1
    consume(connection.channel())
    with pytest.raises(TimeoutError):
        connection.drain_events(timeout=0.1)
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    server.stop()

    with pytest.warns(PendingDeprecationWarning):
        consumer.on_connection_error_after_connected(ConnectionError("lost"))

    assert consumer.connection is None
