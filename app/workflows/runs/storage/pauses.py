"""
The statements on pauses: of one run, and of all runs of a workflow.

A pause of a workflow is written under an exclusive advisory lock. A transaction that reads it and writes what follows
holds the same lock shared until its end. A transaction that locks a run too locks the run first.
"""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import text

from app.kernel.database import UnitOfWork

_HOLD = text("SELECT pg_advisory_xact_lock_shared(hashtextextended(:name, 7205759405))")
_LOCK = text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 7205759405))")
_SET = text("UPDATE run SET paused = :paused WHERE id = :id AND paused <> :paused")
_PAUSE_WORKFLOW = text("INSERT INTO workflow_pause (namespace, name) VALUES (:namespace, :name) ON CONFLICT DO NOTHING")
_RESUME_WORKFLOW = text("DELETE FROM workflow_pause WHERE namespace = :namespace AND name = :name")
_STALE = text("""
    SELECT id FROM run
    WHERE workflow = :name AND namespace = :namespace AND workflow_paused <> :paused AND finished_at IS NULL
    ORDER BY id
""")
_PAUSED = "EXISTS (SELECT FROM workflow_pause AS pause WHERE (pause.namespace, name) = (run.namespace, workflow))"
_SYNC = text(f"""
    UPDATE run SET workflow_paused = {_PAUSED} WHERE id = :id AND workflow_paused <> {_PAUSED}
    RETURNING workflow_paused
""")


def hold_workflow(work: UnitOfWork, namespace: str, workflow: str) -> None:
    """Prevent a pause or a resume of the workflow until the end of the transaction."""
    work.execute(_HOLD, {"name": f"{namespace}/{workflow}"})


def set_run(work: UnitOfWork, run_id: UUID, *, paused: bool) -> bool:
    """Pause or resume a run; False when it already was in that state."""
    return work.run(_SET, {"id": run_id, "paused": paused}) == 1


def set_workflow(work: UnitOfWork, namespace: str, workflow: str, *, paused: bool) -> None:
    """Pause or resume a workflow, once every transaction that holds its pause has ended. Its runs are not marked."""
    work.execute(_LOCK, {"name": f"{namespace}/{workflow}"})
    work.run(_PAUSE_WORKFLOW if paused else _RESUME_WORKFLOW, {"namespace": namespace, "name": workflow})


def stale_runs(work: UnitOfWork, namespace: str, workflow: str, *, paused: bool) -> list[UUID]:
    """The open runs of a workflow that are not marked as its pause is."""
    return [row.id for row in work.rows(_STALE, {"namespace": namespace, "name": workflow, "paused": paused})]


def sync_run(work: UnitOfWork, run_id: UUID, namespace: str, workflow: str) -> bool | None:
    """Mark a run as the pause of its workflow is; returns the new mark, or None when it has not changed."""
    hold_workflow(work, namespace, workflow)
    row = work.row(_SYNC, {"id": run_id})
    return None if row is None else row.workflow_paused
