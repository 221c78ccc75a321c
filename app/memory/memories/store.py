"""
The statements on memories, their sources and their history.

The text of a memory is never updated. Each function is part of a transaction of its caller.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.files.file import shown_id
from app.kernel import ids
from app.kernel.database import UnitOfWork
from app.memory.memories.kinds import MAX_SOURCES, MemoryEvent, MemoryKind, MemoryOrigin, text_hash
from app.memory.memories.memory import PREFIX, Memory, MemoryHistoryEntry, MemorySource, NewMemory
from app.memory.recall import storage
from app.memory.recall.passages import NewPassage, SourceKind

COLUMNS = """
    id, namespace, user_name AS "user", conversation_id, kind, text, importance, confidence, valid_from, invalid_at,
    superseded_by, created_at, last_used_at, uses
"""
_INSERT = text(f"""
    INSERT INTO memory (id, namespace, user_name, conversation_id, kind, text, text_hash, importance, confidence,
                        valid_from, uses)
    VALUES (:id, :namespace, :user, :conversation_id, :kind, :text, :hash, :importance, :confidence,
            COALESCE(CAST(:valid_from AS timestamptz), now()), 0)
    ON CONFLICT (namespace, COALESCE(user_name, ''), text_hash) WHERE invalid_at IS NULL DO NOTHING
    RETURNING {COLUMNS}
""")
_OF_TEXT = text(f"""
    SELECT {COLUMNS} FROM memory
    WHERE namespace = :namespace AND COALESCE(user_name, '') = COALESCE(CAST(:user AS text), '') AND text_hash = :hash
      AND invalid_at IS NULL
    FOR UPDATE
""")
_INSERT_SOURCE = text("""
    INSERT INTO memory_source (memory_id, position, origin, author, conversation_id, message_id, run_id)
    VALUES (:memory_id, :position, :origin, :author, :conversation_id, :message_id, :run_id)
""")
_SOURCES = text("""
    SELECT memory_id, origin, author, conversation_id, message_id, run_id FROM memory_source
    WHERE memory_id = ANY(:ids) ORDER BY memory_id, position
""")
_INSERT_EVENT = text("""
    INSERT INTO memory_event (memory_id, event, author, note, detail)
    VALUES (:memory_id, :event, :author, :note, :detail)
""")
_EVENTS = text("""
    SELECT memory_id, event, at, author, note, detail FROM memory_event WHERE memory_id = ANY(:ids) ORDER BY id
""")
# Who writes memories of a user waits for who does at the time, so two that write the same texts in different orders do
# not wait for each other. The rows are locked in the order of their ids, as by those who change or use memories.
_LOCK_SCOPE = text("SELECT pg_advisory_xact_lock(hashtextextended('memory:' || :namespace || ':' || :user, 0))")
_LOCK_CONCERNED = text("""
    SELECT id FROM memory
    WHERE id = CAST(:replaced AS uuid) OR (
        namespace = :namespace AND COALESCE(user_name, '') = :user AND text_hash = :hash AND invalid_at IS NULL
    )
    ORDER BY id FOR UPDATE
""")
_GET = text(f"SELECT {COLUMNS} FROM memory WHERE id = :id")
_LOCK = text(f"SELECT {COLUMNS} FROM memory WHERE id = :id FOR UPDATE")
_GET_ALL = text(f"SELECT {COLUMNS} FROM memory WHERE id = ANY(:ids) ORDER BY id")
_END = text(f"""
    UPDATE memory SET invalid_at = :at, superseded_by = :by WHERE id = :id AND invalid_at IS NULL RETURNING {COLUMNS}
""")
_SET_KIND = text(f"UPDATE memory SET kind = :kind WHERE id = :id RETURNING {COLUMNS}")
_SET_CONFIDENCE = text("UPDATE memory SET confidence = :confidence WHERE id = :id")
_NOW = text("SELECT now() AS now")
_USED = text("""
    WITH there AS MATERIALIZED (SELECT id FROM memory WHERE id = ANY(:ids) ORDER BY id FOR NO KEY UPDATE)
    UPDATE memory SET last_used_at = now(), uses = uses + 1 FROM there WHERE memory.id = there.id
""")
_KIND_BEFORE = text("""
    SELECT detail FROM memory_event WHERE memory_id = :id AND event = 'marked' ORDER BY id DESC LIMIT 1
""")
# The memories that led to one, and those that followed it; each is superseded by one at most, so there are no branches
# forward. `UNION` ends the walk where a memory comes a second time.
_CHAIN = text("""
    WITH RECURSIVE chain(id) AS (
        SELECT CAST(:id AS uuid)
        UNION
        SELECT linked.id FROM chain CROSS JOIN LATERAL (
            SELECT earlier.id FROM memory earlier WHERE earlier.superseded_by = chain.id
            UNION ALL
            SELECT later.superseded_by FROM memory later WHERE later.id = chain.id AND later.superseded_by IS NOT NULL
        ) AS linked
    ) SELECT id FROM chain LIMIT :limit
""")


@dataclass(frozen=True, slots=True)
class MemoryFilter:
    """Which memories are listed. A field that is None does not filter."""

    namespace: str | None = None
    user: str | None = None
    kind: MemoryKind | None = None
    conversation_id: UUID | None = None
    #: Those that held then, instead of those that hold.
    as_of: datetime | None = None
    #: Also those that hold no more, or not yet.
    all_times: bool = False


def insert(work: UnitOfWork, new: NewMemory, namespace: str) -> Memory | None:
    """Write a memory with its sources; None when one that holds says the same."""
    values = {
        "id": ids.new_id(),
        "namespace": namespace,
        "user": new.user,
        "conversation_id": new.conversation_id,
        "kind": new.kind.value,
        "text": new.text,
        "hash": text_hash(new.text),
        "importance": new.importance,
        "confidence": new.confidence,
        "valid_from": new.valid_from,
    }
    made = work.row_of(Memory, _INSERT, values)
    if made is None:
        return None
    _insert_sources(work, made.id, new.sources)
    return replace(made, sources=tuple(new.sources))


def reinforce(work: UnitOfWork, id_: UUID, confidence: float, sources: Sequence[MemorySource]) -> None:
    """Write the confidence of a memory that was found again, and its further sources, as many as it may have."""
    work.execute(_LOCK, {"id": id_})
    work.execute(_SET_CONFIDENCE, {"id": id_, "confidence": confidence})
    known = [
        MemorySource(MemoryOrigin(row.origin), row.author, row.conversation_id, row.message_id, row.run_id)
        for row in work.rows(_SOURCES, {"ids": [id_]})
    ]
    further = [source for source in sources if source not in known]
    _insert_sources(work, id_, further[: max(MAX_SOURCES - len(known), 0)], first=len(known))


def _insert_sources(work: UnitOfWork, id_: UUID, sources: Sequence[MemorySource], *, first: int = 0) -> None:
    rows = [
        {
            "memory_id": id_,
            "position": position,
            "origin": source.origin.value,
            "author": source.author,
            "conversation_id": source.conversation_id,
            "message_id": source.message_id,
            "run_id": source.run_id,
        }
        for position, source in enumerate(sources, start=first)
    ]
    if rows:
        work.execute(_INSERT_SOURCE, rows)


def lock(work: UnitOfWork, namespace: str, user: str | None, given: str, replaced: UUID | None) -> None:
    """Lock what a new memory concerns: its scope, the memory that holds and says the same, and the one it replaces."""
    scope = {"namespace": namespace, "user": user or ""}
    work.execute(_LOCK_SCOPE, scope)
    work.execute(_LOCK_CONCERNED, {**scope, "hash": text_hash(given), "replaced": replaced})


def of_text(work: UnitOfWork, namespace: str, user: str | None, given: str) -> Memory | None:
    """Return the memory of that scope that holds and says the same, locked."""
    values = {"namespace": namespace, "user": user, "hash": text_hash(given)}
    found = work.row_of(Memory, _OF_TEXT, values)
    return None if found is None else with_sources(work, [found])[0]


def find(work: UnitOfWork, id_: UUID, *, lock: bool = False) -> Memory | None:
    """The memory of that id."""
    found = work.row_of(Memory, _LOCK if lock else _GET, {"id": id_})
    return None if found is None else with_sources(work, [found])[0]


def all_of(work: UnitOfWork, wanted: Collection[UUID]) -> list[Memory]:
    """The memories of these ids, the oldest first."""
    return with_sources(work, work.rows_of(Memory, _GET_ALL, {"ids": list(wanted)})) if wanted else []


def page(work: UnitOfWork, of: MemoryFilter, after: UUID | None, limit: int) -> list[Memory]:
    """Memories, the newest first."""
    conditions = ["true"]
    if of.namespace is not None:
        conditions.append("namespace = :namespace")
    if of.user is not None:
        conditions.append("user_name = :user")
    if of.kind is not None:
        conditions.append("kind = :kind")
    if of.conversation_id is not None:
        conditions.append("conversation_id = :conversation_id")
    if of.as_of is not None:
        conditions.append("valid_from <= :as_of AND (invalid_at IS NULL OR invalid_at > :as_of)")
    elif not of.all_times:
        conditions.append("valid_from <= now() AND (invalid_at IS NULL OR invalid_at > now())")
    if after is not None:
        conditions.append("id < :after")
    statement = text(f"SELECT {COLUMNS} FROM memory WHERE {' AND '.join(conditions)} ORDER BY id DESC LIMIT :limit")
    values: dict[str, Any] = {
        "namespace": of.namespace,
        "user": of.user,
        "kind": None if of.kind is None else of.kind.value,
        "conversation_id": of.conversation_id,
        "as_of": of.as_of,
        "after": after,
        "limit": limit,
    }
    return with_sources(work, work.rows_of(Memory, statement, values))


def with_sources(work: UnitOfWork, memories: Sequence[Memory]) -> list[Memory]:
    """Return memories with their sources."""
    if not memories:
        return []
    found: dict[UUID, list[MemorySource]] = defaultdict(list)
    for row in work.rows(_SOURCES, {"ids": [memory.id for memory in memories]}):
        source = MemorySource(MemoryOrigin(row.origin), row.author, row.conversation_id, row.message_id, row.run_id)
        found[row.memory_id].append(source)
    return [replace(memory, sources=tuple(found[memory.id])) for memory in memories]


def end(work: UnitOfWork, id_: UUID, at: datetime, by: UUID | None = None) -> Memory | None:
    """Write when a memory ended, and which one took its place; None when it has ended before."""
    return work.row_of(Memory, _END, {"id": id_, "at": at, "by": by})


def set_kind(work: UnitOfWork, id_: UUID, kind: MemoryKind) -> Memory:
    """Write the kind of a memory, which exists."""
    found = work.row_of(Memory, _SET_KIND, {"id": id_, "kind": kind.value})
    assert found is not None, "the caller has locked it"
    return found


def kind_before(work: UnitOfWork, id_: UUID) -> MemoryKind | None:
    """The kind of a memory before it was marked; None when it was written as what it is."""
    row = work.row(_KIND_BEFORE, {"id": id_})
    return None if row is None else MemoryKind(row.detail)


def note(work: UnitOfWork, id_: UUID, event: MemoryEvent, author: str, why: str = "", detail: str = "") -> None:
    """Write what happened to a memory."""
    values = {"memory_id": id_, "event": event.value, "author": author, "note": why}
    work.execute(_INSERT_EVENT, {**values, "detail": detail})


def history(work: UnitOfWork, memory_ids: Collection[UUID]) -> list[MemoryHistoryEntry]:
    """What happened to memories, the oldest first."""
    return work.rows_of(MemoryHistoryEntry, _EVENTS, {"ids": list(memory_ids)})


def chain(work: UnitOfWork, id_: UUID, limit: int) -> list[UUID]:
    """The ids of the memories that a memory superseded or was superseded by, itself included."""
    return [row.id for row in work.rows(_CHAIN, {"id": id_, "limit": limit})]


def now(work: UnitOfWork) -> datetime:
    """The instant of the transaction."""
    row = work.row(_NOW)
    assert row is not None, "there is a row"
    instant: datetime = row.now
    return instant


def put_passage(work: UnitOfWork, memory: Memory) -> None:
    """Let recall find a memory that holds."""
    passage = NewPassage(
        memory.namespace,
        SourceKind.MEMORY,
        shown_id(memory.id, PREFIX),
        memory.text,
        user=memory.user,
        kind=memory.kind,
        at=memory.valid_from,
    )
    storage.put_in(work, [passage])


def remove_passages(work: UnitOfWork, memories: Collection[Memory]) -> None:
    """Let recall find these memories no more."""
    for namespace in {memory.namespace for memory in memories}:
        named = [shown_id(memory.id, PREFIX) for memory in memories if memory.namespace == namespace]
        storage.remove_in(work, namespace, SourceKind.MEMORY, sorted(named))


def used(work: UnitOfWork, memory_ids: Collection[UUID]) -> None:
    """Write that memories were used now."""
    if memory_ids:
        work.execute(_USED, {"ids": sorted(memory_ids)})
