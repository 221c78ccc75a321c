"""
The statements on splits, their outcomes, and scores of runs.

The outcomes of a split are those of the runs that its labels name. They are read again and again over the last minute,
because a run is seen when its transaction has committed, which may be after runs that ended later; each is stored once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.inference.splits.assignment import UNIT_LABEL, VARIANT_LABEL
from app.inference.splits.definition import SplitDefinition, SplitMetric
from app.inference.splits.evidence import VariantSample
from app.inference.splits.rows import SplitState, StoredSplit
from app.kernel.database import UnitOfWork
from app.kernel.errors import NotFound

#: How far back outcomes are read again: longer than any transaction stays open.
_AGAIN = "60 seconds"
_COLUMNS = "id, name, definition, state, stage, stage_at, share, author, created_at, ended_at, reason"

_LOCK = text("SELECT pg_advisory_xact_lock(7205759403811)")
_INSERT = text(f"""
    INSERT INTO split (id, name, definition, state, stage, author)
    VALUES (:id, :name, CAST(:definition AS json), 'running', 0, :author) RETURNING {_COLUMNS}
""")
_GET = text(f"SELECT {_COLUMNS} FROM split WHERE name = :name")
_LIST = text(f"SELECT {_COLUMNS} FROM split ORDER BY (state = 'running') DESC, created_at DESC LIMIT :limit")
_RUNNING = text(f"SELECT {_COLUMNS} FROM split WHERE state = 'running' ORDER BY id")
_LOCK_ONE = text(f"SELECT {_COLUMNS} FROM split WHERE id = :id AND state = 'running' FOR UPDATE SKIP LOCKED")
_LOCK_NAMED = text(f"SELECT {_COLUMNS} FROM split WHERE name = :name FOR UPDATE")
_END = text("""
    UPDATE split SET state = :state, reason = :reason, ended_at = now() WHERE id = :id AND state = 'running'
""")
_STAGE = text("UPDATE split SET stage = :stage, stage_at = now(), share = NULL WHERE id = :id AND state = 'running'")
_SHARE = text("UPDATE split SET share = :share WHERE id = :id AND state = 'running'")
_DELETE = text("DELETE FROM split WHERE id = :id")
_DUE = text("SELECT stage_at + make_interval(secs => :hold) <= now() AS due FROM split WHERE id = :id")
_COLLECT = text(f"""
    INSERT INTO split_outcome (split_id, run_id, variant, unit, finished_at, failed, seconds, first_token, score)
    SELECT :id, run.id, run.labels ->> :label, COALESCE(run.labels ->> '{UNIT_LABEL}', run.id::text), run.finished_at,
           run.state = 'failed',
           CASE WHEN run.state = 'succeeded'
                THEN GREATEST(extract(epoch FROM run.finished_at - run.created_at), 0.001)::float END,
           CASE WHEN run.state = 'succeeded' THEN (
               SELECT GREATEST(min(first_token_ms), 1) / 1000.0 FROM attempt JOIN step ON step.id = attempt.step_id
               WHERE step.run_id = run.id AND attempt.outcome = 'succeeded'
           ) END,
           (SELECT avg((output ->> 'score')::float) FROM step
            WHERE step.run_id = run.id AND kind IN ('verify', 'refine', 'ensemble')
              AND json_typeof(output) = 'object' AND json_typeof(output -> 'score') = 'number')
    FROM run JOIN split ON split.id = :id
    WHERE run.finished_at > split.read_at - interval '{_AGAIN}' AND run.state IN ('succeeded', 'failed')
      AND run.labels ->> :label = ANY(:variants)
    ON CONFLICT DO NOTHING
""")
_SCORES = text(f"""
    UPDATE split_outcome SET score = said.value
    FROM (
        SELECT run_id, avg(value) AS value FROM run_score
        WHERE run_id IN (
            SELECT run_id FROM run_score WHERE at > (SELECT read_at FROM split WHERE id = :id) - interval '{_AGAIN}'
        ) AND (CAST(:score AS text) IS NULL OR name = :score)
        GROUP BY run_id
    ) AS said
    WHERE split_outcome.split_id = :id AND split_outcome.run_id = said.run_id
      AND split_outcome.score IS DISTINCT FROM said.value
""")
_READ = text("UPDATE split SET read_at = now() WHERE id = :id")
#: By metric, the observations and their sum in one unit.
_OF_UNIT: Mapping[SplitMetric, tuple[str, str]] = {
    SplitMetric.ERROR: ("count(*)", "count(*) FILTER (WHERE failed)"),
    SplitMetric.SECONDS: ("count(seconds)", "COALESCE(sum(ln(seconds)), 0)"),
    SplitMetric.FIRST_TOKEN: ("count(first_token)", "COALESCE(sum(ln(first_token)), 0)"),
    SplitMetric.SCORE: ("count(score)", "COALESCE(sum(score), 0)"),
}
_SAMPLES = text(
    f"""
    WITH unit AS (
        SELECT variant, unit, {
        ", ".join(f"({n})::float AS n_{metric}, ({x})::float AS x_{metric}" for metric, (n, x) in _OF_UNIT.items())
    }
        FROM split_outcome WHERE split_id = :id GROUP BY variant, unit
    )
    """
    + " UNION ALL ".join(
        f"""
        SELECT variant, '{metric}' AS metric, count(*) FILTER (WHERE n_{metric} > 0) AS units,
               sum(n_{metric}) AS n, sum(x_{metric}) AS x, sum(x_{metric} * x_{metric}) AS xx,
               sum(n_{metric} * n_{metric}) AS nn, sum(x_{metric} * n_{metric}) AS xn
        FROM unit GROUP BY variant
        """
        for metric in _OF_UNIT
    )
)
_QUANTILES = text("""
    SELECT variant, count(*) AS runs, count(*) FILTER (WHERE failed) AS failed,
           percentile_cont(ARRAY[0.5, 0.95]) WITHIN GROUP (ORDER BY seconds) AS seconds,
           percentile_cont(ARRAY[0.5, 0.95]) WITHIN GROUP (ORDER BY first_token) AS first_token,
           avg(score) AS score, count(score) AS scored
    FROM split_outcome WHERE split_id = :id GROUP BY variant
""")
_SET_SCORE = text("""
    INSERT INTO run_score (run_id, name, value, comment, author)
    SELECT id, :name, :value, :comment, :author FROM run WHERE id = :run
    ON CONFLICT (run_id, name) DO UPDATE SET value = :value, comment = :comment, author = :author, at = now()
""")
_SCORES_OF = text("SELECT name, value, comment, author, at FROM run_score WHERE run_id = :run ORDER BY name")
_COUNT_SCORES = text("SELECT count(*) AS count FROM run_score WHERE run_id = :run AND name <> :name")


@dataclass(frozen=True, slots=True)
class RunScore:
    """What somebody said of a run."""

    name: str
    value: float
    comment: str
    author: str
    at: datetime


def lock_all(work: UnitOfWork) -> None:
    """Let no other split begin until the end of the transaction."""
    work.execute(_LOCK)


def insert(work: UnitOfWork, id_: UUID, definition: SplitDefinition, author: str) -> StoredSplit:
    """Store a split, which runs from now on."""
    document = json.dumps(definition.model_dump(mode="json", by_alias=True, exclude_defaults=True))
    values = {"id": id_, "name": definition.split, "definition": document, "author": author}
    found = work.row_of(StoredSplit, _INSERT, values)
    assert found is not None, "an insert returns its row"
    return found


def get(work: UnitOfWork, name: str, *, lock: bool = False) -> StoredSplit | None:
    """Return a split, or None."""
    return work.row_of(StoredSplit, _LOCK_NAMED if lock else _GET, {"name": name})


def page(work: UnitOfWork, limit: int) -> list[StoredSplit]:
    """Return splits: those that run, then the latest."""
    return work.rows_of(StoredSplit, _LIST, {"limit": limit})


def running(work: UnitOfWork) -> list[StoredSplit]:
    """Return the splits that run."""
    return work.rows_of(StoredSplit, _RUNNING)


def lock_running(work: UnitOfWork, id_: UUID) -> StoredSplit | None:
    """Return a split for changes; None when it has ended, or another process works on it."""
    return work.row_of(StoredSplit, _LOCK_ONE, {"id": id_})


def end(work: UnitOfWork, id_: UUID, state: SplitState, reason: str) -> bool:
    """End a split; False when it has ended before."""
    return work.run(_END, {"id": id_, "state": state, "reason": reason[:1_000]}) == 1


def set_stage(work: UnitOfWork, id_: UUID, stage: int) -> None:
    """Enter a stage of the ramp."""
    work.run(_STAGE, {"id": id_, "stage": stage})


def set_share(work: UnitOfWork, id_: UUID, share: float) -> None:
    """Set the share of each candidate, in the place of that of the stage."""
    work.run(_SHARE, {"id": id_, "share": share})


def delete(work: UnitOfWork, id_: UUID) -> None:
    """Remove a split with its outcomes."""
    work.run(_DELETE, {"id": id_})


def is_stage_over(work: UnitOfWork, id_: UUID, hold: float) -> bool:
    """Whether the stage has lasted for so many seconds."""
    found = work.row(_DUE, {"id": id_, "hold": hold})
    return found is not None and bool(found.due)


def collect(work: UnitOfWork, split: StoredSplit, variants: list[str], score: str | None) -> int:
    """Store the outcomes that are new, and scores that have changed. Returns how many."""
    values = {"id": split.id, "label": f"{VARIANT_LABEL}{split.name}", "variants": variants}
    found = work.run(_COLLECT, values) + work.run(_SCORES, {"id": split.id, "score": score})
    work.run(_READ, {"id": split.id})
    return found


def samples(work: UnitOfWork, id_: UUID) -> dict[tuple[str, SplitMetric], VariantSample]:
    """Return the outcomes by variant and metric."""
    return {
        (row.variant, SplitMetric(row.metric)): VariantSample(
            row.units, row.n, row.x, row.xx, row.nn, row.xn, row.metric == SplitMetric.ERROR
        )
        for row in work.rows(_SAMPLES, {"id": id_})
    }


def quantiles(work: UnitOfWork, id_: UUID) -> dict[str, Any]:
    """Return counts, and the median and 95th percentile of times, by variant."""
    return {row.variant: row for row in work.rows(_QUANTILES, {"id": id_})}


def set_score(work: UnitOfWork, run_id: UUID, name: str, value: float, comment: str, author: str, most: int) -> bool:
    """
    Store a score of a run, in the place of an earlier one; False when it has `most` others. Raises NotFound for a run
    that does not exist.
    """
    if work.rows(_COUNT_SCORES, {"run": run_id, "name": name})[0].count >= most:
        return False
    values = {"run": run_id, "name": name, "value": value, "comment": comment, "author": author}
    if not work.run(_SET_SCORE, values):
        raise NotFound("run", str(run_id))
    return True


def scores_of(work: UnitOfWork, run_id: UUID) -> list[RunScore]:
    """Return the scores of a run."""
    return work.rows_of(RunScore, _SCORES_OF, {"run": run_id})
