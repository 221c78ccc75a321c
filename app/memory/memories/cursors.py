"""
The statements on extractions: which conversations have new messages, how far they were read, and what was refused.

A conversation is found by the instant of its last message, not by looking at all of them. The watermark overlaps by
`_OVERLAP`, because a transaction that appended before it may commit after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.kernel import ids
from app.kernel.database import UnitOfWork
from app.memory.memories.memory import Memory
from app.memory.memories.store import COLUMNS

_OVERLAP = timedelta(minutes=2)
#: Conversations that one statement looks at.
_PAGE = 500

_SEEN = text("""
    SELECT now() AS now, COALESCE((SELECT seen FROM memory_watermark WHERE name = 'conversations'), now()) AS seen
""")
_SET_SEEN = text("""
    INSERT INTO memory_watermark (name, seen) VALUES ('conversations', :seen)
    ON CONFLICT (name) DO UPDATE SET seen = GREATEST(memory_watermark.seen, EXCLUDED.seen)
""")
_CHANGED = text("""
    SELECT id, updated_at FROM conversation WHERE (updated_at, id) > (:at, :id) ORDER BY updated_at, id LIMIT :limit
""")
# A namespace has its messages read from when it turned extraction on; one by the settings, from the start.
_NOTE = text("""
    INSERT INTO memory_extraction (conversation_id, namespace, last_seq, last_at, read_through, read_offset, failures,
                                   error, skipped, runs, proposed, written, tokens_in, tokens_out)
    SELECT changed.id, changed.namespace, changed.next_seq - 1, changed.updated_at,
           CASE WHEN known.conversation_id IS NULL AND policy.enabled THEN (
               SELECT COALESCE(max(seq), 0) FROM conversation_message
               WHERE conversation_id = changed.id AND created_at < policy.since
           ) ELSE 0 END, 0, 0, '', 0, 0, 0, 0, 0, 0
    FROM conversation AS changed
    LEFT JOIN memory_policy AS policy ON policy.namespace = changed.namespace
    LEFT JOIN memory_extraction AS known ON known.conversation_id = changed.id
    WHERE changed.id = ANY(:ids) AND COALESCE(known.enabled, policy.enabled, :default)
    ORDER BY changed.id
    ON CONFLICT (conversation_id) DO UPDATE
    SET last_seq = GREATEST(memory_extraction.last_seq, EXCLUDED.last_seq), last_at = EXCLUDED.last_at
""")
_EXTRACTION = """
    conversation_id, namespace, enabled, last_seq, last_at, read_through, read_offset, run_id, run_through, run_offset,
    failures, error, skipped, runs, proposed, written, tokens_in, tokens_out
"""
_IN_FLIGHT = text("SELECT count(*) AS count FROM memory_extraction WHERE run_id IS NOT NULL")
_ENDED = text("""
    SELECT conversation_id, run_id FROM memory_extraction AS reading LEFT JOIN run ON run.id = reading.run_id
    WHERE run_id IS NOT NULL AND (run.id IS NULL OR run.finished_at IS NOT NULL) ORDER BY conversation_id LIMIT 100
""")
_PENDING = text("""
    SELECT conversation_id FROM memory_extraction
    WHERE run_id IS NULL AND last_seq > read_through AND (retry_at IS NULL OR retry_at <= now())
      AND (last_at <= now() - CAST(:quiet AS interval) OR last_seq - read_through >= :messages)
    ORDER BY last_at LIMIT :limit
""")
_GET = text(f"SELECT {_EXTRACTION} FROM memory_extraction WHERE conversation_id = :id")
_LOCK = text(f"SELECT {_EXTRACTION} FROM memory_extraction WHERE conversation_id = :id FOR UPDATE")
_BEGIN = text("""
    UPDATE memory_extraction SET run_id = :run_id, run_through = :through, run_offset = :offset
    WHERE conversation_id = :id
""")
_DROP = text("DELETE FROM memory_extraction WHERE conversation_id = :id")
_PASS = text("UPDATE memory_extraction SET read_through = last_seq, read_offset = 0 WHERE conversation_id = :id")
_ADVANCE = text("""
    UPDATE memory_extraction
    SET read_through = run_through, read_offset = run_offset, run_id = NULL, run_through = NULL, run_offset = NULL,
        failures = 0, retry_at = NULL, error = :error, skipped = skipped + :skipped, runs = runs + 1,
        proposed = proposed + :proposed, written = written + :written,
        tokens_in = tokens_in + :tokens_in, tokens_out = tokens_out + :tokens_out
    WHERE conversation_id = :id
""")
_RETRY = text("""
    UPDATE memory_extraction
    SET run_id = NULL, run_through = NULL, run_offset = NULL, failures = failures + 1, error = :error,
        retry_at = now() + CAST(:delay AS interval), runs = runs + 1,
        tokens_in = tokens_in + :tokens_in, tokens_out = tokens_out + :tokens_out
    WHERE conversation_id = :id
""")
_RUN = text("""
    SELECT state, error, (SELECT COALESCE(sum(tokens_in), 0) FROM step WHERE run_id = run.id) AS tokens_in,
           (SELECT COALESCE(sum(tokens_out), 0) FROM step WHERE run_id = run.id) AS tokens_out
    FROM run WHERE id = :id
""")
_KNOWN = text(f"""
    SELECT {COLUMNS} FROM memory WHERE namespace = :namespace AND user_name IS NOT DISTINCT FROM CAST(:user AS text)
    ORDER BY id DESC LIMIT :limit
""")
_REFUSE = text("""
    INSERT INTO memory_refusal (id, namespace, user_name, conversation_id, run_id, kind, text, reason, detail)
    VALUES (:id, :namespace, :user, :conversation_id, :run_id, :kind, :text, :reason, :detail)
""")
_REMOVE_REFUSED = text("""
    DELETE FROM memory_refusal WHERE id IN (
        SELECT id FROM memory_refusal WHERE created_at < now() - CAST(:keep AS interval)
        ORDER BY created_at LIMIT :limit
    )
""")
_IS_ENABLED = text("""
    SELECT COALESCE((SELECT enabled FROM memory_extraction WHERE conversation_id = :id),
                    (SELECT enabled FROM memory_policy WHERE namespace = :namespace), :default) AS enabled,
           (SELECT model FROM memory_policy WHERE namespace = :namespace) AS model
""")


@dataclass(frozen=True, slots=True)
class ExtractionState:
    """How far the extraction of memories from a conversation is; the fields are those of its row."""

    conversation_id: UUID
    namespace: str
    enabled: bool | None
    last_seq: int
    last_at: datetime
    read_through: int
    read_offset: int
    run_id: UUID | None
    run_through: int | None
    run_offset: int | None
    failures: int
    error: str
    skipped: int
    runs: int
    proposed: int
    written: int
    tokens_in: int
    tokens_out: int


@dataclass(frozen=True, slots=True)
class EndedExtraction:
    """The run of an extraction, which has ended."""

    state: str
    error: dict[str, Any] | None
    tokens_in: int
    tokens_out: int


def discover(work: UnitOfWork, *, default: bool) -> int:
    """Note the new messages of conversations whose memory is on; returns how many conversations were looked at."""
    row = work.row(_SEEN)
    assert row is not None, "it selects values"
    at, last, looked = row.seen - _OVERLAP, UUID(int=0), 0
    while True:
        changed = work.rows(_CHANGED, {"at": at, "id": last, "limit": _PAGE})
        if changed:
            work.execute(_NOTE, {"ids": [one.id for one in changed], "default": default})
            at, last = changed[-1].updated_at, changed[-1].id
        looked += len(changed)
        if len(changed) < _PAGE:
            break
    work.execute(_SET_SEEN, {"seen": row.now})
    return looked


def ended(work: UnitOfWork) -> list[tuple[UUID, UUID]]:
    """Conversations whose extraction has ended, with its run."""
    return [(row.conversation_id, row.run_id) for row in work.rows(_ENDED)]


def pending(work: UnitOfWork, quiet: timedelta, messages: int, max_parallel: int) -> list[UUID]:
    """Conversations with new messages that are to be read now, as many as may begin; the oldest first."""
    row = work.row(_IN_FLIGHT)
    assert row is not None, "an aggregate has one row"
    values = {"quiet": quiet, "messages": messages, "limit": max(max_parallel - row.count, 0)}
    return [found.conversation_id for found in work.rows(_PENDING, values)]


def find(work: UnitOfWork, id_: UUID, *, lock: bool = False) -> ExtractionState | None:
    """How far a conversation was read; None for one that was never looked at."""
    return work.row_of(ExtractionState, _LOCK if lock else _GET, {"id": id_})


def begin(work: UnitOfWork, id_: UUID, run_id: UUID, through: int, offset: int) -> None:
    """Write the run that reads the next messages, and how far it does."""
    work.execute(_BEGIN, {"id": id_, "run_id": run_id, "through": through, "offset": offset})


def drop(work: UnitOfWork, id_: UUID) -> None:
    """Remove the row of a conversation that is not there."""
    work.execute(_DROP, {"id": id_})


def pass_over(work: UnitOfWork, id_: UUID) -> None:
    """Leave the new messages of a conversation unread."""
    work.execute(_PASS, {"id": id_})


def advance(
    work: UnitOfWork, id_: UUID, run: EndedExtraction, *, proposed: int = 0, written: int = 0, skipped: str = ""
) -> None:
    """Write that messages were read, or `skipped`, with the reason."""
    values = {
        "id": id_,
        "proposed": proposed,
        "written": written,
        "error": skipped,
        "skipped": int(bool(skipped)),
        "tokens_in": run.tokens_in,
        "tokens_out": run.tokens_out,
    }
    work.execute(_ADVANCE, values)


def retry(work: UnitOfWork, id_: UUID, run: EndedExtraction, error: str, delay: timedelta) -> None:
    """Write that the run failed, and when the same messages are read again."""
    values = {"id": id_, "error": error, "delay": delay, "tokens_in": run.tokens_in, "tokens_out": run.tokens_out}
    work.execute(_RETRY, values)


def run_of(work: UnitOfWork, run_id: UUID) -> EndedExtraction | None:
    """The run of an extraction; None when it is not there."""
    row = work.row(_RUN, {"id": run_id})
    return None if row is None else EndedExtraction(row.state, row.error, int(row.tokens_in), int(row.tokens_out))


def known(work: UnitOfWork, namespace: str, user: str | None, limit: int) -> list[Memory]:
    """The newest memories of a scope, also those that hold no more; without their sources."""
    return work.rows_of(Memory, _KNOWN, {"namespace": namespace, "user": user, "limit": limit})


def choice_of(work: UnitOfWork, id_: UUID, namespace: str, *, default: bool) -> tuple[bool, str | None]:
    """Whether a conversation has its memories extracted, and the model that its namespace names."""
    row = work.row(_IS_ENABLED, {"id": id_, "namespace": namespace, "default": default})
    assert row is not None, "it selects values"
    return row.enabled, row.model


def refuse(work: UnitOfWork, refusals: Sequence[dict[str, Any]]) -> None:
    """Write proposals that were refused."""
    if refusals:
        work.execute(_REFUSE, [{**one, "id": ids.new_id()} for one in refusals])


def remove_refused(work: UnitOfWork, keep: timedelta, limit: int = 1_000) -> int:
    """Remove refusals whose retention is over; returns how many."""
    return work.run(_REMOVE_REFUSED, {"keep": keep, "limit": limit})
