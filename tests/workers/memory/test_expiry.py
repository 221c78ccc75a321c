"""Conversations whose retention is over are deleted, and no others."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, cast

import pytest
import redis
from sqlalchemy import text

from app.kernel.broker import CeleryPublisher
from app.kernel.database import Database
from app.kernel.sections.memory import ConversationSettings
from app.memory.conversations import retention
from app.memory.conversations.conversation import NewConversation, StoredConversation
from app.memory.conversations.hot import HotConversations, hot_key
from app.memory.conversations.message import MessageRole, NewMessage
from app.memory.conversations.service import Conversations
from app.memory.deletion import Deletion
from app.workflows.runs.service import Runs
from workers.memory import expiry

SETTINGS = ConversationSettings()
DAY = timedelta(days=1)


@pytest.fixture
def conversations(database: Database) -> Conversations:
    return Conversations(database, SETTINGS)


@pytest.fixture
def hot(database: Database, publisher: CeleryPublisher) -> HotConversations:
    return HotConversations(database, publisher, SETTINGS)


@pytest.fixture
def aged(conversations: Conversations, database: Database) -> Callable[..., StoredConversation]:
    """Make a conversation whose last message is some days old."""

    def make(namespace: str, days: float, keep: timedelta | None = None) -> StoredConversation:
        made = conversations.create(NewConversation(namespace, retention=keep), [NewMessage(MessageRole.USER, "Hi")])
        ages = "updated_at = now() - :age, expires_at = now() - :age + retention"
        values = {"id": made.id, "age": timedelta(days=days)}
        with database.work() as work:
            work.run(text(f"UPDATE conversation SET {ages} WHERE id = :id"), values)
        return conversations.get(made.id, None)

    return make


def run(runs: Runs, hot: HotConversations, default: timedelta | None) -> int:
    """Run a pass with plenty of time."""
    runtime = cast(Any, SimpleNamespace(runs=runs))
    return expiry.expire(Deletion(runs, hot), runtime, default, lambda: True)


def left(database: Database) -> set[Any]:
    with database.work() as work:
        return {row.id for row in work.rows(text("SELECT id FROM conversation"))}


def test_each_conversation_has_its_own_retention_or_that_of_its_namespace_or_that_of_the_settings(
    aged: Callable[..., StoredConversation], runs: Runs, hot: HotConversations, database: Database, valkey: redis.Redis
) -> None:
    with database.work() as work:
        retention.set_for(work, "short", 2 * DAY)
        retention.set_for(work, "forever", None)
    kept = [
        aged("plain", 9), aged("plain", 99, 100 * DAY), aged("short", 1), aged("short", 3, 5 * DAY),
        aged("forever", 500), aged("empty", 0),
    ]  # fmt: skip
    gone = [aged("plain", 11), aged("plain", 2, DAY), aged("short", 3), aged("forever", 3, DAY)]
    assert hot.recent(gone[0], 5)

    assert run(runs, hot, 10 * DAY) == len(gone)

    assert left(database) == {one.id for one in kept}
    assert hot.kept([gone[0].id]) == 0
    assert valkey.hgetall(hot_key(gone[0].id)).keys() == {"revision"}
    with database.work() as work:
        for table in ("conversation_message", "passage"):
            row = work.row(text(f"SELECT count(*) AS count FROM {table}"))
            assert row is not None
            assert row.count == len(kept)
    assert run(runs, hot, None) == 0
    with database.work() as work:
        assert retention.unset_for(work, "forever")
    assert run(runs, hot, 10 * DAY) == 1


def test_a_message_that_comes_in_time_saves_the_conversation(
    aged: Callable[..., StoredConversation], conversations: Conversations, runs: Runs, hot: HotConversations,
    database: Database,
) -> None:  # fmt: skip
    old = aged("plain", 11)
    conversations.append(old.id, None, [NewMessage(MessageRole.USER, "Wait!")])

    assert not Deletion(runs, hot).expire("plain", old.id, old.updated_at)
    assert left(database) == {old.id}


def test_one_that_cannot_be_deleted_does_not_stop_the_others(
    aged: Callable[..., StoredConversation], runs: Runs, hot: HotConversations, database: Database
) -> None:
    stuck, *others = [aged("plain", 11 + n) for n in range(3)]
    with database.work() as work:
        work.run(text("CREATE TABLE blocker (id uuid REFERENCES conversation (id))"))
        work.run(text("INSERT INTO blocker VALUES (:id)"), {"id": stuck.id})
    try:
        assert run(runs, hot, 10 * DAY) == len(others)
        assert left(database) == {stuck.id}
    finally:
        with database.work() as work:
            work.run(text("DROP TABLE blocker"))


def test_the_look_for_expired_conversations_does_not_grow_with_what_is_kept(database: Database) -> None:
    plans = []
    with database.work() as work:
        work.run(
            text("""
            INSERT INTO conversation (id, namespace, metadata, next_seq, revision, messages, bytes, retention,
                                      expires_at)
            SELECT gen_random_uuid(), 'n' || n % 3, '{}', 1, 0, 0, 0, CASE WHEN n % 2 = 0 THEN interval '1 day' END,
                   CASE WHEN n % 2 = 0 THEN now() + interval '1 day' END
            FROM generate_series(1, 20000) AS n
        """)
        )
        work.run(text("ANALYZE conversation"))
        for statement in (retention._OWN, retention._OF_NAMESPACES):
            given = {"limit": 100, "passed": [], "default": DAY}
            rows = work.rows(text(f"EXPLAIN {statement.text}"), given)
            plans.append("\n".join(row[0] for row in rows))
    for plan in plans:
        assert "Seq Scan on conversation" not in plan, plan
