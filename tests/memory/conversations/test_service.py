"""Conversations and their messages, in the database."""

from __future__ import annotations

import threading
from uuid import UUID

import pytest

from app.kernel import ids
from app.kernel.database import Database
from app.kernel.errors import InvalidInput, NotFound
from app.kernel.sections.memory import ConversationSettings
from app.memory.conversations.chat import chat_messages
from app.memory.conversations.conversation import ConversationFull, NewConversation
from app.memory.conversations.message import MessageRole, NewMessage, StoredCall
from app.memory.conversations.service import Conversations, parsed_conversation, shown_conversation

USER, ASSISTANT = MessageRole.USER, MessageRole.ASSISTANT


@pytest.fixture
def conversations(database: Database) -> Conversations:
    return Conversations(database, ConversationSettings(max_messages=1_000, max_message_bytes=1024))


def said(text: str, role: MessageRole = USER) -> NewMessage:
    return NewMessage(role, text)


def test_what_was_said_is_read_as_it_was_said(conversations: Conversations) -> None:
    made = conversations.create(NewConversation("default", user="ada", metadata={"topic": "tea"}), [said("Hello")])
    run = ids.new_id()
    call = StoredCall("call_1", "brew", '{"leaf": "green"}')
    answer = NewMessage(ASSISTANT, "", "Tea master", (call,), model="m:1b", tokens=7, run_id=run, step_key="chat")
    stored = conversations.append(made.id, "default", [answer, NewMessage(MessageRole.TOOL, "done", call_id="call_1")])

    read = conversations.read(made.id)

    assert [(one.seq, one.role, one.content) for one in read] == [
        (1, "user", "Hello"),
        (2, "assistant", ""),
        (3, "tool", "done"),
    ]
    assert read[1:] == stored
    assert (read[1].calls, read[1].speaker, read[1].tokens, read[1].run_id) == ((call,), "Tea master", 7, run)
    found = conversations.get(made.id, "default")
    assert (found.messages, found.next_seq, found.user, found.metadata) == (3, 4, "ada", {"topic": "tea"})
    assert parsed_conversation(shown_conversation(made.id)) == made.id


def test_a_conversation_of_another_namespace_is_unknown(conversations: Conversations) -> None:
    made = conversations.create(NewConversation("ours"))

    with pytest.raises(NotFound):
        conversations.get(made.id, "theirs")
    with pytest.raises(NotFound):
        conversations.append(made.id, "theirs", [said("Hello")])
    with pytest.raises(NotFound):
        conversations.append(ids.new_id(), None, [said("Hello")])


def test_limits_of_messages_and_of_bytes(conversations: Conversations) -> None:
    made = conversations.create(NewConversation("default"))
    conversations.append(made.id, None, [said("x")] * 999)

    with pytest.raises(ConversationFull, match=r"at most 1000 messages \(setting conversations.max_messages\)"):
        conversations.append(made.id, None, [said("x")] * 2)
    with pytest.raises(InvalidInput, match=r"items\[1\]: the message has 1025 bytes; accepted: at most 1024"):
        conversations.append(made.id, None, [said("x"), said("x" * 1025)])
    assert conversations.get(made.id, None).messages == 999


def test_writers_at_once_neither_lose_nor_separate_nor_reorder_turns(conversations: Conversations) -> None:
    made = conversations.create(NewConversation("default"))
    start = threading.Barrier(4)

    def write(writer: int) -> None:
        start.wait()
        for turn in range(25):
            name = f"{writer}:{turn}"
            conversations.append(made.id, "default", [said(name), said(name, ASSISTANT)])

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    read = conversations.read(made.id, limit=1_000)
    assert [one.seq for one in read] == list(range(1, 201))
    assert all(asked.content == answered.content for asked, answered in zip(read[::2], read[1::2], strict=True))
    assert [one.role for one in read] == [USER, ASSISTANT] * 100
    for writer in range(4):
        own = [one.content for one in read[::2] if one.content.startswith(f"{writer}:")]
        assert own == [f"{writer}:{turn}" for turn in range(25)]
    times = [one.created_at for one in read]
    assert times == sorted(times)


def test_a_transaction_of_the_caller_that_fails_leaves_nothing(
    conversations: Conversations, database: Database
) -> None:
    made = conversations.create(NewConversation("default"))

    def fail() -> None:
        with database.work() as work:
            conversations.append_in(work, made.id, [said("lost")])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    (kept,) = conversations.append(made.id, None, [said("kept")])

    assert kept.seq == 1
    assert [one.content for one in conversations.read(made.id)] == ["kept"]


def test_an_id_of_another_kind_is_no_conversation() -> None:
    assert parsed_conversation("conv_123") is None
    assert parsed_conversation(f"msg_{UUID(int=1).hex}") is None


def test_calls_that_follow_each_other_are_one_message_of_a_chat(conversations: Conversations) -> None:
    made = conversations.create(NewConversation("default"))
    calls = [NewMessage(ASSISTANT, calls=(StoredCall(name, name, '{"a": 1}'),)) for name in ("one", "two")]
    conversations.append(made.id, None, [said("Go"), *calls, NewMessage(MessageRole.TOOL, "1", call_id="one")])

    asked, called, result = chat_messages(conversations.read(made.id))

    assert (asked.role, result.role) == ("user", "tool")
    assert [(call.name, call.arguments) for call in called.tool_calls] == [("one", {"a": 1}), ("two", {"a": 1})]
