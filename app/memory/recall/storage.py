"""
The statements that write passages and remove them.

Each is one statement in the transaction of whoever writes the source, and needs no model: a passage is found by its
words at the commit, and by its meaning once the job of embeddings has made its vector.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import text

from app.kernel.database import UnitOfWork
from app.memory.recall.passages import NewPassage, SourceKind, lexemes_of, parts_of
from app.memory.recall.scopes import PART_BITS

_PUT = text("""
    WITH given AS MATERIALIZED (
        SELECT * FROM jsonb_to_recordset(CAST(:passages AS jsonb)) AS given
        (namespace text, owner text, conversation text, source text, source_id text, part integer, thread text,
         place bigint, text text, role text, speaker text, kind text, at timestamptz, length integer, lexemes text)
    ), replaced AS (
        DELETE FROM passage USING jsonb_to_recordset(CAST(:sources AS jsonb))
               AS source(namespace text, source text, source_id text)
        WHERE passage.namespace = source.namespace AND passage.source_id = source.source_id
          AND passage.source = source.source
    ), written AS (
        INSERT INTO passage (namespace, owner, conversation, source, source_id, part, thread, place, text, role,
                             speaker, kind, at, length, lexemes)
        SELECT namespace, owner, conversation, source, source_id, part, thread, place, text, role, speaker, kind,
               COALESCE(at, now()), length, CAST(lexemes AS tsvector)
        FROM given ORDER BY thread, place
        RETURNING id
    )
    INSERT INTO passage_pending (passage_id) SELECT id FROM written
""")
_REMOVE = text("""
    DELETE FROM passage WHERE namespace = :namespace AND source = :source AND source_id = ANY(:source_ids)
""")
_REMOVE_CONVERSATIONS = text("""
    DELETE FROM passage WHERE namespace = :namespace AND thread = ANY(:conversations) AND conversation IS NOT NULL
""")
_REMOVE_USER = text("DELETE FROM passage WHERE namespace = :namespace AND owner = :owner")


def put_in(work: UnitOfWork, passages: Sequence[NewPassage]) -> None:
    """
    Write passages in a transaction of the caller. What was written of the same sources before is replaced.

    A text of blanks has no passages. Two transactions that write the same source at once must lock it themselves.
    """
    if not passages:
        return
    rows = [row for passage in passages for row in _rows_of(passage)]
    sources = {(one.namespace, one.source.value, one.source_id) for one in passages}
    named = [dict(zip(("namespace", "source", "source_id"), source, strict=True)) for source in sorted(sources)]
    work.execute(_PUT, {"passages": json.dumps(rows), "sources": json.dumps(named)})


def remove_in(work: UnitOfWork, namespace: str, source: SourceKind, source_ids: Sequence[str]) -> None:
    """Remove the passages of sources, with their vectors, in a transaction of the caller."""
    work.execute(_REMOVE, {"namespace": namespace, "source": source.value, "source_ids": list(source_ids)})


def remove_conversations_in(work: UnitOfWork, namespace: str, conversations: Sequence[str]) -> None:
    """Remove all passages of conversations, whatever their sources."""
    work.execute(_REMOVE_CONVERSATIONS, {"namespace": namespace, "conversations": list(conversations)})


def remove_user_in(work: UnitOfWork, namespace: str, user: str) -> None:
    """Remove all passages of a user of a namespace."""
    if not user:
        raise ValueError("an empty user means the namespace")
    work.execute(_REMOVE_USER, {"namespace": namespace, "owner": user})


def _rows_of(passage: NewPassage) -> list[dict[str, Any]]:
    found = []
    for number, part in enumerate(parts_of(passage.text)):
        lexemes, length = lexemes_of(passage, part)
        row = {
            "namespace": passage.namespace,
            "owner": passage.user or "",
            "conversation": passage.conversation,
            "source": passage.source.value,
            "source_id": passage.source_id,
            "part": number,
            "thread": passage.conversation or passage.source_id,
            "place": (passage.position << PART_BITS) + number,
            "text": part,
            "role": passage.role,
            "speaker": passage.speaker,
            "kind": passage.kind,
            "at": None if passage.at is None else passage.at.isoformat(),
            "length": length,
            "lexemes": lexemes,
        }
        found.append(row)
    return found
