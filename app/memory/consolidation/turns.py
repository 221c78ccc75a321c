"""
The turns and events of a namespace, with their vectors, in the order in which they were written.

A turn is a part of a message that a user wrote. An event is a memory that is no pattern and was noted by hand or by a
run: memories that were extracted from messages would count what was said twice.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import text

from app.kernel.database import UnitOfWork
from app.memory.recall.vectors import RecallModel

#: What is read: see above.
_READ = """
    (passage.source = 'message' AND passage.role = 'user'
     OR passage.source = 'memory' AND passage.kind <> 'pattern' AND NOT EXISTS (
         SELECT FROM memory_source
         WHERE memory_source.origin = 'message'
           AND memory_source.memory_id = CAST(substr(passage.source_id, 5) AS uuid)
     ))
"""
_TURN = """
    passage.id, passage.owner, passage.conversation, passage.source, passage.source_id, passage.text, passage.at
"""
_NEW = text(f"""
    SELECT passage.id FROM passage
    WHERE passage.namespace = :namespace AND passage.id > :after AND passage.id <= :through AND {_READ}
    ORDER BY passage.id LIMIT :limit
""")
_LEFTOVERS = text("""
    SELECT passage_id, rounds FROM consolidation_leftover WHERE namespace = :namespace
    ORDER BY passage_id DESC LIMIT :limit
""")
_WITH_VECTORS = text(f"""
    SELECT {_TURN}, CAST(passage_vector.vector AS text) AS vector
    FROM passage JOIN passage_vector ON passage_vector.passage_id = passage.id AND passage_vector.model_id = :model
    WHERE passage.id = ANY(:ids) AND passage.namespace = :namespace ORDER BY passage.id
""")
_WITHOUT_VECTOR = text("""
    SELECT count(*) AS count FROM passage
    WHERE passage.id = ANY(:ids)
      AND NOT EXISTS (SELECT FROM passage_vector WHERE passage_id = passage.id AND model_id = :model)
      AND NOT EXISTS (SELECT FROM passage_pending WHERE passage_id = passage.id AND problem IS NOT NULL)
""")
_OF = text(f"SELECT {_TURN}, '' AS vector FROM passage WHERE id = ANY(:ids) AND namespace = :namespace ORDER BY id")
# Every transaction that takes numbers of passages has written a message or a memory before, so it has an id.
_HORIZON = text("""
    SELECT COALESCE((SELECT max(id) FROM passage WHERE namespace = :namespace), 0) AS through,
           CAST(CAST(pg_snapshot_xmax(pg_current_snapshot()) AS text) AS bigint) AS horizon
""")
_OLDEST = text("SELECT CAST(CAST(pg_snapshot_xmin(pg_current_snapshot()) AS text) AS bigint) AS oldest")


@dataclass(frozen=True, slots=True)
class ReadTurn:
    """A turn or an event."""

    #: The number of its passage.
    id: int
    #: Its user; empty for none.
    owner: str
    conversation: str | None
    source: str
    source_id: str
    text: str
    at: datetime
    #: As JSON.
    vector: str


def horizon(work: UnitOfWork, namespace: str) -> tuple[int, int]:
    """Return the last passage of a namespace, and the transaction from which on others may still write earlier ones."""
    row = work.row(_HORIZON, {"namespace": namespace})
    assert row is not None, "it selects values"
    return int(row.through), int(row.horizon)


def is_settled(work: UnitOfWork, horizon: int) -> bool:
    """Whether all transactions that are older than a horizon have ended."""
    row = work.row(_OLDEST)
    assert row is not None, "it selects a value"
    return int(row.oldest) >= horizon


def new_ids(work: UnitOfWork, namespace: str, after: int, through: int, limit: int) -> list[int]:
    """Return the turns above `after` and up to `through`, at most `limit`, the oldest first."""
    values = {"namespace": namespace, "after": after, "through": through, "limit": limit}
    return [row.id for row in work.rows(_NEW, values)]


def leftovers(work: UnitOfWork, namespace: str, limit: int) -> dict[int, int]:
    """Return the newest turns that were in no cluster, each with how often it was read."""
    return {row.passage_id: row.rounds for row in work.rows(_LEFTOVERS, {"namespace": namespace, "limit": limit})}


def without_vector(work: UnitOfWork, wanted: Collection[int], model: RecallModel) -> int:
    """Return how many of these turns will get a vector and have none yet."""
    row = work.row(_WITHOUT_VECTOR, {"ids": list(wanted), "model": model.id})
    assert row is not None, "a count has a row"
    return int(row.count)


def with_vectors(work: UnitOfWork, namespace: str, wanted: Collection[int], model: RecallModel) -> list[ReadTurn]:
    """Return those of these turns that are there and have a vector, the oldest first."""
    values = {"ids": list(wanted), "namespace": namespace, "model": model.id}
    return work.rows_of(ReadTurn, _WITH_VECTORS, values)


def all_of(work: UnitOfWork, namespace: str, wanted: Sequence[int]) -> dict[int, ReadTurn]:
    """Return those of these turns that are there, without their vectors."""
    values: dict[str, Any] = {"ids": list(wanted), "namespace": namespace}
    return {turn.id: turn for turn in work.rows_of(ReadTurn, _OF, values)}
