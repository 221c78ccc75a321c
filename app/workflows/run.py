"""
A run: the states of its steps, and what each event makes of them.

Everything that changes a state is in this file. `TRANSITIONS` is the table; an edge that is absent is the error.
`advance(run, event)` gives the run after the event and the commands that follow from it; it does nothing itself.
A step begins when all that it needs have succeeded. When one fails, what needs it is skipped and other branches go on;
the run fails once nothing is left to do. After a cancel nothing begins; what runs is asked to stop, and the run is
cancelled when the last holder has answered or lost its lease.

Nothing here reads a clock, a database or chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import StrEnum

from app.kernel.errors import FailureReason, InvalidTransition
from app.workflows import retry
from app.workflows.definition import Retry


class StepState(StrEnum):
    """Where a step stands."""

    #: It waits for the steps that it needs.
    PENDING = "pending"
    #: It may begin; a message is on its way to a worker, or lost, and the sweep sends another.
    READY = "ready"
    #: A worker holds it under a lease.
    RUNNING = "running"
    #: It failed and begins again after a delay.
    WAITING = "waiting"
    #: Its holder was asked to stop and has not answered yet.
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    #: A step that it needs did not succeed.
    SKIPPED = "skipped"
    CANCELLED = "cancelled"


class RunState(StrEnum):
    """Where a run stands."""

    #: No step has begun.
    QUEUED = "queued"
    RUNNING = "running"
    #: A cancel was asked for; some holder has not answered yet.
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


#: States of a step that nothing leaves.
FINAL_STEPS = frozenset({StepState.SUCCEEDED, StepState.FAILED, StepState.SKIPPED, StepState.CANCELLED})
#: States of a step in which a worker holds it.
HELD_STEPS = frozenset({StepState.RUNNING, StepState.CANCELLING})
#: States of a run that nothing leaves.
FINAL_RUNS = frozenset({RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED})


class Change(StrEnum):
    """What can happen to one step."""

    NEEDS_MET = "needs_met"
    NEED_MISSED = "need_missed"
    CLAIMED = "claimed"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    FAILED_FOR_GOOD = "failed_for_good"
    DELAY_OVER = "delay_over"
    CANCEL_ASKED = "cancel_asked"


TRANSITIONS: Mapping[tuple[StepState, Change], StepState] = {
    (StepState.PENDING, Change.NEEDS_MET): StepState.READY,
    (StepState.PENDING, Change.NEED_MISSED): StepState.SKIPPED,
    (StepState.PENDING, Change.CANCEL_ASKED): StepState.CANCELLED,
    (StepState.READY, Change.CLAIMED): StepState.RUNNING,
    (StepState.READY, Change.CANCEL_ASKED): StepState.CANCELLED,
    (StepState.RUNNING, Change.SUCCEEDED): StepState.SUCCEEDED,
    (StepState.RUNNING, Change.FAILED): StepState.WAITING,
    (StepState.RUNNING, Change.FAILED_FOR_GOOD): StepState.FAILED,
    (StepState.RUNNING, Change.CANCEL_ASKED): StepState.CANCELLING,
    (StepState.WAITING, Change.DELAY_OVER): StepState.READY,
    (StepState.WAITING, Change.CANCEL_ASKED): StepState.CANCELLED,
    # The work was done before its holder heard of the cancel: it did succeed.
    (StepState.CANCELLING, Change.SUCCEEDED): StepState.SUCCEEDED,
    (StepState.CANCELLING, Change.FAILED): StepState.CANCELLED,
    (StepState.CANCELLING, Change.FAILED_FOR_GOOD): StepState.CANCELLED,
    (StepState.CANCELLING, Change.CANCEL_ASKED): StepState.CANCELLING,
}


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a run."""

    key: str
    state: StepState
    needs: tuple[str, ...]
    retry: Retry
    #: Counts dispatches from 1; a message and a record name it, and an old one is refused. 0 before the first.
    attempt: int = 0
    #: Attempts that failed.
    failures: int = 0
    #: Attempts whose worker died.
    losses: int = 0


@dataclass(frozen=True, slots=True)
class Run:
    """A run and its steps, by key."""

    id: str
    state: RunState
    steps: Mapping[str, Step]


@dataclass(frozen=True, slots=True)
class RunSubmitted:
    """The run was written; nothing of it has begun."""


@dataclass(frozen=True, slots=True)
class StepClaimed:
    """A worker took the step."""

    key: str
    attempt: int


@dataclass(frozen=True, slots=True)
class StepSucceeded:
    """The holder delivered an output."""

    key: str
    attempt: int


@dataclass(frozen=True, slots=True)
class StepFailed:
    """The attempt ended badly: its holder said so, or its lease ran out."""

    key: str
    attempt: int
    reason: FailureReason
    #: Drawn from [0, 1) by the caller, for the jitter of the delay.
    chance: float
    #: Setting runs.max_worker_losses.
    max_losses: int


@dataclass(frozen=True, slots=True)
class DelayOver:
    """The delay before another attempt has passed."""

    key: str
    attempt: int


@dataclass(frozen=True, slots=True)
class CancelRequested:
    """Somebody wants the run to end."""


Event = RunSubmitted | StepClaimed | StepSucceeded | StepFailed | DelayOver | CancelRequested


@dataclass(frozen=True, slots=True)
class DispatchStep:
    """Send a message to the workers of this step."""

    key: str
    attempt: int


@dataclass(frozen=True, slots=True)
class DelayStep:
    """Let the step wait; the sweep brings it back."""

    key: str
    delay: timedelta


@dataclass(frozen=True, slots=True)
class StopStep:
    """Ask the holder to leave the step."""

    key: str


@dataclass(frozen=True, slots=True)
class NoteGivenUp:
    """Write down why there is no other attempt."""

    key: str
    why: str


@dataclass(frozen=True, slots=True)
class FinishRun:
    """The run has ended in this state."""

    state: RunState


Command = DispatchStep | DelayStep | StopStep | NoteGivenUp | FinishRun


@dataclass(frozen=True, slots=True)
class Advance:
    """The run after an event, and what is to be done."""

    run: Run
    commands: tuple[Command, ...]


def advance(run: Run, event: Event) -> Advance:
    """
    What an event makes of a run.

    Raises InvalidTransition when the event cannot happen: to a step in that state, for another attempt,
    or to a run that has ended.
    """
    if run.state in FINAL_RUNS:
        raise InvalidTransition(f"run {run.id}", run.state, type(event).__name__)
    steps, commands = dict(run.steps), list[Command]()
    match event:
        case RunSubmitted():
            pass
        case StepClaimed(key, attempt):
            _change(steps, _at(run, key, attempt, event), Change.CLAIMED)
        case StepSucceeded(key, attempt):
            _change(steps, _at(run, key, attempt, event), Change.SUCCEEDED)
        case StepFailed():
            _fail(steps, _at(run, event.key, event.attempt, event), event, commands)
        case DelayOver(key, attempt):
            _dispatch(steps, _change(steps, _at(run, key, attempt, event), Change.DELAY_OVER), commands)
        case CancelRequested():
            _cancel(steps, commands)
    state = _settle(run.state, steps, event, commands)
    return Advance(replace(run, state=state, steps=steps), tuple(commands))


def begin(key: str, needs: Sequence[str], rule: Retry) -> Step:
    """A step that nothing has happened to."""
    return Step(key, StepState.PENDING, tuple(needs), rule)


def _at(run: Run, key: str, attempt: int, event: Event) -> Step:
    step = run.steps[key]
    if step.attempt != attempt:
        raise InvalidTransition(
            f"step {key} of run {run.id}, attempt {step.attempt},", step.state, f"{type(event).__name__} of {attempt}"
        )
    return step


def _change(steps: dict[str, Step], step: Step, change: Change) -> Step:
    state = TRANSITIONS.get((step.state, change))
    if state is None:
        raise InvalidTransition(f"step {step.key}", step.state, change)
    changed = steps[step.key] = replace(step, state=state)
    return changed


def _dispatch(steps: dict[str, Step], step: Step, commands: list[Command]) -> None:
    """Send the step to its workers, under a new attempt."""
    steps[step.key] = replace(step, attempt=step.attempt + 1)
    commands.append(DispatchStep(step.key, step.attempt + 1))


def _fail(steps: dict[str, Step], step: Step, event: StepFailed, commands: list[Command]) -> None:
    lost = event.reason is FailureReason.WORKER_LOST
    failed = not lost and event.reason not in retry.NOT_COUNTED
    step = replace(step, failures=step.failures + failed, losses=step.losses + lost)
    record = retry.Record(step.failures, step.losses)
    decision = retry.decide(step.retry, event.reason, record, max_losses=event.max_losses, chance=event.chance)
    if isinstance(decision, retry.GiveUp):
        _change(steps, step, Change.FAILED_FOR_GOOD)
        commands.append(NoteGivenUp(step.key, decision.why))
        return
    waiting = _change(steps, step, Change.FAILED)
    if waiting.state is not StepState.WAITING:
        return
    if decision.delay:
        commands.append(DelayStep(step.key, decision.delay))
    else:
        _dispatch(steps, _change(steps, waiting, Change.DELAY_OVER), commands)


def _cancel(steps: dict[str, Step], commands: list[Command]) -> None:
    open_steps = [step for step in steps.values() if step.state not in FINAL_STEPS]
    changed = [_change(steps, step, Change.CANCEL_ASKED) for step in open_steps]
    commands.extend(StopStep(step.key) for step in changed if step.state is StepState.CANCELLING)


def _settle(state: RunState, steps: dict[str, Step], event: Event, commands: list[Command]) -> RunState:
    """Begin what may begin, skip what cannot, and see whether the run has ended."""
    if isinstance(event, CancelRequested):
        state = RunState.CANCELLING
    elif state is RunState.QUEUED and not isinstance(event, RunSubmitted):
        state = RunState.RUNNING
    if isinstance(event, RunSubmitted | StepSucceeded | StepFailed) and state is not RunState.CANCELLING:
        _spread(steps, commands)
    if any(step.state not in FINAL_STEPS for step in steps.values()):
        return state
    if state is RunState.CANCELLING:
        ended = RunState.CANCELLED
    elif all(step.state is StepState.SUCCEEDED for step in steps.values()):
        ended = RunState.SUCCEEDED
    else:
        ended = RunState.FAILED
    commands.append(FinishRun(ended))
    return ended


def _spread(steps: dict[str, Step], commands: list[Command]) -> None:
    """Carry what has ended over to the steps that waited for it, until nothing changes."""
    moved = True
    while moved:
        moved = False
        for step in list(steps.values()):
            if step.state is not StepState.PENDING:
                continue
            needs = [steps[need].state for need in step.needs]
            if any(need in FINAL_STEPS and need is not StepState.SUCCEEDED for need in needs):
                _change(steps, step, Change.NEED_MISSED)
                moved = True
            elif all(need is StepState.SUCCEEDED for need in needs):
                _dispatch(steps, _change(steps, step, Change.NEEDS_MET), commands)
