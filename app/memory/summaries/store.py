"""
The statements on summaries and windows. Every function runs in a transaction of its caller.

Both belong to a revision of their conversation: once a message of it was deleted, what was made before is not used.
"""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import text

from app.kernel import ids
from app.kernel.database import UnitOfWork
from app.memory.assembly.window import PromptWindow
from app.memory.summaries.summary import NewSummary, StoredSummary

_COLUMNS = """
    id, conversation_id, revision, first_seq, upto_seq, previous_id, model, text, tokens, sentences_removed,
    identifiers_added, identifiers_missing, run_id, created_at
"""
_INSERT = text(f"""
    INSERT INTO conversation_summary ({_COLUMNS.replace(", created_at", "")})
    SELECT :id, :conversation_id, :revision, :first_seq, :upto_seq, :previous_id, :model, :text, :tokens,
           :sentences_removed, :identifiers_added, :identifiers_missing, :run_id
    FROM conversation WHERE id = :conversation_id AND revision = :revision
    ON CONFLICT (conversation_id, revision, upto_seq) DO NOTHING
    RETURNING {_COLUMNS}
""")
_LATEST = text(f"""
    SELECT {_COLUMNS} FROM conversation_summary
    WHERE conversation_id = :conversation_id AND revision = :revision AND upto_seq <= :upto
    ORDER BY upto_seq DESC LIMIT :limit
""")
_AT = text(f"""
    SELECT {_COLUMNS} FROM conversation_summary
    WHERE conversation_id = :conversation_id AND revision = :revision AND upto_seq = :upto
""")
_WINDOW = text("""
    SELECT first_seq, summarised_upto, tokens_before FROM conversation_window
    WHERE conversation_id = :conversation_id AND model = :model AND revision = :revision
""")
_KEEP_WINDOW = text("""
    INSERT INTO conversation_window (conversation_id, model, revision, first_seq, summarised_upto, tokens_before)
    VALUES (:conversation_id, :model, :revision, :first_seq, :summarised_upto, :tokens_before)
    ON CONFLICT (conversation_id, model) DO UPDATE SET
        revision = EXCLUDED.revision, first_seq = EXCLUDED.first_seq, summarised_upto = EXCLUDED.summarised_upto,
        tokens_before = EXCLUDED.tokens_before, updated_at = now()
    WHERE conversation_window.revision < EXCLUDED.revision OR conversation_window.first_seq < EXCLUDED.first_seq
       OR conversation_window.summarised_upto <> EXCLUDED.summarised_upto
""")
_FORGET_SUMMARIES = text("DELETE FROM conversation_summary WHERE conversation_id = :conversation_id")
_FORGET_WINDOWS = text("DELETE FROM conversation_window WHERE conversation_id = :conversation_id")

#: A place behind every message.
_END = 2**62


def put_in(work: UnitOfWork, new: NewSummary) -> StoredSummary | None:
    """
    Store a summary. Returns the one that stands at its place: another attempt may have stored it before.

    None when the conversation was deleted or changed since its messages were read.
    """
    values = {name: getattr(new, name) for name in NewSummary.__slots__}
    stored = work.row_of(StoredSummary, _INSERT, {"id": ids.new_id(), **values})
    place = {"conversation_id": new.conversation_id, "revision": new.revision, "upto": new.upto_seq}
    return stored or work.row_of(StoredSummary, _AT, place)


def latest(
    work: UnitOfWork, conversation_id: UUID, revision: int, *, upto: int = _END, limit: int = 1
) -> list[StoredSummary]:
    """Return the last summaries that cover the conversation at most up to a place, the last one first."""
    given = {"conversation_id": conversation_id, "revision": revision, "upto": upto, "limit": limit}
    return work.rows_of(StoredSummary, _LATEST, given)


def at(work: UnitOfWork, conversation_id: UUID, revision: int, upto: int) -> StoredSummary | None:
    """Return the summary that covers the conversation up to this place, or None."""
    given = {"conversation_id": conversation_id, "revision": revision, "upto": upto}
    return work.row_of(StoredSummary, _AT, given)


def window(work: UnitOfWork, conversation_id: UUID, revision: int, model: str) -> PromptWindow | None:
    """Return the window of the last prompt of a model, or None."""
    row = work.row(_WINDOW, {"conversation_id": conversation_id, "revision": revision, "model": model})
    return None if row is None else PromptWindow(row.first_seq, 0, row.summarised_upto, row.tokens_before)


def keep_window(work: UnitOfWork, conversation_id: UUID, revision: int, model: str, kept: PromptWindow) -> None:
    """Store the window of a prompt. Of two at the same time the later one in the conversation stays."""
    work.execute(
        _KEEP_WINDOW,
        {
            "conversation_id": conversation_id,
            "revision": revision,
            "model": model,
            "first_seq": kept.first_seq,
            "summarised_upto": kept.summarised_upto,
            "tokens_before": kept.tokens_before,
        },
    )


def forget_in(work: UnitOfWork, conversation_id: UUID) -> int:
    """Delete all summaries and windows of a conversation. Returns how many summaries there were."""
    work.execute(_FORGET_WINDOWS, {"conversation_id": conversation_id})
    return work.run(_FORGET_SUMMARIES, {"conversation_id": conversation_id})
