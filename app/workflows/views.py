"""
Views of runs: what clients read. Nothing here changes anything.

Lists go from the newest to the oldest by id, which sorts by age; the cursor is the last id of a page.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.kernel.database import Database
from app.kernel.errors import NotFound
from app.workflows import store

_RUN = text("""
    SELECT id, workflow, version, sha256, state, paused OR workflow_paused AS paused, priority, rank, labels, inputs,
           output, error, idempotency_key, concurrency_key, parent_step_id, forked_from, created_at, started_at,
           finished_at, deadline_at, expires_at,
           (SELECT run_id FROM step WHERE step.id = run.parent_step_id) AS parent_run_id
    FROM run WHERE id = :id
""")
_STEPS = text("""
    SELECT step.id, key, kind, model, state, branch, awaits, attempt, failures, losses, owner, output, error, tokens_in,
           tokens_out, not_before, ready_at, started_at, finished_at, deadline_at,
           fan_out.total AS items, fan_out.waiting AS items_waiting, fan_out.under_way AS items_under_way,
           fan_out.failed AS items_failed,
           (SELECT run.id FROM run WHERE run.parent_step_id = step.id ORDER BY run.id DESC LIMIT 1) AS called_run_id
    FROM step LEFT JOIN fan_out ON fan_out.step_id = step.id
    WHERE run_id = :id AND parent_id IS NULL ORDER BY position
""")
_ATTEMPTS = text("""
    SELECT step_id, attempt.attempt, attempt.owner, attempt.model, attempt.started_at, attempt.finished_at, outcome,
           message, text,
           attempt.tokens_in, attempt.tokens_out, tokens_cached, first_token_ms
    FROM attempt JOIN step ON step.id = attempt.step_id
    WHERE step.run_id = :id AND step.parent_id IS NULL ORDER BY attempt.attempt
""")
_LIST = text("""
    SELECT run.id, workflow, version, state, paused OR workflow_paused AS paused, priority, rank, labels, created_at,
           started_at, finished_at, counted.*
    FROM run, LATERAL (
        SELECT count(*) AS steps, count(*) FILTER (WHERE step.state = 'succeeded') AS steps_succeeded,
               COALESCE(sum(tokens_in), 0) AS tokens_in, COALESCE(sum(tokens_out), 0) AS tokens_out
        FROM step WHERE step.run_id = run.id AND step.parent_id IS NULL
    ) AS counted
    WHERE (CAST(:before AS uuid) IS NULL OR run.id < :before)
      AND (CAST(:states AS text[]) IS NULL OR state = ANY(:states))
      AND (CAST(:workflow AS text) IS NULL OR workflow = :workflow)
      AND labels @> CAST(:labels AS jsonb)
    ORDER BY run.id DESC LIMIT :limit
""")
_ITEMS = text("""
    SELECT id, key, item, input, model, state, attempt, failures, losses, owner, output, error, tokens_in, tokens_out,
           not_before, ready_at, started_at, finished_at
    FROM step WHERE parent_id = :id AND item >= :first AND (CAST(:states AS text[]) IS NULL OR state = ANY(:states))
    ORDER BY item LIMIT :limit
""")
_STEP_ID = text("SELECT id FROM step WHERE run_id = :id AND key = :key AND parent_id IS NULL")
_KEYS = text("SELECT key FROM step WHERE run_id = :id AND kind = 'map' AND parent_id IS NULL ORDER BY position")
_EXISTS = text("SELECT state FROM run WHERE id = :id")
_HISTORY = text("""
    SELECT id, at, step, attempt, what, cause FROM history WHERE run_id = :id AND id > :after ORDER BY id LIMIT :limit
""")
_WAITING = text("""
    SELECT model, count(*) FILTER (WHERE state = 'ready') AS ready, count(*) FILTER (WHERE state = 'running') AS running
    FROM step WHERE state IN ('ready', 'running') AND model IS NOT NULL GROUP BY model
""")


@dataclass(frozen=True, slots=True)
class RunView:
    """A run with its steps and their attempts, as rows."""

    run: Any
    definition: Mapping[str, Any]
    steps: Sequence[Any]
    #: By step id, the first attempt first.
    attempts: Mapping[UUID, Sequence[Any]]


@dataclass(frozen=True, slots=True)
class Page:
    """Some runs, and the cursor of the next page when there is one."""

    runs: Sequence[Any]
    next_cursor: UUID | None


def run(database: Database, run_id: UUID) -> RunView:
    """One run, whole. Raises NotFound."""
    with database.work() as work:
        # One snapshot: states, outputs and attempts belong together.
        work.run(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"))
        row = work.row(_RUN, {"id": run_id})
        if row is None:
            raise NotFound("run", str(run_id))
        steps = work.rows(_STEPS, {"id": run_id})
        attempts: dict[UUID, list[Any]] = {step.id: [] for step in steps}
        for attempt in work.rows(_ATTEMPTS, {"id": run_id}):
            attempts[attempt.step_id].append(attempt)
        definition = store.document(work, row.sha256)
    return RunView(row, definition, steps, attempts)


def page(
    database: Database,
    *,
    limit: int,
    before: UUID | None = None,
    states: Sequence[str] | None = None,
    workflow: str | None = None,
    labels: Mapping[str, str] | None = None,
) -> Page:
    """At most `limit` runs, older than `before`, in one of `states`, of one workflow, with all of these labels."""
    values = {"limit": limit + 1, "before": before, "states": list(states) if states else None, "workflow": workflow}
    values["labels"] = json.dumps(dict(labels or {}))
    with database.work() as work:
        rows = work.rows(_LIST, values)
    more = len(rows) > limit
    return Page(rows[:limit], rows[limit - 1].id if more else None)


def demand(database: Database) -> dict[str, tuple[int, int]]:
    """For each model that is asked now: how many steps are ready, and how many run."""
    with database.work() as work:
        return {row.model: (row.ready, row.running) for row in work.rows(_WAITING)}


def items(
    database: Database, run_id: UUID, key: str, *, first: int = 0, limit: int, states: Sequence[str] | None = None
) -> list[Any]:
    """Items of a map from the index `first` on. Raises NotFound for a run, or a map of it."""
    with database.work() as work:
        if work.row(_EXISTS, {"id": run_id}) is None:
            raise NotFound("run", str(run_id))
        found = work.row(_STEP_ID, {"id": run_id, "key": key})
        if found is None:
            raise NotFound("map", key, [row.key for row in work.rows(_KEYS, {"id": run_id})])
        values = {"id": found.id, "first": first, "limit": limit, "states": list(states) if states else None}
        return work.rows(_ITEMS, values)


def history(database: Database, run_id: UUID, *, after: int = 0, limit: int = 1000) -> tuple[str, list[Any]]:
    """The state of a run, and what happened to it after the entry `after`, in its order. Raises NotFound."""
    with database.work() as work:
        row = work.row(_EXISTS, {"id": run_id})
        if row is None:
            raise NotFound("run", str(run_id))
        return row.state, work.rows(_HISTORY, {"id": run_id, "after": after, "limit": limit})
