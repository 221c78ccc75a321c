"""Token streams as they are written to Redis."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import pytest
import redis

from app.inference import token_stream
from app.inference.requests import TextPiece
from workers.token_writer import TokenWriter


@pytest.fixture
def writer(redis_url: str, valkey: redis.Redis) -> Iterator[TokenWriter]:
    made = TokenWriter(redis_url)
    yield made
    made.close()


def test_entries_keep_their_order_and_have_consecutive_ids(writer: TokenWriter, valkey: redis.Redis) -> None:
    run_id = uuid4()
    stream = writer.open(run_id, "answer", 1)
    stream.begun("pool")
    for number in range(500):
        stream.piece(TextPiece(f"{number} "))
    stream.done({"x": 1})
    writer.close()

    entries = valkey.xrange(token_stream.key(str(run_id), "answer"))

    assert [id_ for id_, _ in entries] == [f"1-{n}" for n in range(1, len(entries) + 1)]
    assert "".join(fields.get("text", "") for _, fields in entries) == "".join(f"{n} " for n in range(500))
    assert entries[-1][1] == {"done": '{"x":1}'}
    assert 0 < valkey.ttl(stream.key) <= token_stream.KEPT_SECONDS


def test_a_stale_attempt_writes_nothing_more(writer: TokenWriter, valkey: redis.Redis) -> None:
    run_id = uuid4()
    stale, current = (writer.open(run_id, "answer", attempt) for attempt in (1, 2))
    stale.piece(TextPiece("old"))
    current.piece(TextPiece("new"))
    stale.piece(TextPiece("late"))
    stale.piece(TextPiece("later"))
    writer.close()

    entries = [fields["text"] for _, fields in valkey.xrange(current.key)]

    assert entries == ["old", "new"]
    assert stale.given_up
    assert not current.given_up


def test_a_key_of_another_type_costs_only_its_own_stream(writer: TokenWriter, valkey: redis.Redis) -> None:
    broken, whole = (writer.open(uuid4(), "answer", 1) for _ in range(2))
    valkey.set(broken.key, "x")
    broken.piece(TextPiece("lost"))
    whole.piece(TextPiece("kept"))
    writer.close()

    assert [fields for _, fields in valkey.xrange(whole.key)] == [{"text": "kept"}]


def test_an_entry_of_a_later_version_is_skipped() -> None:
    assert token_stream.read_entry(b"1-1", {b"novelty": b"x"}) is None
