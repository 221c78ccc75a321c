"""
Whether memories are extracted: what namespaces and conversations have chosen, how far it is, and what was refused.

What is turned on concerns messages from then on: nobody pays for a past that nobody asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.files.file import parsed_id
from app.kernel.database import Database, UnitOfWork
from app.kernel.errors import NotFound
from app.memory.conversations import store as conversation_store
from app.memory.conversations.conversation import CONVERSATION_PREFIX
from app.memory.memories import cursors
from app.memory.memories.cursors import ExtractionState

_POLICY = text("SELECT enabled, model, since FROM memory_policy WHERE namespace = :namespace")
_SET_POLICY = text("""
    INSERT INTO memory_policy (namespace, enabled, model) VALUES (:namespace, :enabled, :model)
    ON CONFLICT (namespace) DO UPDATE SET enabled = :enabled, model = :model,
        since = CASE WHEN memory_policy.enabled IS NOT DISTINCT FROM CAST(:enabled AS boolean)
                     THEN memory_policy.since ELSE now() END
""")
_SET_CONVERSATION = text("""
    INSERT INTO memory_extraction (conversation_id, namespace, enabled, last_seq, last_at, read_through, read_offset,
                                   failures, error, skipped, runs, proposed, written, tokens_in, tokens_out)
    VALUES (:id, :namespace, :enabled, :last_seq, :last_at, :read_through, 0, 0, '', 0, 0, 0, 0, 0, 0)
    ON CONFLICT (conversation_id) DO UPDATE SET enabled = :enabled, last_seq = :last_seq, last_at = :last_at,
        read_through = CASE WHEN memory_extraction.enabled IS NOT DISTINCT FROM true
                            THEN memory_extraction.read_through
                            ELSE GREATEST(memory_extraction.read_through, :read_through) END
""")
_TOTALS = text("""
    SELECT count(*) AS conversations, count(*) FILTER (WHERE error <> '') AS failing,
           count(run_id) AS in_progress, COALESCE(sum(skipped), 0) AS skipped, COALESCE(sum(runs), 0) AS runs,
           COALESCE(sum(proposed), 0) AS proposed, COALESCE(sum(written), 0) AS written,
           COALESCE(sum(tokens_in), 0) AS tokens_in, COALESCE(sum(tokens_out), 0) AS tokens_out
    FROM memory_extraction WHERE namespace = :namespace
""")
_REFUSED = """
    SELECT id, namespace, user_name AS "user", conversation_id, run_id, kind, text, reason, detail, created_at
    FROM memory_refusal WHERE {conditions} ORDER BY id DESC LIMIT :limit
"""
_REASONS = text("""
    SELECT reason, count(*) AS count FROM memory_refusal
    WHERE CAST(:namespace AS text) IS NULL OR namespace = :namespace GROUP BY reason ORDER BY count DESC, reason
""")


@dataclass(frozen=True, slots=True)
class ExtractionTotals:
    """The extractions of a namespace, counted."""

    conversations: int
    #: Conversations whose last extraction failed, and those that are being read now.
    failing: int
    in_progress: int
    #: Parts that no model could answer.
    skipped: int
    runs: int
    proposed: int
    written: int
    tokens_in: int
    tokens_out: int


@dataclass(frozen=True, slots=True)
class ExtractionPolicy:
    """What a namespace has chosen; None: as the settings have it."""

    enabled: bool | None = None
    model: str | None = None
    #: Messages from before are not read.
    since: datetime | None = None


@dataclass(frozen=True, slots=True)
class RefusedMemory:
    """A memory that a model proposed and the gate refused."""

    id: UUID
    namespace: str
    user: str | None
    conversation_id: UUID
    run_id: UUID
    kind: str
    text: str
    reason: str
    detail: str
    created_at: datetime


def policy_of(database: Database, namespace: str) -> tuple[ExtractionPolicy, ExtractionTotals]:
    """Return what a namespace has chosen, and its counts."""
    with database.work() as work:
        found = work.row_of(ExtractionPolicy, _POLICY, {"namespace": namespace})
        row = work.row(_TOTALS, {"namespace": namespace})
    assert row is not None, "an aggregate has one row"
    totals = ExtractionTotals(**{name: int(value) for name, value in row._asdict().items()})
    return found or ExtractionPolicy(), totals


def set_policy(database: Database, namespace: str, *, enabled: bool | None, model: str | None) -> None:
    """Write what a namespace has chosen."""
    with database.work() as work:
        work.execute(_SET_POLICY, {"namespace": namespace, "enabled": enabled, "model": model})


def of_conversation(database: Database, shown: str, namespace: str | None) -> ExtractionState | None:
    """Return how far a conversation was read; None when it never was. Raises NotFound."""
    with database.work() as work:
        return cursors.find(work, _require(work, shown, namespace)[0])


def set_conversation(
    database: Database, shown: str, namespace: str | None, *, enabled: bool | None, from_start: bool = False
) -> ExtractionState:
    """
    Write what was chosen for a conversation. What was said before is read only with `from_start`.

    Raises NotFound.
    """
    with database.work() as work:
        id_, of, last_seq, last_at = _require(work, shown, namespace)
        values = {
            "id": id_,
            "namespace": of,
            "enabled": enabled,
            "last_seq": last_seq,
            "last_at": last_at,
            "read_through": 0 if from_start else last_seq,
        }
        work.execute(_SET_CONVERSATION, values)
        found = cursors.find(work, id_)
    assert found is not None, "it was written"
    return found


def refused(
    database: Database,
    namespace: str | None,
    *,
    reason: str | None = None,
    after: UUID | None = None,
    limit: int = 100,
) -> tuple[Sequence[RefusedMemory], dict[str, int]]:
    """Return refused memories, the newest first, and the counts of all of them by reason."""
    conditions = ["true"]
    for condition, value in (
        ("namespace = :namespace", namespace),
        ("reason = :reason", reason),
        ("id < :after", after),
    ):
        if value is not None:
            conditions.append(condition)
    values: dict[str, Any] = {"namespace": namespace, "reason": reason, "after": after, "limit": limit}
    with database.work() as work:
        found = work.rows_of(RefusedMemory, text(_REFUSED.format(conditions=" AND ".join(conditions))), values)
        counts = {row.reason: row.count for row in work.rows(_REASONS, {"namespace": namespace})}
    return found, counts


def _require(work: UnitOfWork, shown: str, namespace: str | None) -> tuple[UUID, str, int, datetime]:
    id_ = parsed_id(shown, CONVERSATION_PREFIX)
    found = None if id_ is None else conversation_store.find(work, id_)
    if found is None or (namespace is not None and found.namespace != namespace):
        raise NotFound("conversation", shown[:100])
    return found.id, found.namespace, found.next_seq - 1, found.updated_at
