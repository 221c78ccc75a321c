"""
The statements on conversations and their messages. Every function runs in a transaction of its caller.

Appending locks the row of the conversation until the commit: the numbers of messages have no order but that of commits.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.kernel import ids
from app.kernel.database import UnitOfWork
from app.memory.conversations.conversation import NewConversation, StoredConversation
from app.memory.conversations.message import MessageRole, NewMessage, StoredCall, StoredMessage

CONVERSATION_COLUMNS = """
    id, namespace, user_id AS user, title, metadata, model, retention, next_seq, revision, messages, bytes,
    forked_from, forked_at, created_at, updated_at
"""
MESSAGE_COLUMNS = """
    id, conversation_id, seq, role, content, created_at, speaker, calls, call_id, model, tokens, run_id, step_key
"""
_INSERT = text(f"""
    INSERT INTO conversation (id, namespace, user_id, title, metadata, model, retention, next_seq, revision, messages,
                              bytes, forked_from, forked_at, expires_at)
    VALUES (:id, :namespace, :user, :title, CAST(:metadata AS jsonb), :model, :retention, 1, 0, 0, 0, :forked_from,
            :forked_at, now() + CAST(:retention AS interval))
    RETURNING {CONVERSATION_COLUMNS}
""")
_GET = text(f"SELECT {CONVERSATION_COLUMNS} FROM conversation WHERE id = :id")
_LOCK = text(f"SELECT {CONVERSATION_COLUMNS} FROM conversation WHERE id = :id FOR UPDATE")
_TAKE_PLACES = text("""
    UPDATE conversation SET next_seq = next_seq + :count, messages = messages + :count, bytes = bytes + :bytes,
                            updated_at = clock_timestamp(), expires_at = clock_timestamp() + retention
    WHERE id = :id AND messages + :count <= :limit
    RETURNING next_seq - :count AS first, revision, updated_at
""")
_APPEND = text("""
    INSERT INTO conversation_message (conversation_id, seq, id, role, content, speaker, calls, call_id, model, tokens,
                                      run_id, step_key, created_at)
    VALUES (:conversation_id, :seq, :id, :role, :content, :speaker, CAST(:calls AS json), :call_id, :model, :tokens,
            :run_id, :step_key, :created_at)
""")
_LINK = text("""
    INSERT INTO conversation_run (conversation_id, run_id)
    SELECT id, run_id FROM conversation, unnest(CAST(:run_ids AS uuid[])) AS run_id WHERE id = :id
    ON CONFLICT DO NOTHING
""")
_READ = f"""
    SELECT {MESSAGE_COLUMNS} FROM conversation_message
    WHERE conversation_id = :id AND seq >= :first AND seq < :end ORDER BY seq {{order}} LIMIT :limit
"""
_READ_UP, _READ_DOWN = text(_READ.format(order="ASC")), text(_READ.format(order="DESC"))
_FIND_MESSAGE = text(f"SELECT {MESSAGE_COLUMNS} FROM conversation_message WHERE id = :id")
_FIND_MESSAGES = text(f"SELECT {MESSAGE_COLUMNS} FROM conversation_message WHERE id = ANY(:ids)")
_SIZE = "octet_length(content) + coalesce(octet_length(calls::text), 0)"
# The copies are spoken again in the fork: they have its numbers, and the times at which they were said.
_COPY = text("""
    INSERT INTO conversation_message (conversation_id, seq, id, role, content, speaker, calls, call_id, model, tokens,
                                      run_id, step_key, created_at)
    SELECT :fork, row_number() OVER (ORDER BY seq), gen_random_uuid(), role, content, speaker, calls, call_id, model,
           tokens, run_id, step_key, created_at
    FROM conversation_message WHERE conversation_id = :id AND seq <= :last
""")
_COUNT_AGAIN = text(f"""
    UPDATE conversation SET next_seq = counted.messages + 1, messages = counted.messages, bytes = counted.bytes
    FROM (SELECT count(*) AS messages, coalesce(sum({_SIZE}), 0) AS bytes
          FROM conversation_message WHERE conversation_id = :id) AS counted
    WHERE conversation.id = :id
    RETURNING {CONVERSATION_COLUMNS.replace("messages", "conversation.messages").replace("bytes", "conversation.bytes")}
""")
_REMOVE_MESSAGE = text(f"""
    WITH gone AS (
        DELETE FROM conversation_message WHERE conversation_id = :id AND seq = :seq RETURNING {_SIZE} AS size
    )
    UPDATE conversation SET messages = messages - 1, bytes = bytes - gone.size, revision = revision + 1
    FROM gone WHERE conversation.id = :id
""")
#: Columns that a client may change.
_CHANGEABLE = {
    "title": "title = :title",
    "metadata": "metadata = CAST(:metadata AS jsonb)",
    "model": "model = :model",
    "retention": "retention = CAST(:retention AS interval), expires_at = updated_at + CAST(:retention AS interval)",
}

#: A place behind every message.
END = 2**62


def insert(
    work: UnitOfWork, new: NewConversation, forked_from: UUID | None = None, forked_at: int | None = None
) -> StoredConversation:
    """Write a conversation without messages."""
    values = {
        "id": ids.new_id(),
        "namespace": new.namespace,
        "user": new.user,
        "title": new.title,
        "metadata": json.dumps(dict(new.metadata)),
        "model": new.model,
        "retention": new.retention,
        "forked_from": forked_from,
        "forked_at": forked_at,
    }
    made = work.row_of(StoredConversation, _INSERT, values)
    assert made is not None, "it was inserted"
    return made


def find(work: UnitOfWork, id_: UUID, *, lock: bool = False) -> StoredConversation | None:
    """Return a conversation, or None. With `lock`, nobody appends to it before the end of the transaction."""
    return work.row_of(StoredConversation, _LOCK if lock else _GET, {"id": id_})


def append(
    work: UnitOfWork, id_: UUID, messages: Sequence[NewMessage], limit: int, ids_: Sequence[UUID] = ()
) -> list[StoredMessage] | None:
    """
    Append messages next to each other, and return them. Without `ids_`, they get new ids.

    None when the conversation is not there, or would have more than `limit` messages.
    """
    size = sum(message.size for message in messages)
    taken = work.row(_TAKE_PLACES, {"id": id_, "count": len(messages), "bytes": size, "limit": limit})
    if taken is None:
        return None
    stored = [
        _placed(message, ids_[at] if ids_ else ids.new_id(), id_, taken.first + at, taken.updated_at)
        for at, message in enumerate(messages)
    ]
    values = [_values(placed, new.written_calls) for placed, new in zip(stored, messages, strict=True)]
    work.execute(_APPEND, values)
    link_runs(work, id_, {message.run_id for message in messages if message.run_id is not None})
    return stored


def link_runs(work: UnitOfWork, id_: UUID, run_ids: Collection[UUID]) -> None:
    """Note that runs hold texts of a conversation: whoever deletes it deletes them."""
    if run_ids:
        work.execute(_LINK, {"id": id_, "run_ids": sorted(run_ids)})


def read(
    work: UnitOfWork, id_: UUID, *, first: int = 1, end: int = END, limit: int, newest_first: bool = False
) -> list[StoredMessage]:
    """Return messages from the place `first` on and before `end`, at most `limit`."""
    given = {"id": id_, "first": first, "end": end, "limit": limit}
    return [message_of(row) for row in work.rows(_READ_DOWN if newest_first else _READ_UP, given)]


def update(work: UnitOfWork, id_: UUID, given: Mapping[str, Any]) -> StoredConversation | None:
    """Change the title, the metadata, the model or the retention: those that are given. None when it is not there."""
    values = {**given, "id": id_}
    if "metadata" in given:
        values["metadata"] = json.dumps(dict(given["metadata"]))
    changes = ", ".join(_CHANGEABLE[name] for name in given) or "id = id"
    statement = text(f"UPDATE conversation SET {changes} WHERE id = :id RETURNING {CONVERSATION_COLUMNS}")
    return work.row_of(StoredConversation, statement, values)


def copy(work: UnitOfWork, id_: UUID, last: int, fork: UUID) -> StoredConversation:
    """Copy the messages up to the place `last` to an empty conversation, and return that."""
    work.execute(_COPY, {"id": id_, "last": last, "fork": fork})
    made = work.row_of(StoredConversation, _COUNT_AGAIN, {"id": fork})
    assert made is not None, "the caller has made it in this transaction"
    return made


def remove_message(work: UnitOfWork, id_: UUID, seq: int) -> bool:
    """Remove a message of a conversation that the caller has locked; returns whether it was there."""
    return work.run(_REMOVE_MESSAGE, {"id": id_, "seq": seq}) > 0


def find_message(work: UnitOfWork, id_: UUID) -> StoredMessage | None:
    """Return a message of any conversation, or None."""
    row = work.row(_FIND_MESSAGE, {"id": id_})
    return None if row is None else message_of(row)


def find_messages(work: UnitOfWork, ids_: Sequence[UUID]) -> dict[UUID, StoredMessage]:
    """Return those of these messages that are there, by id."""
    return {row.id: message_of(row) for row in work.rows(_FIND_MESSAGES, {"ids": list(ids_)})}


def message_of(row: Any) -> StoredMessage:
    """Return the message of a row with `MESSAGE_COLUMNS`."""
    calls = tuple(StoredCall(call["id"], call["name"], call["arguments"]) for call in row.calls or ())
    return StoredMessage(
        id=row.id,
        conversation_id=row.conversation_id,
        seq=row.seq,
        role=MessageRole(row.role),
        content=row.content,
        created_at=row.created_at,
        speaker=row.speaker,
        calls=calls,
        call_id=row.call_id,
        model=row.model,
        tokens=row.tokens,
        run_id=row.run_id,
        step_key=row.step_key,
    )


def _placed(message: NewMessage, id_: UUID, conversation_id: UUID, seq: int, at: Any) -> StoredMessage:
    return StoredMessage(
        id=id_,
        conversation_id=conversation_id,
        seq=seq,
        role=message.role,
        content=message.content,
        created_at=at,
        speaker=message.speaker,
        calls=message.calls,
        call_id=message.call_id,
        model=message.model,
        tokens=message.tokens,
        run_id=message.run_id,
        step_key=message.step_key,
    )


def _values(message: StoredMessage, calls: str | None) -> Mapping[str, Any]:
    return {
        "conversation_id": message.conversation_id,
        "seq": message.seq,
        "id": message.id,
        "role": message.role.value,
        "content": message.content,
        "speaker": message.speaker,
        "calls": calls,
        "call_id": message.call_id,
        "model": message.model,
        "tokens": message.tokens,
        "run_id": message.run_id,
        "step_key": message.step_key,
        "created_at": message.created_at,
    }
