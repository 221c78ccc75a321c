"""
Waits: steps that wait for an instant, a duration, an event or an approval.

An event that was received before the wait began answers it at once.
"""

from __future__ import annotations

from datetime import UTC, datetime

from app.kernel.database import UnitOfWork
from app.workflows.language.steps import WaitStep
from app.workflows.runs.change import RunChange
from app.workflows.runs.claims import Claim
from app.workflows.runs.storage import store
from app.workflows.state_machine.outcomes import Signalled, Timed, TokenUsage
from app.workflows.state_machine.states import StepState

#: Instants that can be waited for. Beyond them, Postgres and Python disagree on the calendar.
_EARLIEST, _LATEST = datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC)


def begin_timed(change: RunChange, claim: Claim, wait: Timed) -> None:
    """Let a step wait for a duration or an instant."""
    until = wait.until and min(max(wait.until, _EARLIEST), _LATEST)
    awaits = {"until": until.isoformat()} if until else {"for_s": wait.delay and wait.delay.total_seconds()}
    change.leave(claim.key, claim.attempt, awaits, delegated=False, delay=wait.delay, until=until)


def begin_signalled(work: UnitOfWork, change: RunChange, claim: Claim, wait: Signalled) -> None:
    """Let a step wait for an event, unless one was received already: that answers it."""
    awaits = {"event": wait.event} | ({"message": wait.message} if wait.message else {})
    change.leave(claim.key, claim.attempt, awaits, delegated=False, delay=wait.expires)
    take_event(work, change, claim.key)


def take_event(work: UnitOfWork, change: RunChange, key: str) -> None:
    """Answer a waiting step with the oldest event of its name that has answered no other."""
    step = change.graph.steps[key]
    assert isinstance(step, WaitStep)
    if change.run.steps[key].state is not StepState.AWAITING:
        return
    found = store.take_event(work, change.run_row.id, step.signal or "", change.rows[key].id)
    if found is not None:
        branch = step.branch_of(found.payload)
        change.succeed(key, change.run.steps[key].attempt, found.payload, TokenUsage(), branch)
