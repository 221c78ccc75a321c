"""Dead letters: the last ones are kept, all are counted, and wrong contents of their keys do no harm."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from app.kernel.broker import CeleryPublisher
from app.kernel.dead_letters import KEPT, DeadLetters, Reason
from app.kernel.errors import BrokerUnreachable

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def letters(valkey: redis.Redis, publisher: CeleryPublisher) -> DeadLetters:
    return publisher.dead_letters()


def test_the_last_are_kept_and_all_are_counted(letters: DeadLetters, valkey: redis.Redis) -> None:
    for number in range(KEPT + 5):
        letters.put(NOW, "io", Reason.UNREADABLE, f"no JSON {number}", b"x" * 100_000)
    letters.put(NOW, "model.x y", Reason.TOO_LARGE, "d" * 9999, b"\xff\x00")

    newest, before = letters.newest(2)
    assert (newest.queue, newest.reason, newest.bytes, newest.message) == ("model.x y", "too_large", 2, "\\xff\x00")
    assert (before.detail, before.bytes, before.at) == (f"no JSON {KEPT + 4}", 100_000, NOW)
    assert letters.kept() == len(letters.newest(KEPT)) == KEPT
    assert letters.counts() == {("io", "unreadable"): KEPT + 5, ("model.x y", "too_large"): 1}
    assert valkey.memory_usage("arriero:dead-letters", samples=0) < 5_000_000
    assert letters.clear() == KEPT
    assert (letters.kept(), letters.counts()[("io", "unreadable")]) == (0, KEPT + 5)


def test_wrong_contents_of_their_own_keys_do_no_harm(letters: DeadLetters, valkey: redis.Redis) -> None:
    valkey.set("arriero:dead-letters", "x")
    valkey.rpush("arriero:dead-letters:counts", "x")
    letters.put(NOW, "io", Reason.UNREADABLE, "no JSON", b"hello")
    assert (letters.kept(), letters.counts()) == (1, {("io", "unreadable"): 1})

    for raw in ("no json", "[]", "7", '{"at": 1}', '{"at": "x", "queue": []}', "[" * 100_000):
        valkey.lpush("arriero:dead-letters", raw)
    valkey.hset("arriero:dead-letters:counts", mapping={"x": "y", "io nothing": "3", "io unreadable": "-1"})
    assert [letter.message for letter in letters.newest(100)] == ["hello"]
    assert letters.counts() == {}
    for name in ("arriero:dead-letters", "arriero:dead-letters:counts"):
        valkey.delete(name)
        valkey.set(name, "x")
    assert (letters.newest(5), letters.kept(), letters.counts(), letters.clear()) == ([], 0, {}, 0)


def test_a_key_of_a_wrong_type_is_renamed_with_its_value(letters: DeadLetters, valkey: redis.Redis) -> None:
    valkey.hset("io", "of", "somebody else")
    letters.put_key(NOW, "io", "hash", "list")
    letters.put_key(NOW, "io", "hash", "list")

    assert valkey.hgetall("arriero:dead-letters:key:io") == {"of": "somebody else"}
    (letter,) = letters.newest(5)
    assert letter.detail == "a hash, not a list; its value is kept as arriero:dead-letters:key:io"
    assert letters.clear() == 1
    assert not valkey.keys("*key:io")


def test_a_queue_of_a_wrong_type_does_not_hide_the_depth_of_others(
    publisher: CeleryPublisher, valkey: redis.Redis
) -> None:
    """The sweep reads depths: an overwritten key must not prevent it from sending messages again."""
    publisher.publish("t", (), queue="io", priority=3)
    valkey.set("io", "x")
    assert publisher.depth("io") == 1


def test_without_a_broker_only_the_record_is_lost() -> None:
    letters = DeadLetters(redis.Redis(port=1, retry=Retry(NoBackoff(), 0)))
    letters.put(NOW, "io", Reason.UNREADABLE, "no JSON", b"hello")
    for call in (letters.kept, letters.counts, letters.clear, lambda: letters.newest(1)):
        with pytest.raises(BrokerUnreachable):
            call()
