"""How many steps wait for each model, by class, and since when the oldest does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import text

from app.kernel.database import Database

_LENGTHS = """
    SELECT step.model, step.priority, count(*) AS waiting, min(COALESCE(step.ready_at, step.published_at)) AS oldest
    FROM step {joined} WHERE step.state = 'ready' AND step.model IS NOT NULL GROUP BY step.model, step.priority
"""
_ALL = text(_LENGTHS.format(joined=""))
_OF = text(_LENGTHS.format(joined="JOIN run ON run.id = step.run_id AND run.namespace = :namespace"))


@dataclass(frozen=True, slots=True)
class ClassLength:
    """What waits for a model in one class."""

    waiting: int
    #: When the oldest became ready; None when that is not known.
    oldest: datetime | None


def read(database: Database, namespace: str | None = None) -> Mapping[tuple[str, str], ClassLength]:
    """By model and class, what waits; of one namespace, or of all."""
    with database.work() as work:
        rows = work.rows(_ALL if namespace is None else _OF, {} if namespace is None else {"namespace": namespace})
    return {(row.model, row.priority): ClassLength(row.waiting, row.oldest) for row in rows}
