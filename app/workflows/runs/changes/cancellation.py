"""Cancellation: of a run, and of the runs that a step has called."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import text

from app.kernel import log
from app.kernel.database import UnitOfWork
from app.workflows.runs.changes.change import open_change
from app.workflows.runs.changes.transactions import RunTransaction
from app.workflows.state_machine import events
from app.workflows.state_machine.states import FINAL_RUNS, RunState

_log = log.get(__name__)

#: Why a called run is cancelled.
CALLER_STOPPED = "the step that called it was stopped"

_CALLED_BY = text("""
    SELECT id FROM run WHERE parent_step_id = :id AND state NOT IN ('succeeded', 'failed', 'cancelled')
""")


def cancel_run(
    transaction: RunTransaction, run_id: UUID, message: str, ending: RunState = RunState.CANCELLED
) -> RunState:
    """Request the end of a run; returns its state after that. A run that has ended stays as it is. Raises NotFound."""
    change = open_change(transaction, run_id)
    if change.run.state in FINAL_RUNS or change.run.state is RunState.COMPENSATING:
        return change.run.state
    change.message = change.run_error = message
    change.apply(events.CancelRequested(ending))
    change.write()
    _log.info("run_cancel_requested", run_id=str(run_id), message=message)
    return change.run.state


def called_runs(work: UnitOfWork, step_id: UUID) -> list[UUID]:
    """The open runs that a step has called."""
    return [row.id for row in work.rows(_CALLED_BY, {"id": step_id})]
