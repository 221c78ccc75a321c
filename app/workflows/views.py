"""
Views of runs: what clients read. Nothing here changes anything.

Lists go from the newest to the oldest by id, which sorts by age; the cursor is the last id of a page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.kernel.database import Database
from app.kernel.errors import NotFound

_RUN = text("""
    SELECT id, workflow, version, state, priority, inputs, output, error, idempotency_key,
           created_at, started_at, finished_at
    FROM run WHERE id = :id
""")
_STEPS = text("""
    SELECT id, key, kind, model, state, attempt, failures, losses, owner, output, error, tokens_in, tokens_out,
           not_before, ready_at, started_at, finished_at
    FROM step WHERE run_id = :id ORDER BY position
""")
_ATTEMPTS = text("""
    SELECT step_id, attempt.attempt, attempt.owner, attempt.started_at, attempt.finished_at, outcome, message, text,
           attempt.tokens_in, attempt.tokens_out, tokens_cached, first_token_ms
    FROM attempt JOIN step ON step.id = attempt.step_id
    WHERE step.run_id = :id ORDER BY attempt.attempt
""")
_LIST = text("""
    SELECT run.id, workflow, version, state, priority, created_at, started_at, finished_at, counted.*
    FROM run, LATERAL (
        SELECT count(*) AS steps, count(*) FILTER (WHERE step.state = 'succeeded') AS steps_succeeded,
               COALESCE(sum(tokens_in), 0) AS tokens_in, COALESCE(sum(tokens_out), 0) AS tokens_out
        FROM step WHERE step.run_id = run.id
    ) AS counted
    WHERE (CAST(:before AS uuid) IS NULL OR run.id < :before)
      AND (CAST(:states AS text[]) IS NULL OR state = ANY(:states))
      AND (CAST(:workflow AS text) IS NULL OR workflow = :workflow)
    ORDER BY run.id DESC LIMIT :limit
""")
_WAITING = text("""
    SELECT model, count(*) FILTER (WHERE state = 'ready') AS ready, count(*) FILTER (WHERE state = 'running') AS running
    FROM step WHERE state IN ('ready', 'running') AND model IS NOT NULL GROUP BY model
""")


@dataclass(frozen=True, slots=True)
class RunView:
    """A run with its steps and their attempts, as rows."""

    run: Any
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
    return RunView(row, steps, attempts)


def page(
    database: Database,
    *,
    limit: int,
    before: UUID | None = None,
    states: Sequence[str] | None = None,
    workflow: str | None = None,
) -> Page:
    """At most `limit` runs, older than `before`, in one of `states`, of one workflow."""
    values = {"limit": limit + 1, "before": before, "states": list(states) if states else None, "workflow": workflow}
    with database.work() as work:
        rows = work.rows(_LIST, values)
    more = len(rows) > limit
    return Page(rows[:limit], rows[limit - 1].id if more else None)


def demand(database: Database) -> dict[str, tuple[int, int]]:
    """For each model that is asked now: how many steps are ready, and how many run."""
    with database.work() as work:
        return {row.model: (row.ready, row.running) for row in work.rows(_WAITING)}
