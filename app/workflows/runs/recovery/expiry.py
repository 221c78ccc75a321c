"""
Expiry: the lease, the delay or the whole time of a step is over.

Each function checks that under the lock of the run, and returns whether it changed anything.
"""

from __future__ import annotations

from uuid import UUID

from app.kernel import log
from app.kernel.errors import FailureReason, InvalidTransition
from app.workflows.language.steps import WaitStep
from app.workflows.runs import claims, waits
from app.workflows.runs.changes.change import open_change
from app.workflows.runs.changes.transactions import RunTransaction
from app.workflows.runs.maps import write_change
from app.workflows.state_machine import events
from app.workflows.state_machine.outcomes import TokenUsage
from app.workflows.state_machine.states import HELD_STEPS, StepState

_log = log.get(__name__)


def expire_lease(transaction: RunTransaction, run_id: UUID, key: str, attempt: int) -> bool:
    """End an attempt whose lease has expired: its worker counts as dead."""
    change = open_change(transaction, run_id, key)
    step = change.steps[key]
    if step.attempt != attempt or not step.expired or step.state not in HELD_STEPS:
        return False
    message = f"worker {step.owner} did not renew its lease: it died, or was cut off"
    change.fail(key, attempt, FailureReason.WORKER_LOST, message)
    claims.end(transaction.work, step.id, attempt, FailureReason.WORKER_LOST, TokenUsage(), message)
    write_change(change)
    _log.warning("lease_expired", run_id=str(run_id), step=key, attempt=attempt, owner=step.owner)
    return True


def end_delay(transaction: RunTransaction, run_id: UUID, key: str, attempt: int) -> bool:
    """Make a step ready whose delay is over, or end its wait."""
    change = open_change(transaction, run_id, key)
    step = change.graph.steps.get(key)
    try:
        if change.steps[key].state == StepState.AWAITING and isinstance(step, WaitStep):
            waits.end(change, step, attempt)
        else:
            change.apply(events.DelayOver(key, attempt))
    except InvalidTransition:
        return False
    write_change(change)
    return True


def time_out(transaction: RunTransaction, run_id: UUID, key: str) -> bool:
    """Fail a step that no worker holds and whose whole time is over."""
    change = open_change(transaction, run_id, key)
    step = change.steps[key]
    if not step.late:
        return False
    message = "the time for the whole step (total_timeout) is over"
    change.note_error(key, {"reason": FailureReason.TIMEOUT, "message": message, "attempt": step.attempt})
    change.message = message
    try:
        change.apply(events.StepOutOfTime(key))
    except InvalidTransition:
        return False
    write_change(change)
    return True
