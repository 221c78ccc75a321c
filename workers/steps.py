"""
The task of a step: claim it, execute it, record its outcome.

A message names a step and an attempt. Without a claim nothing is executed.
The outcome is recorded under the attempt. While the database is unavailable the record waits without a limit; it is
refused when another worker has got the lease meanwhile.
An outcome that cannot be recorded for another reason fails the step for good: it was executed, and is not executed
again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar
from uuid import UUID

import structlog

from app.kernel import log
from app.kernel.errors import DatabaseUnreachable, FailureReason, LeaseLost, StepFailure
from app.kernel.tracing import ActiveSpan
from app.workflows.runs.claims import Claim
from app.workflows.runs.recovery.abandon import abandon, abandon_step, reason_of
from app.workflows.state_machine.outcomes import Failure, Outcome, Success, TokenUsage
from app.workflows.state_machine.states import StepState
from workers import step_kinds
from workers.leases import Holding, StopReason
from workers.runtime import Runtime
from workers.telemetry import traces

_log = log.get(__name__)

T = TypeVar("T")

#: Seconds before another try while the database is away.
_PAUSE = 0.5


def run_step(runtime: Runtime, step_id: UUID, attempt: int) -> None:
    """Claim the step of a message, execute and record it; then the short steps that follow it immediately."""
    try:
        claim = runtime.runs.claim(step_id, attempt, runtime.owner)
    except DatabaseUnreachable as error:
        # The step stays ready, and the sweep publishes it again. The pause keeps this worker from taking every message
        # for nothing.
        _log.warning("claim_postponed", step_id=str(step_id), error=str(error))
        time.sleep(_PAUSE)
        return
    except Exception as error:  # noqa: BLE001 a step that cannot be claimed would be published again without end
        _log.exception("claim_failed", step_id=str(step_id), attempt=attempt)
        abandon_step(runtime.runs, step_id, reason_of(error, "claiming a step"))
        return
    if claim is None:
        _log.debug("step_not_claimed", step_id=str(step_id), attempt=attempt)
    while claim is not None:
        context = {"run_id": str(claim.run_id), "step": claim.key, "attempt": claim.attempt}
        with structlog.contextvars.bound_contextvars(**context):
            claim = _process(runtime, claim)


@dataclass(frozen=True, slots=True)
class Recorded:
    """An outcome as it was recorded."""

    outcome: Outcome
    #: The state of the step then.
    state: StepState
    #: The claim of a step that follows it immediately.
    following: Claim | None = None


def _process(runtime: Runtime, claim: Claim) -> Claim | None:
    """Execute a claimed step and record it. Returns the claim of a step that follows it immediately."""
    with traces.step(claim) as span:
        return _processed(runtime, claim, span)


def _processed(runtime: Runtime, claim: Claim, span: ActiveSpan) -> Claim | None:
    began = time.monotonic()
    runtime.events.started(claim)
    with runtime.leases.hold(claim) as holding:
        end = runtime.begin_device_time(claim.model)
        try:
            with traces.model(claim) as model_span:
                outcome = _attempt(runtime, claim, holding)
                traces.note(model_span, outcome)
        finally:
            device_us = end()
        if outcome is None:
            span.failed("lease_lost")
            _log.warning("step_dropped", reason=holding.reason)
            runtime.events.lost(claim)
            return None
        try:
            recorded = record_or_fail(runtime, claim, outcome, device_us)
        except LeaseLost as error:
            _log.warning("step_record_refused", error=str(error))
            runtime.events.lost(claim)
            return None
    seconds = round(time.monotonic() - began, 3)
    match recorded.outcome:
        case Success(usage=usage):
            _log.info("step_succeeded", seconds=seconds, tokens=usage.tokens_out)
        case Failure(reason=reason, message=message):
            _log.warning("step_failed", reason=reason, error=message, seconds=seconds)
        case awaited:
            _log.info("step_suspended", awaits=type(awaited).__name__.lower(), state=recorded.state, seconds=seconds)
    send_events(runtime, claim, recorded, seconds)
    runtime.figures.count_step(claim, recorded.outcome, seconds)
    if isinstance(recorded.outcome, Failure):
        span.failed(str(recorded.outcome.reason))
    following = recorded.following
    return None if following is None else replace(following, trace_parent=claim.trace_parent)


def send_events(runtime: Runtime, claim: Claim, recorded: Recorded, seconds: float) -> None:
    """Tell Flower how an attempt ended."""
    match recorded.outcome:
        case Success(usage=usage):
            tokens = f"{usage.tokens_in} tokens read, {usage.tokens_out} written" if claim.model is not None else "done"
            runtime.events.succeeded(claim, tokens, seconds)
        case Failure(reason=reason, message=message):
            runtime.events.failed(claim, recorded.state, reason, message)
        case awaited if recorded.state is StepState.AWAITING:
            runtime.events.succeeded(claim, f"awaiting ({type(awaited).__name__.lower()})", seconds)
        case _:
            runtime.events.failed(claim, recorded.state, recorded.state, "its items or its run cannot be made")


def _attempt(runtime: Runtime, claim: Claim, holding: Holding) -> Outcome | None:
    """Execute the step and return the outcome; None when the lease was lost, and no outcome can be recorded."""
    hooks = runtime.hooks_for(claim.model, claim.workflow, claim.namespace)
    try:
        return hooks.noted(step_kinds.execute(step_kinds.StepTask(claim, holding, runtime, hooks)))
    except CancelledError:
        match holding.reason:
            case StopReason.CANCELLED:
                return Failure(FailureReason.CANCELLED, "cancelled on request")
            case StopReason.LOST:
                return None
            case StopReason.PREEMPTED:
                return PREEMPTED
            case _:
                return REQUEUED
    except Exception as error:  # noqa: BLE001 the outermost frame of the step: a defect fails the attempt, not the worker
        return hooks.noted(failure_of(error))


#: The outcome of an attempt whose worker stops.
REQUEUED = Failure(FailureReason.WORKER_STOPPED, "requeued: its worker stops")
#: The outcome of an attempt whose thread a more urgent step needs.
PREEMPTED = Failure(FailureReason.WORKER_STOPPED, "requeued: a more urgent step needs its slot")


def failure_of(error: Exception) -> Failure:
    """Return the outcome of an attempt that raised. A defect is logged with its traceback."""
    if isinstance(error, StepFailure):
        usage = TokenUsage(finish_reason=error.finish_reason)
        return Failure(error.reason, error.message, error.text, usage, error.retry_after or timedelta(0))
    _log.error("step_crashed", exc_info=error)
    return Failure(FailureReason.INTERNAL, f"{type(error).__name__}: {error}")


def record_or_fail(runtime: Runtime, claim: Claim, outcome: Outcome, device_us: int | None) -> Recorded:
    """
    Record an outcome, or why it cannot be recorded, and tell the outcome. Raises LeaseLost.

    `device_us` is its share of the time of the pool's devices, in microseconds.
    """
    recorded = _record_or_fail(runtime, claim, outcome, device_us)
    if isinstance(outcome, Success) and outcome.recorded is not None:
        assert isinstance(recorded.outcome, Success | Failure), "a success stays one, or becomes a failure"
        outcome.recorded(recorded.outcome)
    return recorded


def _record_or_fail(runtime: Runtime, claim: Claim, outcome: Outcome, device_us: int | None) -> Recorded:
    if isinstance(outcome, Success | Failure):
        outcome = replace(outcome, usage=runtime.priced(outcome.usage, claim.model, device_us))
    try:
        return _record(runtime, claim, outcome)
    except LeaseLost:
        raise
    except StepFailure as error:
        usage = outcome.usage if isinstance(outcome, Success | Failure) else TokenUsage()
        failed = Failure(error.reason, error.message, usage=usage)
    except Exception as error:  # noqa: BLE001 otherwise the lease would expire and the step be executed again
        _log.exception("record_failed")
        usage = outcome.usage if isinstance(outcome, Success | Failure) else TokenUsage()
        failed = Failure(FailureReason.INTERNAL, reason_of(error, "recording its outcome"), usage=usage, final=True)
    try:
        return _record(runtime, claim, failed)
    except LeaseLost:
        raise
    except Exception:  # noqa: BLE001 as above
        _log.exception("record_failed", again=True)
    with_database(lambda: abandon(runtime.runs, claim.run_id, f"step {claim.key}: {failed.message}"))
    return Recorded(failed, StepState.FAILED)


def _record(runtime: Runtime, claim: Claim, outcome: Outcome) -> Recorded:
    runs, owner = runtime.runs, runtime.owner
    match outcome:
        case Success():
            following = with_database(lambda: runs.succeed(claim, owner, outcome))
            return Recorded(outcome, StepState.SUCCEEDED, following)
        case Failure():
            return Recorded(outcome, with_database(lambda: runs.fail(claim, owner, outcome)))
        case _:
            return Recorded(outcome, with_database(lambda: runs.leave(claim, owner, outcome)))


def with_database(action: Callable[[], T]) -> T:
    """Return the result of an action, repeated until the database is available."""
    while True:
        try:
            return action()
        except DatabaseUnreachable as error:
            _log.warning("record_postponed", error=str(error))
            time.sleep(_PAUSE)
