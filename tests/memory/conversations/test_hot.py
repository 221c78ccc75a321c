"""The last messages and the counters of conversations in Redis: the record decides."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import redis

from app.kernel.broker import CeleryPublisher
from app.kernel.database import Database
from app.kernel.sections.memory import ConversationSettings
from app.memory.conversations.conversation import NewConversation, StoredConversation
from app.memory.conversations.hot import HotConversations, RoleCounts, hot_key
from app.memory.conversations.message import MessageRole, NewMessage, StoredCall
from app.memory.conversations.service import Conversations

USER, ASSISTANT = MessageRole.USER, MessageRole.ASSISTANT
SETTINGS = ConversationSettings(window_messages=8)


@pytest.fixture
def conversations(database: Database) -> Conversations:
    return Conversations(database, SETTINGS)


@pytest.fixture
def hot(database: Database, publisher: CeleryPublisher) -> HotConversations:
    return HotConversations(database, publisher, SETTINGS)


@pytest.fixture
def talk(conversations: Conversations) -> Callable[..., StoredConversation]:
    """Append turns, and return the conversation then."""

    def more(conversation: StoredConversation | None = None, turns: int = 1) -> StoredConversation:
        conversation = conversation or conversations.create(NewConversation("default"))
        for _ in range(turns):
            call = StoredCall("c", "f", '{"é": 1}')
            answer = NewMessage(ASSISTANT, "so\u00fc?", "Bo", (call,), model="m", tokens=3, step_key="s")
            conversations.append(conversation.id, None, [NewMessage(USER, "Hello"), answer])
        return conversations.get(conversation.id, None)

    return more


def test_the_window_is_what_the_record_has(
    conversations: Conversations, hot: HotConversations, talk: Callable[..., StoredConversation], valkey: redis.Redis
) -> None:
    before = talk(turns=2)
    for limit in (1, 3, 8, 20):
        assert hot.recent(before, limit) == conversations.read(before.id)[-limit:]
    assert valkey.hget(hot_key(before.id), "window")

    for turns in (1, 2, 9):
        now = talk(before, turns)
        record = conversations.read(now.id, limit=1_000)
        assert hot.recent(now, 5) == record[-5:]
        assert hot.recent(now, 8) == record[-8:], "from the window that the call before has kept"
    assert hot.recent(before, 8) == conversations.read(before.id, end=before.next_seq), "as it was read"


def test_a_wiped_or_damaged_redis_changes_nothing_that_is_seen(
    conversations: Conversations, hot: HotConversations, talk: Callable[..., StoredConversation], valkey: redis.Redis
) -> None:
    before = talk(turns=3)
    window, counters = hot.recent(before, 5), hot.counters(before)
    for damage in (
        lambda: valkey.flushdb(),
        lambda: valkey.hset(hot_key(before.id), mapping={"window": "{", "counters": "[1]"}),
        lambda: valkey.hset(hot_key(before.id), mapping={"window": '{"end": 7, "messages": [{}]}', "counters": "null"}),
        lambda: valkey.hset(hot_key(before.id), "revision", "7"),
    ):
        damage()
        assert hot.recent(before, 5) == window
        assert hot.counters(before) == counters
    now = talk(before)
    assert hot.recent(now, 2) == conversations.read(now.id)[-2:]


def test_without_redis_the_record_is_read(
    database: Database, publisher: CeleryPublisher, talk: Callable[..., StoredConversation]
) -> None:
    hot = HotConversations(database, publisher, SETTINGS)
    now = talk(turns=2)
    publisher._redis.connection_pool.connection_kwargs["port"] = 1
    publisher._redis.connection_pool.disconnect()

    assert [message.seq for message in hot.recent(now, 3)] == [2, 3, 4]
    assert hot.counters(now)[USER].messages == 2


def test_counters_add_what_was_said_since(
    hot: HotConversations, talk: Callable[..., StoredConversation], database: Database, publisher: CeleryPublisher
) -> None:
    before = talk(turns=2)
    assert hot.counters(before) == {USER: RoleCounts(2, 0, 0), ASSISTANT: RoleCounts(2, 6, 2)}
    now = talk(before, 3)
    assert hot.counters(now) == {USER: RoleCounts(5, 0, 0), ASSISTANT: RoleCounts(5, 15, 5)}
    assert hot.counters(before) == {USER: RoleCounts(2, 0, 0), ASSISTANT: RoleCounts(2, 6, 2)}


def test_what_was_deleted_does_not_come_back(
    conversations: Conversations, hot: HotConversations, talk: Callable[..., StoredConversation], valkey: redis.Redis
) -> None:
    before = talk(turns=2)
    assert hot.recent(before, 4)
    changed = conversations.remove_message(before.id, conversations.read(before.id)[1].id)
    hot.forget([before.id], changed.revision)
    assert hot.kept([before.id]) == 0
    hot.recent(before, 4)  # a reader that began before the deletion
    assert hot.kept([before.id]) == 0
    assert [message.seq for message in hot.recent(changed, 4)] == [1, 3, 4]
    assert hot.kept([before.id]) == 1
    assert hot.counters(changed)[ASSISTANT].messages == 1

    assert hot.forget([before.id]) == 2
    hot.recent(changed, 4)
    assert hot.kept([before.id]) == 0
    assert 0 < valkey.pttl(hot_key(before.id)) <= 2 * 3_600_000


def test_a_window_is_bounded_in_bytes(conversations: Conversations, hot: HotConversations, valkey: redis.Redis) -> None:
    made = conversations.create(NewConversation("default"), [NewMessage(USER, "x" * 500_000)] * 4)

    assert hot.recent(made, 4) == hot.recent(made, 4) == conversations.read(made.id)
    assert valkey.hstrlen(hot_key(made.id), "window") < 1_100_000
