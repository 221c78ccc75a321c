"""The statements on consolidations. Each function is part of a transaction of its caller."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.kernel.database import UnitOfWork
from app.memory.consolidation.consolidation import (
    Consolidation,
    ConsolidationPolicy,
    ConsolidationProgress,
    TurnCluster,
)

_COLUMNS = """
    id, namespace, state, requested_by, model, review_model, read_after, read_through, horizon, waits_for, restarts,
    turns, leftovers, clusters, has_more, plan, noise, run_id, error, written, merged, refused, outcomes, tokens_in,
    tokens_out, cost, created_at, started_at, finished_at
"""
_POLICY = "namespace, read_through, every, next_at, model, review_model"
_INSERT = text(f"""
    INSERT INTO consolidation (id, namespace, state, requested_by, model, review_model, read_after, read_through,
                               horizon)
    VALUES (:id, :namespace, 'queued', :requested_by, :model, :review_model, :read_after, :read_through, :horizon)
    ON CONFLICT (namespace) WHERE state IN ('queued', 'running') DO NOTHING
    RETURNING {_COLUMNS}
""")
_OPEN_OF = text(f"""
    SELECT {_COLUMNS} FROM consolidation WHERE namespace = :namespace AND state IN ('queued', 'running')
""")
_OPEN = text("SELECT id FROM consolidation WHERE state IN ('queued', 'running') ORDER BY id LIMIT :limit")
_GET = text(f"SELECT {_COLUMNS} FROM consolidation WHERE id = :id")
_LOCK = text(f"SELECT {_COLUMNS} FROM consolidation WHERE id = :id FOR UPDATE")
_PAGE = text(f"""
    SELECT {_COLUMNS} FROM consolidation
    WHERE (CAST(:namespace AS text) IS NULL OR namespace = :namespace)
      AND (CAST(:after AS uuid) IS NULL OR id < :after)
    ORDER BY id DESC LIMIT :limit
""")
_WAIT = text("UPDATE consolidation SET waits_for = :why WHERE id = :id AND state = 'queued' AND waits_for <> :why")
_START = text("""
    UPDATE consolidation
    SET state = 'running', run_id = :run_id, waits_for = '', read_through = :through, has_more = :has_more,
        turns = :turns, leftovers = :leftovers, clusters = :clusters, plan = CAST(:plan AS jsonb),
        noise = CAST(:noise AS jsonb), started_at = COALESCE(started_at, now())
    WHERE id = :id
""")
_RESTART = text("""
    UPDATE consolidation SET state = 'queued', run_id = NULL, restarts = restarts + 1, plan = '[]', noise = '[]'
    WHERE id = :id
""")
_END = text("""
    UPDATE consolidation
    SET state = :state, error = :error, waits_for = '', written = :written, merged = :merged, refused = :refused,
        outcomes = CAST(:outcomes AS jsonb), tokens_in = :tokens_in, tokens_out = :tokens_out, cost = :cost,
        plan = '[]', noise = '[]', finished_at = now(), started_at = COALESCE(started_at, now())
    WHERE id = :id AND state IN ('queued', 'running')
""")
_POLICY_OF = text(f"SELECT {_POLICY} FROM consolidation_namespace WHERE namespace = :namespace")
_SET_POLICY = text("""
    INSERT INTO consolidation_namespace (namespace, every, next_at, model, review_model)
    VALUES (:namespace, :every, now() + CAST(:every AS interval), :model, :review_model)
    ON CONFLICT (namespace) DO UPDATE
    SET every = EXCLUDED.every, model = EXCLUDED.model, review_model = EXCLUDED.review_model,
        next_at = CASE WHEN consolidation_namespace.every IS NOT DISTINCT FROM EXCLUDED.every
                       THEN consolidation_namespace.next_at ELSE EXCLUDED.next_at END
""")
# What was missed is not made up for: the next one is in the future.
_TAKE_DUE = text("""
    UPDATE consolidation_namespace
    SET next_at = next_at + every * (floor(EXTRACT(EPOCH FROM now() - next_at) / EXTRACT(EPOCH FROM every)) + 1)
    WHERE namespace IN (
        SELECT namespace FROM consolidation_namespace WHERE next_at <= now() ORDER BY next_at LIMIT :limit
        FOR UPDATE SKIP LOCKED
    )
    RETURNING namespace
""")
_ADVANCE = text("""
    INSERT INTO consolidation_namespace (namespace, read_through) VALUES (:namespace, :through)
    ON CONFLICT (namespace) DO UPDATE
    SET read_through = GREATEST(consolidation_namespace.read_through, EXCLUDED.read_through)
""")
_DROP_LEFTOVERS = text("DELETE FROM consolidation_leftover WHERE namespace = :namespace AND passage_id = ANY(:ids)")
_KEEP_LEFTOVERS = text("""
    INSERT INTO consolidation_leftover (passage_id, namespace, rounds)
    SELECT id, :namespace, 1 FROM passage WHERE id = ANY(:ids)
    ON CONFLICT (passage_id) DO UPDATE SET rounds = consolidation_leftover.rounds + 1
""")
_LIMIT_LEFTOVERS = text("""
    DELETE FROM consolidation_leftover WHERE namespace = :namespace AND (rounds > :max_rounds OR passage_id <= (
        SELECT passage_id FROM consolidation_leftover WHERE namespace = :namespace
        ORDER BY passage_id DESC OFFSET :most LIMIT 1
    ))
""")
_REMOVE_OLD = text("""
    DELETE FROM consolidation WHERE id IN (
        SELECT id FROM consolidation WHERE namespace = :namespace AND finished_at IS NOT NULL
        ORDER BY id DESC OFFSET :keep
    )
""")
# The counts of a map are in `fan_out`; its tokens are those of its items that have ended, and then its own.
_PROGRESS = text("""
    SELECT COALESCE(sum(fan_out.total), 0) AS requests,
           COALESCE(sum(fan_out.total - fan_out.waiting - fan_out.in_flight), 0) AS done,
           COALESCE(sum(step.tokens_in + CASE WHEN delegated THEN COALESCE(fan_out.tokens_in, 0) ELSE 0 END), 0)
               AS tokens_in,
           COALESCE(sum(step.tokens_out + CASE WHEN delegated THEN COALESCE(fan_out.tokens_out, 0) ELSE 0 END), 0)
               AS tokens_out,
           (SELECT sum(attempt.cost)::float FROM attempt JOIN step AS own ON own.id = attempt.step_id
            WHERE own.run_id = :run_id AND attempt.cost IS NOT NULL) AS cost
    FROM step LEFT JOIN fan_out ON fan_out.step_id = step.id
    WHERE step.run_id = :run_id AND step.parent_id IS NULL
""")
_RUN = text("SELECT state, error FROM run WHERE id = :id")


_NO_PROGRESS = ConsolidationProgress()


@dataclass(frozen=True, slots=True)
class ConsolidationRun:
    """The state of a run, and its error."""

    state: str
    error: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class ConsolidationEnd:
    """How a consolidation ended."""

    state: str
    error: str = ""
    written: int = 0
    merged: int = 0
    refused: int = 0
    outcomes: Sequence[dict[str, Any]] = ()
    progress: ConsolidationProgress = _NO_PROGRESS


def insert(work: UnitOfWork, values: dict[str, Any]) -> Consolidation | None:
    """Write a consolidation; None when its namespace has one that has not ended."""
    return work.row_of(Consolidation, _INSERT, values)


def open_of(work: UnitOfWork, namespace: str) -> Consolidation | None:
    """Return the consolidation of a namespace that has not ended."""
    return work.row_of(Consolidation, _OPEN_OF, {"namespace": namespace})


def open_ids(work: UnitOfWork, limit: int) -> list[UUID]:
    """Return the consolidations that have not ended, the oldest first."""
    return [row.id for row in work.rows(_OPEN, {"limit": limit})]


def find(work: UnitOfWork, id_: UUID, *, lock: bool = False) -> Consolidation | None:
    """Return a consolidation."""
    return work.row_of(Consolidation, _LOCK if lock else _GET, {"id": id_})


def page(work: UnitOfWork, namespace: str | None, after: UUID | None, limit: int) -> list[Consolidation]:
    """Return consolidations, the newest first."""
    return work.rows_of(Consolidation, _PAGE, {"namespace": namespace, "after": after, "limit": limit})


def wait(work: UnitOfWork, id_: UUID, why: str) -> None:
    """Write why a consolidation waits."""
    work.execute(_WAIT, {"id": id_, "why": why})


def start(
    work: UnitOfWork,
    id_: UUID,
    run_id: UUID,
    clusters: Sequence[TurnCluster],
    noise: Sequence[int],
    *,
    through: int,
    has_more: bool,
    turns: int,
    leftovers: int,
) -> None:
    """Write the clusters of a consolidation, and the run that reads them."""
    values = {
        "id": id_,
        "run_id": run_id,
        "through": through,
        "has_more": has_more,
        "turns": turns,
        "leftovers": leftovers,
        "clusters": len(clusters),
        "plan": json.dumps([cluster.stored() for cluster in clusters]),
        "noise": json.dumps(list(noise)),
    }
    work.execute(_START, values)


def restart(work: UnitOfWork, id_: UUID) -> None:
    """Begin a consolidation again."""
    work.execute(_RESTART, {"id": id_})


def end(work: UnitOfWork, id_: UUID, how: ConsolidationEnd) -> bool:
    """Write the end of a consolidation. Returns whether it had not ended before."""
    values = {
        "id": id_,
        "state": how.state,
        "error": how.error,
        "written": how.written,
        "merged": how.merged,
        "refused": how.refused,
        "outcomes": json.dumps(list(how.outcomes)),
        "tokens_in": how.progress.tokens_in,
        "tokens_out": how.progress.tokens_out,
        "cost": how.progress.cost,
    }
    return work.run(_END, values) > 0


def policy_of(work: UnitOfWork, namespace: str) -> ConsolidationPolicy:
    """Return what a namespace has chosen."""
    found = work.row_of(ConsolidationPolicy, _POLICY_OF, {"namespace": namespace})
    return found or ConsolidationPolicy(namespace)


def set_policy(
    work: UnitOfWork, namespace: str, every: timedelta | None, model: str | None, review_model: str | None
) -> None:
    """Write what a namespace has chosen. The first consolidation begins after one interval."""
    values = {"namespace": namespace, "every": every, "model": model, "review_model": review_model}
    work.execute(_SET_POLICY, values)


def take_due(work: UnitOfWork, limit: int) -> list[str]:
    """Return namespaces whose consolidation is due, and write when the next one is."""
    return [row.namespace for row in work.rows(_TAKE_DUE, {"limit": limit})]


def advance(
    work: UnitOfWork,
    namespace: str,
    through: int,
    clustered: Collection[int],
    noise: Collection[int],
    *,
    max_rounds: int,
    most: int,
) -> None:
    """Write up to where a namespace was read, and what is read again: at most so many turns, each so often."""
    work.execute(_ADVANCE, {"namespace": namespace, "through": through})
    work.execute(_DROP_LEFTOVERS, {"namespace": namespace, "ids": list(clustered)})
    work.execute(_KEEP_LEFTOVERS, {"namespace": namespace, "ids": list(noise)})
    work.execute(_LIMIT_LEFTOVERS, {"namespace": namespace, "max_rounds": max_rounds, "most": most})


def remove_old(work: UnitOfWork, namespace: str, keep: int) -> None:
    """Keep the newest of the consolidations of a namespace that have ended."""
    work.execute(_REMOVE_OLD, {"namespace": namespace, "keep": keep})


def progress_of(work: UnitOfWork, run_id: UUID) -> ConsolidationProgress:
    """Return how much of a run is done, and its cost so far."""
    row = work.row(_PROGRESS, {"run_id": run_id})
    assert row is not None, "an aggregate has one row"
    return ConsolidationProgress(
        int(row.requests), int(row.done), int(row.tokens_in), int(row.tokens_out), row.cost and float(row.cost)
    )


def run_of(work: UnitOfWork, run_id: UUID) -> ConsolidationRun | None:
    """Return the state of a run; None when it is not there."""
    return work.row_of(ConsolidationRun, _RUN, {"id": run_id})
