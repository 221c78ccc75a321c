"""
The hot state of conversations: their last messages and their counters, in Redis.

The record decides. What is kept here says up to which message it holds; what was said since is read from the record,
and the whole of it when Redis has nothing, has been wiped, or does not answer. Writers never wait for Redis.
What was deleted does not come back: a deletion raises the revision here, and nothing of an earlier one is kept then.

Redis keys, of which each expires when it is not used for `conversations.window_ttl`:
    arriero:conversation:<id>    hash: the `revision` for which the others hold, `window` (the last messages, as JSON),
                                 `counters` (messages and tokens by role, as JSON), and what others derive
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol
from uuid import UUID

import redis
from sqlalchemy import text

from app.kernel import log
from app.kernel.database import Database
from app.kernel.errors import BrokerUnreachable
from app.kernel.sections.memory import ConversationSettings
from app.memory.conversations import store
from app.memory.conversations.conversation import StoredConversation
from app.memory.conversations.message import MessageRole, StoredCall, StoredMessage

_log = log.get(__name__)

#: Most bytes of the texts of a window, and most bytes of a value that is read.
_MAX_WINDOW, _MAX_VALUE = 1024 * 1024, 16 * 1024 * 1024
# KEYS: the hash. ARGV: revision, field, value, milliseconds to live.
_KEEP = """
local known = redis.call('HGET', KEYS[1], 'revision')
if known and tonumber(known) > tonumber(ARGV[1]) then return 0 end
if known ~= ARGV[1] then
  redis.call('DEL', KEYS[1])
  redis.call('HSET', KEYS[1], 'revision', ARGV[1])
end
redis.call('HSET', KEYS[1], ARGV[2], ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return 1
"""
# KEYS: the hash. ARGV: revision, milliseconds to live. How many values there were.
_FORGET = """
local kept = redis.call('HLEN', KEYS[1]) - redis.call('HEXISTS', KEYS[1], 'revision')
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'revision', ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return kept
"""
#: The revision of a deleted conversation: no other one is higher. Lua has doubles.
_DELETED = 2**53 - 1
_WINDOW, _COUNTERS = "window", "counters"

_COUNT = text("""
    SELECT role, count(*) AS messages, coalesce(sum(tokens), 0) AS tokens, count(tokens) AS counted
    FROM conversation_message WHERE conversation_id = :id AND seq >= :first AND seq < :end GROUP BY role
""")


@dataclass(frozen=True, slots=True)
class RoleCounts:
    """What one role has said."""

    messages: int = 0
    #: The tokens of those messages whose tokens were counted, and how many these are.
    tokens: int = 0
    counted: int = 0


def hot_key(id_: UUID) -> str:
    """Return the key of a conversation."""
    return f"arriero:conversation:{id_.hex}"


class RedisConnections(Protocol):
    """Gives connections to Redis: the publisher of a process, or another one."""

    def connection(self) -> AbstractContextManager[redis.Redis]:
        """Yield a connection. Raises BrokerUnreachable."""


class HotConversations:
    """The last messages and the counters of conversations."""

    def __init__(self, database: Database, publisher: RedisConnections, settings: ConversationSettings) -> None:
        self._database, self._publisher = database, publisher
        #: The settings of this moment; replaced when they change.
        self.settings = settings

    def recent(self, conversation: StoredConversation, limit: int) -> list[StoredMessage]:
        """Return the last messages of a conversation as it was read, the oldest first; at most `limit`."""
        end, most = conversation.next_seq, self.settings.window_messages
        if limit > most:
            return self._read(conversation.id, 1, end, limit)
        window = _window_of(self.value(conversation, _WINDOW))
        if window is None or window.end > end:
            found, first = self._read(conversation.id, 1, end, most), 1
        elif window.end == end:
            return self._last_of(conversation, window.messages, limit)
        else:
            added = self._read(conversation.id, window.end, end, most)
            found, first = [*window.messages, *added][-most:], window.end
        self.keep(conversation, _WINDOW, _encoded(end, found, most))
        _log.debug("conversation_window_read", conversation_id=str(conversation.id), first=first, end=end)
        return self._last_of(conversation, found, limit)

    def counters(self, conversation: StoredConversation) -> dict[MessageRole, RoleCounts]:
        """Return what each role has said in a conversation as it was read."""
        end = conversation.next_seq
        kept_end, found = _counters_of(self.value(conversation, _COUNTERS))
        if kept_end == end:
            return found
        first = kept_end if kept_end < end else 1
        found = found if first > 1 else {}
        with self._database.work() as work:
            for row in work.rows(_COUNT, {"id": conversation.id, "first": first, "end": end}):
                role = MessageRole(row.role)
                before = found.get(role, RoleCounts())
                found[role] = RoleCounts(
                    before.messages + row.messages, before.tokens + row.tokens, before.counted + row.counted
                )
        roles = {role: [one.messages, one.tokens, one.counted] for role, one in found.items()}
        self.keep(conversation, _COUNTERS, json.dumps({"end": end, "roles": roles}))
        return found

    def value(self, conversation: StoredConversation, name: str) -> bytes | None:
        """Return a value that is kept for a conversation as it was read; None without one, or without Redis."""
        try:
            with self._publisher.connection() as client, client.pipeline(transaction=False) as pipeline:
                pipeline.hmget(hot_key(conversation.id), "revision", name)
                pipeline.pexpire(hot_key(conversation.id), self._milliseconds)
                (revision, found), _ = pipeline.execute()
        except BrokerUnreachable as error:
            _log.debug("hot_state_not_read", error=str(error))
            return None
        if found is None or revision != str(conversation.revision).encode() or len(found) > _MAX_VALUE:
            return None
        return bytes(found)

    def keep(self, conversation: StoredConversation, name: str, value: str) -> None:
        """Keep a value for a conversation as it was read."""
        try:
            with self._publisher.connection() as client:
                given = (conversation.revision, name, value, self._milliseconds)
                client.eval(_KEEP, 1, hot_key(conversation.id), *map(str, given))
        except BrokerUnreachable as error:
            _log.debug("hot_state_not_kept", error=str(error))

    def forget(self, ids: Iterable[UUID], revision: int = _DELETED) -> int:
        """
        Remove what is kept of conversations before a revision, or that are deleted; returns how many values there were.

        Nothing of an earlier revision is kept for them afterwards. Raises BrokerUnreachable.
        """
        with self._publisher.connection() as client, client.pipeline(transaction=False) as pipeline:
            for id_ in ids:
                pipeline.eval(_FORGET, 1, hot_key(id_), str(revision), str(2 * self._milliseconds))
            return sum(int(kept) for kept in pipeline.execute())

    def kept(self, ids: Iterable[UUID]) -> int:
        """Return how many values are kept of these conversations. Raises BrokerUnreachable."""
        with self._publisher.connection() as client, client.pipeline(transaction=False) as pipeline:
            for id_ in ids:
                pipeline.hkeys(hot_key(id_))
            return sum(len(set(names) - {b"revision"}) for names in pipeline.execute())

    @property
    def _milliseconds(self) -> int:
        return int(self.settings.window_ttl.total_seconds() * 1000)

    def _last_of(self, conversation: StoredConversation, found: list[StoredMessage], limit: int) -> list[StoredMessage]:
        """The last messages of the window, or of the record where the window is too short for its bytes."""
        if len(found) >= min(limit, conversation.messages):
            return found[-limit:]
        return self._read(conversation.id, 1, conversation.next_seq, limit)

    def _read(self, id_: UUID, first: int, end: int, limit: int) -> list[StoredMessage]:
        with self._database.work() as work:
            return store.read(work, id_, first=first, end=end, limit=limit, newest_first=True)[::-1]


@dataclass(frozen=True, slots=True)
class _Window:
    #: The place behind its last message.
    end: int
    messages: list[StoredMessage]


def _encoded(end: int, messages: list[StoredMessage], most: int) -> str:
    """The last messages whose texts together have at most `_MAX_WINDOW` bytes."""
    chosen: list[Mapping[str, Any]] = []
    size = 0
    for message in reversed(messages[-most:]):
        document = _document(message)
        size += len(document["content"]) + len(document["calls"])
        if size > _MAX_WINDOW:
            break
        chosen.append(document)
    return json.dumps({"end": end, "messages": chosen[::-1]})


def _document(message: StoredMessage) -> dict[str, Any]:
    return {
        "id": message.id.hex,
        "conversation": message.conversation_id.hex,
        "seq": message.seq,
        "role": message.role,
        "content": message.content,
        "created_at": message.created_at.isoformat(),
        "speaker": message.speaker,
        "calls": json.dumps([call.document() for call in message.calls]) if message.calls else "",
        "call_id": message.call_id,
        "model": message.model,
        "tokens": message.tokens,
        "run_id": None if message.run_id is None else message.run_id.hex,
        "step_key": message.step_key,
    }


def _message_of(document: Mapping[str, Any]) -> StoredMessage:
    calls = json.loads(document["calls"]) if document["calls"] else []
    run_id = document["run_id"]
    return StoredMessage(
        id=UUID(document["id"]),
        conversation_id=UUID(document["conversation"]),
        seq=int(document["seq"]),
        role=MessageRole(document["role"]),
        content=document["content"],
        created_at=datetime.fromisoformat(document["created_at"]),
        speaker=document["speaker"],
        calls=tuple(StoredCall(call["id"], call["name"], call["arguments"]) for call in calls),
        call_id=document["call_id"],
        model=document["model"],
        tokens=document["tokens"],
        run_id=None if run_id is None else UUID(run_id),
        step_key=document["step_key"],
    )


def _window_of(value: bytes | None) -> _Window | None:
    """The window of a value; None for one of another form, as another version or a fault has left it."""
    if value is None:
        return None
    try:
        document = json.loads(value)
        return _Window(int(document["end"]), [_message_of(one) for one in document["messages"]])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        _log.warning("hot_state_unreadable", error=repr(error)[:200])
        return None


def _counters_of(value: bytes | None) -> tuple[int, dict[MessageRole, RoleCounts]]:
    """The counters of a value, and the place up to which they hold; 1 for none."""
    if value is None:
        return 1, {}
    try:
        document = json.loads(value)
        roles = {MessageRole(role): RoleCounts(*map(int, counts)) for role, counts in document["roles"].items()}
        return int(document["end"]), roles
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        _log.warning("hot_state_unreadable", error=repr(error)[:200])
        return 1, {}
