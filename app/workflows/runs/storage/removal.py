"""The statements that remove runs whose retention is over."""

from __future__ import annotations

from collections.abc import Collection
from uuid import UUID

from sqlalchemy import text

from app.kernel.database import UnitOfWork

# Runs that another transaction has locked are skipped.
_EXPIRED_RUNS = text("""
    SELECT id FROM run WHERE expires_at < now() AND parent_step_id IS NULL AND id <> ALL(:passed)
    ORDER BY expires_at LIMIT :limit FOR UPDATE SKIP LOCKED
""")
_CALLED_RUNS = text("""
    SELECT run.id FROM step JOIN run ON run.parent_step_id = step.id
    WHERE step.run_id = ANY(:ids) LIMIT :limit FOR UPDATE OF run NOWAIT
""")
_REMOVE_ITEMS = text("""
    DELETE FROM step WHERE id IN (
        SELECT id FROM step WHERE run_id = ANY(:ids) AND parent_id IS NOT NULL LIMIT :limit
    )
""")
_REMOVE_ENDED = text("DELETE FROM run WHERE id = :id AND finished_at IS NOT NULL AND parent_step_id IS NULL")
_REMOVE_RUNS = text("DELETE FROM run WHERE id = ANY(:ids)")


def expired_runs(work: UnitOfWork, limit: int, passed: Collection[UUID]) -> list[UUID]:
    """Runs whose retention is over, except those of `passed` and those that are locked. They are locked then."""
    return [row.id for row in work.rows(_EXPIRED_RUNS, {"limit": limit, "passed": list(passed)})]


def called_runs(work: UnitOfWork, ids: Collection[UUID], limit: int) -> list[UUID]:
    """Runs that steps of these runs have called. They are locked then."""
    return [row.id for row in work.rows(_CALLED_RUNS, {"ids": list(ids), "limit": limit})]


def remove_items(work: UnitOfWork, ids: Collection[UUID], limit: int) -> int:
    """Remove at most `limit` items of maps of these runs; returns how many."""
    return work.run(_REMOVE_ITEMS, {"ids": list(ids), "limit": limit})


def remove_runs(work: UnitOfWork, ids: Collection[UUID]) -> int:
    """Remove runs with all their rows; returns how many."""
    return work.run(_REMOVE_RUNS, {"ids": list(ids)})


def remove_ended_run(work: UnitOfWork, run_id: UUID) -> bool:
    """Remove one run that has ended and that no other run called; returns whether it was there."""
    return work.run(_REMOVE_ENDED, {"id": run_id}) > 0
