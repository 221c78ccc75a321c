"""
Waits: steps that wait for an instant, a duration, an event or an approval.

An event that was received before the wait began answers it at once.
"""

from __future__ import annotations

from datetime import UTC, datetime

from app.kernel.errors import FailureReason
from app.workflows.language.steps import TIMED_OUT, WaitStep
from app.workflows.runs.changes.change import RunChange
from app.workflows.runs.claims import Claim
from app.workflows.runs.storage import received_events
from app.workflows.state_machine.outcomes import Signalled, Timed, TokenUsage
from app.workflows.state_machine.states import StepState

#: The first and the last instant of a wait. Beyond them, Postgres and Python disagree on the calendar.
_EARLIEST, _LATEST = datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC)


def begin_timed(change: RunChange, claim: Claim, wait: Timed) -> None:
    """Begin a wait for a duration or an instant."""
    until = wait.until and min(max(wait.until, _EARLIEST), _LATEST)
    awaits = {"until": until.isoformat()} if until else {"for_s": wait.delay and wait.delay.total_seconds()}
    change.leave(claim.key, claim.attempt, awaits, delegated=False, delay=wait.delay, until=until)


def begin_signalled(change: RunChange, claim: Claim, wait: Signalled) -> None:
    """Begin a wait for an event. The oldest event of its name that has answered no other step answers it at once."""
    awaits = {"event": wait.event} | ({"message": wait.message} if wait.message else {})
    change.leave(claim.key, claim.attempt, awaits, delegated=False, delay=wait.expires)
    step, state = change.graph.steps[claim.key], change.run.steps[claim.key]
    assert isinstance(step, WaitStep)
    if state.state is not StepState.AWAITING:
        return
    event = received_events.take(
        change.transaction.work, change.locked.id, step.signal or "", change.steps[claim.key].id
    )
    if event is not None:
        change.succeed(claim.key, state.attempt, event.payload, TokenUsage(), step.branch_of(event.payload))


def end(change: RunChange, step: WaitStep, attempt: int) -> None:
    """The time of a wait is over."""
    if step.signal is None:
        change.succeed(step.id, attempt, None, TokenUsage())
    elif step.on_timeout == "continue":
        change.succeed(step.id, attempt, None, TokenUsage(), TIMED_OUT)
    else:
        message = f"no event {step.signal!r} came in time"
        change.fail(step.id, attempt, FailureReason.TIMEOUT, message)
