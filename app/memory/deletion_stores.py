"""
The stores of what is remembered, for deletion: how each removes, and how each is searched afterwards.

Every function runs in a transaction of its caller. The scope is one conversation, or all of a user of a namespace.
A new store of texts that stem from conversations or from users gets an entry in `STORES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import TextClause, text

from app.files.file import shown_id
from app.kernel.database import UnitOfWork
from app.memory.blocks import storage as blocks
from app.memory.blocks.block import BlockTarget, BlockTargetKind
from app.memory.conversations.conversation import CONVERSATION_PREFIX
from app.memory.personal import storage as personal


@dataclass(frozen=True, slots=True)
class DeletionScope:
    """What is deleted: one conversation, or everything of a user. Exactly one of both is given."""

    namespace: str
    conversation: UUID | None = None
    user: str | None = None
    #: The retention of the conversation is over: memories stay.
    expires: bool = False

    @property
    def shown(self) -> str | None:
        """The id of the conversation as the API shows it."""
        return None if self.conversation is None else shown_id(self.conversation, CONVERSATION_PREFIX)

    def values(self) -> dict[str, Any]:
        """The parameters of statements."""
        return {"namespace": self.namespace, "id": self.conversation, "shown": self.shown, "user": self.user}


@dataclass(frozen=True, slots=True)
class DeletableStore:
    """A store: `remove` returns how many rows it removed, `left` how many there are."""

    name: str
    remove: Callable[[UnitOfWork, DeletionScope], int]
    left: Callable[[UnitOfWork, DeletionScope], int]


_OF_CONVERSATION = "namespace = :namespace AND thread = :shown AND conversation IS NOT NULL"
_MEMORY_OF_CONVERSATION = """
    namespace = :namespace AND (conversation_id = :id OR EXISTS (
        SELECT FROM memory_source WHERE memory_source.memory_id = memory.id AND memory_source.conversation_id = :id
    ))
"""
#: By store, the rows of a conversation and those of a user.
_PASSAGES = (f"passage WHERE {_OF_CONVERSATION}", "passage WHERE namespace = :namespace AND owner = :user")
_EXPIRED_PASSAGES = f"passage WHERE {_OF_CONVERSATION} AND source = 'message'"
_MEMORIES = (f"memory WHERE {_MEMORY_OF_CONVERSATION}", "memory WHERE namespace = :namespace AND user_name = :user")
_REFUSALS = (
    "memory_refusal WHERE namespace = :namespace AND conversation_id = :id",
    "memory_refusal WHERE namespace = :namespace AND user_name = :user",
)
_DOCUMENTS = ("", "context_document WHERE namespace = :namespace AND user_name = :user")
_ATTACHED = """
    memory_block WHERE id IN (
        SELECT block_id FROM memory_block_attachment
        WHERE namespace = :namespace AND target_kind = :kind AND target = :target
    )
"""
_OF_USER = "conversation_id IN (SELECT id FROM conversation WHERE namespace = :namespace AND user_id = :user)"
_MESSAGES, _SUMMARIES, _EXTRACTIONS = (
    (f"{table} WHERE conversation_id = :id", f"{table} WHERE {_OF_USER}")
    for table in ("conversation_message", "conversation_summary", "memory_extraction")
)
_CONVERSATIONS = (
    "conversation WHERE id = :id AND namespace = :namespace",
    "conversation WHERE namespace = :namespace AND user_id = :user",
)


def _rows(where: tuple[str, str], scope: DeletionScope) -> str:
    return where[0] if scope.conversation is not None else where[1]


def _count(work: UnitOfWork, rows: str, values: Mapping[str, Any]) -> int:
    if not rows:
        return 0
    row = work.row(_counting(rows), values)
    assert row is not None, "an aggregate has one row"
    return int(row.count)


def _counting(rows: str) -> TextClause:
    return text(f"SELECT count(*) AS count FROM {rows}")


def _remove_rows(work: UnitOfWork, rows: str, scope: DeletionScope) -> int:
    return work.run(text(f"DELETE FROM {rows}"), scope.values()) if rows else 0


def _of(name: str, where: tuple[str, str]) -> DeletableStore:
    """A store whose rows one statement removes, also when a conversation expires."""
    return DeletableStore(
        name,
        lambda work, scope: _remove_rows(work, _rows(where, scope), scope),
        lambda work, scope: _count(work, _rows(where, scope), scope.values()),
    )


def _remove_passages(work: UnitOfWork, scope: DeletionScope) -> int:
    return _remove_rows(work, _EXPIRED_PASSAGES if scope.expires else _rows(_PASSAGES, scope), scope)


def _remove_memories(work: UnitOfWork, scope: DeletionScope) -> int:
    """Memories with their sources and history, the passages of memories, and what the gate has refused."""
    if scope.expires:
        return 0
    work.execute(_FORGET_PASSAGES[scope.conversation is not None], scope.values())
    return _remove_rows(work, _rows(_MEMORIES, scope), scope)


def _remove_blocks(work: UnitOfWork, scope: DeletionScope) -> int:
    return len(blocks.delete_of_in(work, scope.namespace, _target(scope)))


def _blocks_left(work: UnitOfWork, scope: DeletionScope) -> int:
    target = _target(scope)
    return _count(work, _ATTACHED, {"namespace": scope.namespace, "kind": target.kind, "target": target.name})


def _remove_documents(work: UnitOfWork, scope: DeletionScope) -> int:
    return 0 if scope.user is None else len(personal.delete_of_user_in(work, scope.namespace, scope.user))


def _remove_conversations(work: UnitOfWork, scope: DeletionScope) -> int:
    """The record, with what hangs on it: messages, summaries, runs that are noted; and how far memories were read."""
    _remove_rows(work, _rows(_EXTRACTIONS, scope), scope)
    return _remove_rows(work, _rows(_CONVERSATIONS, scope), scope)


def _target(scope: DeletionScope) -> BlockTarget:
    if scope.user is not None:
        return BlockTarget(BlockTargetKind.USER, scope.user)
    return BlockTarget(BlockTargetKind.CONVERSATION, scope.shown or "")


_FORGET_PASSAGES = {
    of_conversation: text(f"""
        DELETE FROM passage WHERE namespace = :namespace AND source = 'memory'
        AND source_id IN (SELECT 'mem_' || replace(CAST(id AS text), '-', '') FROM {rows})
    """)
    for of_conversation, rows in ((True, _MEMORIES[0]), (False, _MEMORIES[1]))
}

#: In the order in which they are removed: what is derived first, the record last.
STORES: tuple[DeletableStore, ...] = (
    DeletableStore("memories", _remove_memories, _of("memories", _MEMORIES).left),
    _of("refused memories", _REFUSALS),
    DeletableStore("passages and vectors", _remove_passages, _of("passages", _PASSAGES).left),
    _of("summaries", _SUMMARIES),
    DeletableStore("blocks", _remove_blocks, _blocks_left),
    DeletableStore("documents", _remove_documents, _of("documents", _DOCUMENTS).left),
    _of("messages", _MESSAGES),
    DeletableStore("conversations", _remove_conversations, _of("conversations", _CONVERSATIONS).left),
)
