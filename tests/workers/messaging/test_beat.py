"""Beat on a real broker: it ticks less often while nothing happens, and keeps its lock meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from celery import Celery

from app.kernel import broker
from app.kernel.sections.servers import BrokerSettings
from workers.messaging import beat
from workers.messaging.beat import Scheduler

QUEUE = "control"
#: Of the only job, in seconds.
INTERVAL = 0.05


def until(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    assert any(condition() or pause.wait(0.02) for _ in range(3000))


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url, protocol=2) as made:
        made.flushdb()
        yield made
        made.flushdb()


@pytest.fixture
def celery(redis_url: str, client: redis.Redis) -> Iterator[Celery]:
    entry: dict[str, Any] = {"task": "t", "schedule": timedelta(seconds=INTERVAL), "options": {"queue": QUEUE}}
    made = broker.celery_app(redis_url, BrokerSettings(), {"job": entry})
    yield made
    made.close()


def messages(client: redis.Redis) -> int:
    return sum(client.llen(key) for key in client.scan_iter(f"{QUEUE}*"))  # type: ignore[misc] # it is synchronous


def test_beat_pauses_while_nothing_happens(
    client: redis.Redis, celery: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beat, "_QUIET", 1_000_000)
    scheduler = Scheduler(celery, lazy=True)
    scheduler.tick()
    pause = threading.Event()

    def sends() -> bool:
        before = messages(client)
        for _ in range(4):
            pause.wait(scheduler.tick())
        return messages(client) > before

    assert sends(), "it is not known that nothing happens"
    client.set("arriero:activity:known", 1)
    assert not sends()
    client.set("arriero:activity", 1)
    assert sends()
    client.delete("arriero:activity")
    assert not sends()
    scheduler.close()


def test_beat_keeps_its_lock_during_a_pause(
    client: redis.Redis, celery: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beat, "_QUIET", 1_000_000)
    monkeypatch.setattr(beat, "_EXTEND", 0.0)
    scheduler = Scheduler(celery, lazy=True)
    scheduler.tick()
    client.set("arriero:activity:known", 1)
    client.pexpire("redbeat::lock", 1000)
    scheduler.tick()
    assert client.pttl("redbeat::lock") > 1000
    client.delete("redbeat::lock")
    scheduler.tick()
    assert scheduler.lock is None, "another beat may have taken it"
    scheduler.close()


def test_a_pause_ends_by_itself(client: redis.Redis, celery: Celery) -> None:
    """Hints may be lost: the jobs are triggered now and then, whatever was noted."""
    client.set("arriero:activity:known", 1)
    with beat.running(celery):
        until(lambda: messages(client) > 2)
    assert client.exists("redbeat::lock") == 0, "the next beat need not wait"


def test_a_change_of_an_operator_holds_at_the_next_tick(client: redis.Redis, celery: Celery) -> None:
    entry = dict(celery.conf.beat_schedule["job"])
    changes = SimpleNamespace(version=0, schedule=lambda: {"other": entry | {"schedule": timedelta(hours=1)}})
    beat.follow(celery, changes)
    scheduler = Scheduler(celery, lazy=True)
    client.set("arriero:activity:known", 1)
    scheduler.tick()
    assert client.zscore("redbeat::schedule", "redbeat:job") is not None
    changes.version = 1
    scheduler.tick()
    assert client.zscore("redbeat::schedule", "redbeat:other") is not None, "while nothing happens too"
    assert client.zscore("redbeat::schedule", "redbeat:job") is None
    scheduler.close()


def unreachable(_: Celery) -> redis.Redis:
    raise redis.ConnectionError("the broker is away")


def test_a_clock_that_goes_back_stops_no_job(
    client: redis.Redis, celery: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock was two hours ahead and is set right: the jobs are sent at once, and not in two hours."""
    client.set("arriero:activity", 1)
    right, ahead = celery.now, timedelta(hours=2)
    now = beat.clock.now

    def step(offset: timedelta) -> None:
        monkeypatch.setattr(celery, "now", lambda: right() + offset)
        monkeypatch.setattr(beat.clock, "now", lambda: now() + offset)

    def sent(scheduler: Scheduler) -> int:
        before = messages(client)
        for _ in range(6):
            threading.Event().wait(INTERVAL)
            scheduler.tick()
        return messages(client) - before

    scheduler = Scheduler(celery, lazy=True)
    assert sent(scheduler) > 0
    step(ahead)
    assert sent(scheduler) > 0
    step(timedelta(0))
    with monkeypatch.context() as away:
        away.setattr(beat, "get_redis", unreachable)
        scheduler.tick()
    assert sent(scheduler) > 0, "also when the broker was away just then"
    scheduler.close()


def test_a_beat_does_not_wait_for_entries_of_a_clock_that_was_ahead(
    client: redis.Redis, celery: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another beat, on a host whose clock was wrong, has written the schedule."""
    client.set("arriero:activity", 1)
    right, now = celery.now, beat.clock.now
    with monkeypatch.context() as wrong:
        wrong.setattr(celery, "now", lambda: right() + timedelta(hours=2))
        wrong.setattr(beat.clock, "now", lambda: now() + timedelta(hours=2))
        other = Scheduler(celery, lazy=True)
        other.tick()
        other.close()
    before = messages(client)
    scheduler = Scheduler(celery, lazy=True)
    scheduler.tick()
    assert messages(client) > before
    scheduler.close()
