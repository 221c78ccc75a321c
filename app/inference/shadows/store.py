"""
The statements on shadows and their pairs.

Ended runs are read again over the last minute, because a run is seen when its transaction has committed; a run becomes
a pair once.
"""

from __future__ import annotations

import json
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.inference.direct import STEP
from app.inference.shadows.definition import ShadowDefinition
from app.inference.shadows.pairing import SHADOW_LABEL
from app.inference.shadows.rows import PairState, ShadowState, StoredPair, StoredShadow
from app.kernel.database import UnitOfWork

#: The workflow of calls (`app.inference.direct`).
_CALLS = "openai"
_AGAIN = "60 seconds"
_COLUMNS = "id, name, definition, state, author, created_at, ended_at, reason"
_PAIR = "run_id, candidate_run_id, state, reason, result, at"
#: Parts of the hash by which runs are sampled.
_PARTS = 1_048_576

_LOCK = text("SELECT pg_advisory_xact_lock(7205759403812)")
_INSERT = text(f"""
    INSERT INTO shadow (id, name, definition, state, author)
    VALUES (:id, :name, CAST(:definition AS json), 'running', :author) RETURNING {_COLUMNS}
""")
_GET = text(f"SELECT {_COLUMNS} FROM shadow WHERE name = :name")
_LOCK_NAMED = text(f"SELECT {_COLUMNS} FROM shadow WHERE name = :name FOR UPDATE")
_LIST = text(f"SELECT {_COLUMNS} FROM shadow ORDER BY (state = 'running') DESC, created_at DESC LIMIT :limit")
_RUNNING = text(f"SELECT {_COLUMNS} FROM shadow WHERE state = 'running' ORDER BY id")
_WITH_OPEN = text(f"""
    SELECT {_COLUMNS} FROM shadow
    WHERE EXISTS (SELECT FROM shadow_pair WHERE shadow_id = shadow.id AND state = 'open') ORDER BY id
""")
_END = text("""
    UPDATE shadow SET state = :state, reason = :reason, ended_at = now() WHERE id = :id AND state = 'running'
""")
_DELETE = text("DELETE FROM shadow WHERE id = :id")
_LOCK_ONE = text(f"SELECT {_COLUMNS} FROM shadow WHERE id = :id AND state = 'running' FOR UPDATE SKIP LOCKED")
_READ = text("UPDATE shadow SET read_at = now() WHERE id = :id")
_SAMPLED = f"""
    SELECT run.id FROM run JOIN shadow ON shadow.id = :id {{join}}
    WHERE run.finished_at > GREATEST(shadow.read_at - interval '{_AGAIN}', shadow.created_at)
      AND run.state = 'succeeded' AND run.parent_step_id IS NULL AND run.workflow = :workflow
      AND NOT jsonb_exists(run.labels, '{SHADOW_LABEL}')
      AND (cardinality(CAST(:namespaces AS text[])) = 0 OR run.namespace = ANY(:namespaces))
      AND (hashtextextended(run.id::text, 0) & {_PARTS - 1}) < :parts
      AND NOT EXISTS (SELECT FROM shadow_pair WHERE shadow_id = :id AND run_id = run.id)
    ORDER BY run.finished_at LIMIT :limit
"""
_CALLS_SAMPLED = text(
    _SAMPLED.format(join=f"JOIN step ON step.run_id = run.id AND step.key = '{STEP}' AND step.model = :model")
)
_RUNS_SAMPLED = text(_SAMPLED.format(join=""))
_PUT_PAIR = text("""
    INSERT INTO shadow_pair (shadow_id, run_id, candidate_run_id, state, reason)
    VALUES (:shadow, :run, :candidate, :state, :reason) ON CONFLICT DO NOTHING
""")
_OPEN = text("SELECT count(*) AS count FROM shadow_pair WHERE shadow_id = :id AND state = 'open'")
_ENDED = text(f"""
    SELECT {", ".join(f"shadow_pair.{name.strip()}" for name in _PAIR.split(","))} FROM shadow_pair
    LEFT JOIN run ON run.id = candidate_run_id
    WHERE shadow_id = :id AND shadow_pair.state = 'open' AND (run.id IS NULL OR run.finished_at IS NOT NULL)
    ORDER BY at LIMIT :limit
""")
_CLOSE = text("""
    UPDATE shadow_pair SET state = :state, reason = :reason, result = CAST(:result AS json)
    WHERE shadow_id = :shadow AND run_id = :run AND state = 'open'
""")
_COUNTS = text("""
    SELECT state, reason, count(*) AS count FROM shadow_pair WHERE shadow_id = :id GROUP BY state, reason
""")
_RESULTS = text("""
    SELECT result FROM shadow_pair WHERE shadow_id = :id AND state = 'compared' ORDER BY at DESC LIMIT :limit
""")
_PAIRS = text(f"""
    SELECT {_PAIR} FROM shadow_pair WHERE shadow_id = :id ORDER BY at DESC, run_id LIMIT :limit OFFSET :offset
""")


def lock_all(work: UnitOfWork) -> None:
    """Let no other shadow begin until the end of the transaction."""
    work.execute(_LOCK)


def insert(work: UnitOfWork, id_: UUID, definition: ShadowDefinition, author: str) -> StoredShadow:
    """Store a shadow, which runs from now on."""
    document = json.dumps(definition.model_dump(mode="json", exclude_defaults=True))
    values = {"id": id_, "name": definition.shadow, "definition": document, "author": author}
    found = work.row_of(StoredShadow, _INSERT, values)
    assert found is not None, "an insert returns its row"
    return found


def get(work: UnitOfWork, name: str, *, lock: bool = False) -> StoredShadow | None:
    """Return a shadow, or None."""
    return work.row_of(StoredShadow, _LOCK_NAMED if lock else _GET, {"name": name})


def page(work: UnitOfWork, limit: int) -> list[StoredShadow]:
    """Return shadows: those that run, then the latest."""
    return work.rows_of(StoredShadow, _LIST, {"limit": limit})


def running(work: UnitOfWork) -> list[StoredShadow]:
    """Return the shadows that run."""
    return work.rows_of(StoredShadow, _RUNNING)


def with_open_pairs(work: UnitOfWork) -> list[StoredShadow]:
    """Return the shadows of which pairs are open, also when they have ended."""
    return work.rows_of(StoredShadow, _WITH_OPEN)


def lock_running(work: UnitOfWork, id_: UUID) -> StoredShadow | None:
    """Return a shadow for changes; None when it has ended, or another process works on it."""
    return work.row_of(StoredShadow, _LOCK_ONE, {"id": id_})


def end(work: UnitOfWork, id_: UUID, state: ShadowState, reason: str) -> bool:
    """End a shadow; False when it has ended before."""
    return work.run(_END, {"id": id_, "state": state, "reason": reason[:1_000]}) == 1


def delete(work: UnitOfWork, id_: UUID) -> None:
    """Remove a shadow with its pairs."""
    work.run(_DELETE, {"id": id_})


def sampled(work: UnitOfWork, id_: UUID, given: ShadowDefinition, model: str | None, limit: int) -> list[UUID]:
    """Return ended runs that are to be done again, and notes up to when they were read."""
    values = {
        "id": id_,
        "workflow": given.workflow if given.workflow is not None else _CALLS,
        "namespaces": list(given.namespaces),
        "parts": round(float(given.share) * _PARTS),
        "limit": limit,
    }
    statement = _RUNS_SAMPLED if model is None else _CALLS_SAMPLED
    found = [row.id for row in work.rows(statement, values | ({} if model is None else {"model": model}))]
    if len(found) < limit:
        work.run(_READ, {"id": id_})
    return found


def put_pair(
    work: UnitOfWork, shadow: UUID, run: UUID, candidate: UUID | None, state: PairState, reason: str = ""
) -> bool:
    """Store a pair; False when the run is one already."""
    values = {"shadow": shadow, "run": run, "candidate": candidate, "state": state, "reason": reason[:500]}
    return work.run(_PUT_PAIR, values) == 1


def count_open(work: UnitOfWork, id_: UUID) -> int:
    """Return how many runs of the candidate wait or run."""
    return int(work.rows(_OPEN, {"id": id_})[0].count)


def ended_pairs(work: UnitOfWork, id_: UUID, limit: int) -> list[StoredPair]:
    """Return pairs whose candidate has ended, and that are not compared yet."""
    return work.rows_of(StoredPair, _ENDED, {"id": id_, "limit": limit})


def close_pair(
    work: UnitOfWork, shadow: UUID, run: UUID, state: PairState, result: dict[str, Any] | None, reason: str = ""
) -> None:
    """Store how a pair compares, or why it does not."""
    content = None if result is None else json.dumps(result)
    work.run(_CLOSE, {"shadow": shadow, "run": run, "state": state, "reason": reason[:500], "result": content})


def counts(work: UnitOfWork, id_: UUID) -> list[tuple[PairState, str, int]]:
    """Return how many pairs there are, by state and reason."""
    return [(PairState(row.state), row.reason, row.count) for row in work.rows(_COUNTS, {"id": id_})]


def results(work: UnitOfWork, id_: UUID, limit: int) -> list[dict[str, Any]]:
    """Return what the newest pairs compare to."""
    return [row.result for row in work.rows(_RESULTS, {"id": id_, "limit": limit})]


def pairs(work: UnitOfWork, id_: UUID, limit: int, offset: int) -> list[StoredPair]:
    """Return pairs, the newest first."""
    return work.rows_of(StoredPair, _PAIRS, {"id": id_, "limit": limit, "offset": offset})
