"""The thread pool of a worker: the end of a task wakes the event loop, and its errors are logged."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from kombu.asynchronous import Hub, get_event_loop, set_event_loop

from workers.messaging.thread_pool import TaskPool

SOON = 30.0


@pytest.fixture
def pool() -> Iterator[TaskPool]:
    before = get_event_loop()
    hub = Hub()
    set_event_loop(hub)
    made = TaskPool(1)
    made.start()
    yield made
    made.stop()
    hub.close()
    set_event_loop(before)


def test_a_crash_of_a_task_is_logged_and_the_thread_continues(pool: TaskPool) -> None:
    done = threading.Event()

    def broken(*_: Any) -> None:
        raise RuntimeError("Celery's own")

    with structlog.testing.capture_logs() as lines:
        pool.on_apply(broken, ()).wait(SOON)
        pool.on_apply(done.set, (), callback=lambda _: None).wait(SOON)
    assert done.is_set()
    (line,) = lines
    assert (line["event"], str(line["exc_info"])) == ("task_crashed", "Celery's own")
