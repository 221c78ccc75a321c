"""
Abandoned runs: how a run ends that the rules cannot carry on, because handling it raises what no rule foresees.

Such a run is not tried again: it is cancelled with the reason, by the rules, so that its holders are told and its
`on_failure` steps are done. Where that raises too, it is ended as it stands, without its definition.
"""

from __future__ import annotations

from functools import partial
from uuid import UUID

from app.kernel import log
from app.kernel.errors import NotFound, Unavailable, shortened
from app.workflows.runs.service import Runs
from app.workflows.runs.storage import store
from app.workflows.state_machine.states import FINAL_RUNS, RunState

_log = log.get(__name__)

#: States of a run that is to end already.
_ENDING = FINAL_RUNS | {RunState.CANCELLING, RunState.COMPENSATING}


def reason_of(error: BaseException, doing: str) -> str:
    """Why a run is abandoned, for people."""
    return shortened(f"internal error while {doing}: {type(error).__name__}: {error}; the log has more")


def abandon(runs: Runs, run_id: UUID, message: str) -> None:
    """End a run that raised when it was handled. Raises Unavailable: nothing has changed then."""
    try:
        with runs.transaction() as work:
            row = store.lock_run(work, run_id)
            if row is None or row.state in FINAL_RUNS:
                return
            if row.state not in _ENDING:
                runs.cancel(run_id, message=message, ending=RunState.FAILED, within=work)
                return
    except (Unavailable, NotFound):
        raise
    except Exception:  # noqa: BLE001 whatever it is, the run is ended without its definition
        _log.exception("run_cancel_broke", run_id=str(run_id))
    _break(runs, run_id, message)


def abandon_step(runs: Runs, step_id: UUID, message: str) -> None:
    """End the run of a step. Raises Unavailable."""
    with runs.transaction() as work:
        run_id = store.run_of_step(work, step_id)
    if run_id is not None:
        abandon(runs, run_id, message)


def _break(runs: Runs, run_id: UUID, message: str) -> None:
    with runs.transaction() as work:
        store.lock_run(work, run_id)
        ended = store.break_run(work, run_id, message)
        if ended is None:
            return
        store.add_event(work, run_id, RunState.FAILED, {"message": message})
        work.after_commit(partial(runs.run_ended, run_id, ended.parent_step_id, ended.concurrency_key))
    _log.error("run_abandoned", run_id=str(run_id), message=message)
