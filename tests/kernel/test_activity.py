"""Activity in a real broker: what is noted there, and what counts as quiet."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from app.kernel import embedded
from app.kernel.activity import Activity


def until(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    assert any(condition() or pause.wait(0.05) for _ in range(1200))


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url, protocol=2) as made:
        made.flushdb()
        yield made


@pytest.fixture
def activity(redis_url: str) -> Iterator[Activity]:
    made = Activity(redis_url)
    yield made
    made.close()


def test_an_installation_is_quiet_when_its_last_note_has_expired(client: redis.Redis, activity: Activity) -> None:
    assert not activity.is_quiet(), "a new broker, or one that lost its data, says nothing"
    activity.note()
    until(lambda: client.pttl("arriero:activity") > 0)
    assert not activity.is_quiet()
    until(activity.is_quiet)


def test_notes_of_a_process_are_bounded(client: redis.Redis, activity: Activity) -> None:
    """A thousand steps a second cost the broker one note a second."""
    client.config_resetstat()
    for _ in range(1000):
        activity.note()
    until(lambda: client.exists("arriero:activity") == 1)
    assert client.info("commandstats")["cmdstat_set"]["calls"] <= 4


def test_a_note_waits_for_a_broker_that_is_unavailable(tmp_path: Path) -> None:
    """What was submitted meanwhile has no message, and the sweep that sends it must follow soon."""
    server = embedded.start_valkey(tmp_path / "valkey")
    url = server.url
    server.stop()
    activity = Activity(url)
    try:
        activity.note()
        assert not activity.is_quiet(), "nothing is known"
        server.start()
        with redis.Redis.from_url(url, protocol=2) as client:
            until(lambda: client.exists("arriero:activity") == 1)
    finally:
        activity.close()
        server.stop()
