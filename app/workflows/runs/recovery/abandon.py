"""
Abandonment: the end of a run whose handling raises an error that no rule foresees.

Such a run is not retried. It is cancelled with the reason, by the transition table, so its holders are notified and its
`on_failure` steps run. Where that raises too, it is ended by SQL, without its definition.
"""

from __future__ import annotations

import json
from uuid import UUID

from sqlalchemy import text

from app.kernel import log
from app.kernel.errors import FailureReason, NotFound, Unavailable, shortened
from app.workflows.runs.changes import effects
from app.workflows.runs.changes.cancellation import cancel_run
from app.workflows.runs.changes.transactions import RunTransaction
from app.workflows.runs.service import Runs
from app.workflows.runs.storage import history, store
from app.workflows.runs.storage.history import HistoryEntry
from app.workflows.state_machine.states import FINAL_RUNS, RunState

_log = log.get(__name__)

#: States of a run that has ended or is ending.
_ENDING = FINAL_RUNS | {RunState.CANCELLING, RunState.COMPENSATING}

_END_RUN = text("""
    UPDATE run SET state = 'failed', ending = 'failed', finished_at = now(), error = CAST(:error AS json),
                   expires_at = now() + make_interval(secs => retention_s)
    WHERE id = :id AND finished_at IS NULL RETURNING parent_step_id, concurrency_key
""")
_END_FAN_OUTS = text("""
    UPDATE fan_out SET waiting = 0, in_flight = 0, stopping = true
    FROM step WHERE step.id = step_id AND step.run_id = :id AND step.finished_at IS NULL
""")
_END_ATTEMPTS = text("""
    UPDATE attempt SET finished_at = now(), outcome = :reason, message = :message
    FROM step WHERE step.id = step_id AND step.run_id = :id AND step.finished_at IS NULL
      AND attempt.attempt = step.attempt AND attempt.finished_at IS NULL
""")
_END_STEPS = text("""
    UPDATE step SET state = CASE WHEN state = 'pending' THEN 'skipped' ELSE 'cancelled' END, owner = NULL,
                    lease_until = NULL, not_before = NULL, awaits = NULL, delegated = false, finished_at = now()
    WHERE run_id = :id AND state NOT IN ('succeeded', 'failed', 'skipped', 'cancelled')
    RETURNING id
""")


def reason_of(error: BaseException, doing: str) -> str:
    """Why a run is abandoned, for people."""
    return shortened(f"internal error while {doing}: {type(error).__name__}: {error}; the log has more")


def abandon(runs: Runs, run_id: UUID, message: str) -> None:
    """End a run whose handling raised an error. Raises Unavailable: nothing has changed then."""
    try:
        with runs.transaction() as transaction:
            locked = store.lock_run(transaction.work, run_id)
            if locked is None or locked.state in FINAL_RUNS:
                return
            if locked.state not in _ENDING:
                cancel_run(transaction, run_id, message, RunState.FAILED)
                return
    except (Unavailable, NotFound):
        raise
    except Exception:  # noqa: BLE001 any error ends the run without its definition
        _log.exception("run_cancel_failed", run_id=str(run_id))
    with runs.transaction() as transaction:
        store.lock_run(transaction.work, run_id)
        if _end(transaction, run_id, message):
            _log.error("run_abandoned", run_id=str(run_id), message=message)


def abandon_step(runs: Runs, step_id: UUID, message: str) -> None:
    """End the run of a step. Raises Unavailable."""
    with runs.transaction() as transaction:
        run_id = store.run_of_step(transaction.work, step_id)
    if run_id is not None:
        abandon(runs, run_id, message)


def _end(transaction: RunTransaction, run_id: UUID, message: str) -> bool:
    """End a locked run as failed, without its definition. Its open steps are cancelled. False when it had ended."""
    work = transaction.work
    ended = work.row(_END_RUN, {"id": run_id, "error": json.dumps({"message": message, "steps": {}})})
    if ended is None:
        return False
    work.execute(_END_FAN_OUTS, {"id": run_id})
    work.execute(_END_ATTEMPTS, {"id": run_id, "message": message, "reason": FailureReason.INTERNAL})
    for step in work.rows(_END_STEPS, {"id": run_id}):
        store.notify_stop(work, step.id)
    history.add(work, HistoryEntry(run_id, RunState.FAILED, {"message": message}))
    transaction.effects.extend(effects.of_ended_run(run_id, ended.parent_step_id, ended.concurrency_key))
    return True
