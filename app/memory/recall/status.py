"""What can be recalled, and how far the vectors are behind."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import text

from app.kernel.database import Database
from app.memory.recall import vectors
from app.memory.recall.vectors import RecallModel

#: Passages up to which they are counted, those that are refused included.
MOST_COUNTED, _MOST_REFUSED = 10_000, 1_000

_OF = "(CAST(:namespace AS text) IS NULL OR passage.namespace = :namespace)"
_COUNT = text(f"SELECT count(*) AS count FROM (SELECT FROM passage WHERE {_OF} LIMIT {MOST_COUNTED + 1}) AS within")
_ESTIMATE = text(f"EXPLAIN (FORMAT JSON) SELECT FROM passage WHERE {_OF}")
_WAITING = text(f"""
    SELECT count(*) AS count, COALESCE(now() - min(created_at), interval '0') AS lag FROM (
        SELECT passage.created_at FROM passage_pending JOIN passage ON passage.id = passage_pending.passage_id
        WHERE passage_pending.problem IS NULL AND {_OF} ORDER BY passage_pending.passage_id LIMIT {MOST_COUNTED}
    ) AS within
""")
_REFUSED = text(f"""
    SELECT count(*) AS count FROM (
        SELECT FROM passage_pending JOIN passage ON passage.id = passage_pending.passage_id
        WHERE passage_pending.problem IS NOT NULL AND {_OF} LIMIT {_MOST_REFUSED}
    ) AS within
""")


@dataclass(frozen=True, slots=True)
class RecallStatus:
    """What can be recalled in a namespace, or in all."""

    passages: int
    #: Whether they were counted; otherwise it is the planner's estimate.
    is_exact: bool
    #: Those that have no vector yet, at most `MOST_COUNTED`, and for how long the oldest has had none.
    waiting: int
    lag: timedelta
    #: Those of which no vector can be made.
    refused: int
    models: tuple[RecallModel, ...]


def read(database: Database, namespace: str | None) -> RecallStatus:
    """Return the status of a namespace; None: of all."""
    values = {"namespace": namespace}
    with database.work() as work:
        counted, waiting, refused = (work.row(statement, values) for statement in (_COUNT, _WAITING, _REFUSED))
        assert counted is not None, "a count has a row"
        assert waiting is not None, "as above"
        assert refused is not None, "as above"
        passages = counted.count
        if passages > MOST_COUNTED:
            plan: Any = work.rows(_ESTIMATE, values)[0][0]
            document = json.loads(plan) if isinstance(plan, str) else plan
            passages = max(passages, int(document[0]["Plan"]["Plan Rows"]))
        models = tuple(vectors.all_models(work))
    return RecallStatus(passages, counted.count <= MOST_COUNTED, waiting.count, waiting.lag, refused.count, models)
