"""
A run: the states of its steps, and what each event makes of them.

Everything that changes a state is in this file. `TRANSITIONS` is the table; an edge that is absent is the error.
`advance(run, event)` gives the run after the event and the commands that follow from it; it does nothing itself.

A step begins when what it needs has come about (`join`): all of it, any of it, or the end of all of it. Otherwise it is
skipped, and other branches go on. Where a step has a condition or is a switch, somebody is asked to decide it first.
The run fails once nothing is left to do and a step has failed that was not allowed to. After a cancel nothing begins;
what runs is asked to stop, and the run goes on to its end when the last holder has answered or lost its lease.
A run that does not succeed does its `on_failure` steps before it ends.

Nothing here reads a clock, a database or chance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from app.kernel.errors import FailureReason, InvalidTransition
from app.workflows.language.rule import StepRule
from app.workflows.state_machine import retry
from app.workflows.state_machine.events import (
    CancelRequested,
    Command,
    ComputeOutput,
    DecideStep,
    DelayOver,
    DelayStep,
    DispatchStep,
    Event,
    FinishRun,
    NoteGivenUp,
    OutputComputed,
    RetryRequested,
    RunAdmitted,
    RunSubmitted,
    StepAwaited,
    StepCancelRequested,
    StepClaimed,
    StepDecided,
    StepFailed,
    StepOutOfTime,
    StepSucceeded,
    StopStep,
)
from app.workflows.state_machine.progress import RunProgress
from app.workflows.state_machine.run import Run, RunStep
from app.workflows.state_machine.states import FINAL_RUNS, FINAL_STEPS, RunState, StepState


class StepChange(StrEnum):
    """What can happen to one step."""

    NEEDS_MET = "needs_met"
    NEED_MISSED = "need_missed"
    #: A switch took a branch.
    DECIDED = "decided"
    #: A condition could not be computed.
    BROKEN = "broken"
    CLAIMED = "claimed"
    #: The holder has left it; its work goes on elsewhere.
    AWAITED = "awaited"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    FAILED_FOR_GOOD = "failed_for_good"
    DELAY_OVER = "delay_over"
    OUT_OF_TIME = "out_of_time"
    CANCEL_ASKED = "cancel_asked"
    #: A cancel of work that nothing needs to answer.
    DROPPED = "dropped"
    RETRIED = "retried"


TRANSITIONS: Mapping[tuple[StepState, StepChange], StepState] = {
    (StepState.PENDING, StepChange.NEEDS_MET): StepState.READY,
    (StepState.PENDING, StepChange.NEED_MISSED): StepState.SKIPPED,
    (StepState.PENDING, StepChange.DECIDED): StepState.SUCCEEDED,
    (StepState.PENDING, StepChange.BROKEN): StepState.FAILED,
    (StepState.PENDING, StepChange.CANCEL_ASKED): StepState.CANCELLED,
    (StepState.READY, StepChange.CLAIMED): StepState.RUNNING,
    (StepState.READY, StepChange.OUT_OF_TIME): StepState.FAILED,
    (StepState.READY, StepChange.CANCEL_ASKED): StepState.CANCELLED,
    (StepState.RUNNING, StepChange.AWAITED): StepState.AWAITING,
    (StepState.RUNNING, StepChange.SUCCEEDED): StepState.SUCCEEDED,
    (StepState.RUNNING, StepChange.FAILED): StepState.WAITING,
    (StepState.RUNNING, StepChange.FAILED_FOR_GOOD): StepState.FAILED,
    (StepState.RUNNING, StepChange.CANCEL_ASKED): StepState.CANCELLING,
    (StepState.WAITING, StepChange.DELAY_OVER): StepState.READY,
    (StepState.WAITING, StepChange.OUT_OF_TIME): StepState.FAILED,
    (StepState.WAITING, StepChange.CANCEL_ASKED): StepState.CANCELLED,
    (StepState.AWAITING, StepChange.SUCCEEDED): StepState.SUCCEEDED,
    (StepState.AWAITING, StepChange.FAILED): StepState.WAITING,
    (StepState.AWAITING, StepChange.FAILED_FOR_GOOD): StepState.FAILED,
    (StepState.AWAITING, StepChange.CANCEL_ASKED): StepState.CANCELLING,
    (StepState.AWAITING, StepChange.DROPPED): StepState.CANCELLED,
    # The work was done before its holder heard of the cancel: it did succeed.
    (StepState.CANCELLING, StepChange.SUCCEEDED): StepState.SUCCEEDED,
    (StepState.CANCELLING, StepChange.FAILED): StepState.CANCELLED,
    (StepState.CANCELLING, StepChange.FAILED_FOR_GOOD): StepState.CANCELLED,
    (StepState.CANCELLING, StepChange.CANCEL_ASKED): StepState.CANCELLING,
    (StepState.FAILED, StepChange.RETRIED): StepState.PENDING,
    (StepState.SKIPPED, StepChange.RETRIED): StepState.PENDING,
    (StepState.CANCELLED, StepChange.RETRIED): StepState.PENDING,
    # Steps for failures only: what they did is done anew if the run fails again.
    (StepState.SUCCEEDED, StepChange.RETRIED): StepState.PENDING,
}


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
    return proceed(started(run), event)


def started(run: Run) -> Run:
    """The same run, for `proceed`."""
    return replace(run, steps=RunProgress(run.steps))


def proceed(run: Run, event: Event) -> Advance:
    """
    As `advance`, for one event after another: the steps of the run are changed in place.

    Raises InvalidTransition; the run is of no use after that.
    """
    assert isinstance(run.steps, RunProgress), "it was started"
    retried = isinstance(event, RetryRequested)
    if (run.state in FINAL_RUNS) != retried or (retried and run.state is RunState.SUCCEEDED):
        raise InvalidTransition(f"run {run.id}", run.state, type(event).__name__)
    steps, commands = run.steps, list[Command]()
    state, ending = run.state, run.ending
    match event:
        case RunSubmitted():
            pass
        case RunAdmitted():
            if state is not RunState.BLOCKED:
                raise InvalidTransition(f"run {run.id}", state, "RunAdmitted")
            state = RunState.QUEUED
        case StepDecided():
            _decide(steps, event, commands)
        case StepClaimed(key, attempt):
            _change(steps, _at(run, key, attempt, event), StepChange.CLAIMED)
        case StepAwaited(key, attempt, delegated):
            _await(steps, _at(run, key, attempt, event), delegated, commands)
        case StepSucceeded(key, attempt, branch):
            _change(steps, replace(_at(run, key, attempt, event), branch=branch, delegated=False), StepChange.SUCCEEDED)
        case StepFailed():
            _fail(steps, replace(_at(run, event.key, event.attempt, event), delegated=False), event, commands)
        case DelayOver(key, attempt):
            _dispatch(steps, _change(steps, _at(run, key, attempt, event), StepChange.DELAY_OVER), commands)
        case StepOutOfTime(key):
            _time_out(steps, steps[key], commands)
        case StepCancelRequested(key):
            _cancel(steps, [steps[key]], commands)
        case CancelRequested(wanted):
            if state is RunState.COMPENSATING:
                raise InvalidTransition(f"run {run.id}", state, "CancelRequested")
            regular = (step for step in steps.values() if not step.rule.on_failure)
            _cancel(steps, [step for step in regular if step.state not in FINAL_STEPS], commands)
            state, ending = RunState.CANCELLING, ending or wanted
        case OutputComputed(made):
            if not made:
                ending = RunState.FAILED
        case RetryRequested():
            state, ending = RunState.RUNNING, None
            reset = dict(steps)
            _reset(reset)
            steps = RunProgress(reset)
    if state is RunState.QUEUED and not isinstance(event, RunSubmitted | RunAdmitted | StepDecided):
        state = RunState.RUNNING
    return _settle(replace(run, state=state, ending=ending), steps, commands, isinstance(event, OutputComputed))


def begin(key: str, rule: StepRule) -> RunStep:
    """A step that nothing has happened to."""
    return RunStep(key, StepState.PENDING, rule)


def _at(run: Run, key: str, attempt: int, event: Event) -> RunStep:
    step = run.steps[key]
    if step.attempt != attempt:
        raise InvalidTransition(
            f"step {key} of run {run.id}, attempt {step.attempt},", step.state, f"{type(event).__name__} of {attempt}"
        )
    return step


def _change(steps: dict[str, RunStep], step: RunStep, change: StepChange) -> RunStep:
    state = TRANSITIONS.get((step.state, change))
    if state is None:
        raise InvalidTransition(f"step {step.key}", step.state, change)
    changed = steps[step.key] = replace(step, state=state)
    return changed


def _dispatch(steps: dict[str, RunStep], step: RunStep, commands: list[Command]) -> None:
    """Send the step to its workers, under a new attempt."""
    steps[step.key] = replace(step, attempt=step.attempt + 1)
    commands.append(DispatchStep(step.key, step.attempt + 1))


def _decide(steps: dict[str, RunStep], event: StepDecided, commands: list[Command]) -> None:
    step = steps[event.key]
    if event.holds is None:
        _change(steps, step, StepChange.BROKEN)
    elif not event.holds:
        _change(steps, step, StepChange.NEED_MISSED)
    elif event.switch:
        _change(steps, replace(step, branch=event.branch), StepChange.DECIDED)
    else:
        _dispatch(steps, _change(steps, step, StepChange.NEEDS_MET), commands)


def _await(steps: dict[str, RunStep], step: RunStep, delegated: bool, commands: list[Command]) -> None:
    """Once a cancel was asked for, what goes on elsewhere is told at once, and what does not is over."""
    if step.delegated:
        raise InvalidTransition(f"step {step.key}", step.state, "StepAwaited for the second time")
    if step.state is not StepState.CANCELLING:
        _change(steps, replace(step, delegated=delegated), StepChange.AWAITED)
    elif delegated:
        steps[step.key] = replace(step, delegated=True)
        commands.append(StopStep(step.key))
    else:
        _change(steps, step, StepChange.FAILED)


def _fail(steps: dict[str, RunStep], step: RunStep, event: StepFailed, commands: list[Command]) -> None:
    lost = event.reason is FailureReason.WORKER_LOST
    failed = not lost and event.reason not in retry.NOT_COUNTED
    step = replace(step, failures=step.failures + failed, losses=step.losses + lost)
    others = step.rule.fallback
    another = others is not None and event.reason in others.on and step.model + 1 < step.rule.models
    if another and not event.late and not event.final:
        waiting = _change(steps, replace(step, model=step.model + 1, failures=0, losses=0), StepChange.FAILED)
        if waiting.state is StepState.WAITING:
            _dispatch(steps, _change(steps, waiting, StepChange.DELAY_OVER), commands)
        return
    record = retry.FailureCounts(step.failures, step.losses)
    decision = retry.decide(
        step.rule.retry,
        event.reason,
        record,
        max_losses=event.max_losses,
        chance=event.chance,
        retryable=event.retryable,
        late=event.late,
        final=event.final,
        not_before=event.not_before,
    )
    if isinstance(decision, retry.GiveUp):
        _change(steps, step, StepChange.FAILED_FOR_GOOD)
        commands.append(NoteGivenUp(step.key, decision.message))
        return
    waiting = _change(steps, step, StepChange.FAILED)
    if waiting.state is not StepState.WAITING:
        return
    if decision.delay:
        commands.append(DelayStep(step.key, decision.delay))
    else:
        _dispatch(steps, _change(steps, waiting, StepChange.DELAY_OVER), commands)


def _time_out(steps: dict[str, RunStep], step: RunStep, commands: list[Command]) -> None:
    """What nobody holds fails at once; what goes on elsewhere is stopped first, and has failed when that has ended."""
    if step.state is StepState.AWAITING and step.delegated:
        _change(steps, step, StepChange.CANCEL_ASKED)
        commands.append(StopStep(step.key))
    elif step.state is StepState.AWAITING:
        _change(steps, step, StepChange.FAILED_FOR_GOOD)
    else:
        _change(steps, step, StepChange.OUT_OF_TIME)


def _cancel(steps: dict[str, RunStep], wanted: list[RunStep], commands: list[Command]) -> None:
    for step in wanted:
        alone = step.state is StepState.AWAITING and not step.delegated
        changed = _change(steps, step, StepChange.DROPPED if alone else StepChange.CANCEL_ASKED)
        if changed.state is StepState.CANCELLING:
            commands.append(StopStep(step.key))


def _reset(steps: dict[str, RunStep]) -> None:
    """What did not succeed is to be done again, and what was done because of that was in vain."""
    for step in list(steps.values()):
        if step.state is not StepState.SUCCEEDED or step.rule.on_failure:
            fresh = replace(step, failures=0, losses=0, model=0, branch=None, asked=False)
            _change(steps, fresh, StepChange.RETRIED)


def _settle(run: Run, steps: RunProgress, commands: list[Command], computed: bool) -> Advance:
    """Begin what may begin, skip what cannot, and see whether the run has ended."""
    state, ending = run.state, run.ending
    if state in (RunState.QUEUED, RunState.RUNNING):
        _spread(steps, commands, on_failure=False)
    if state not in (RunState.COMPENSATING, RunState.BLOCKED) and steps.regular_ended:
        if ending is None and steps.missed:
            ending = RunState.FAILED
        if ending is None and run.computes_output and not computed:
            commands.append(ComputeOutput())
            return Advance(replace(run, state=state, steps=steps), tuple(commands))
        begun = any(steps[key].attempt for key in steps.regular)
        if ending is None or (ending is RunState.CANCELLED and not begun):
            for key in steps.others:
                if steps[key].state is StepState.PENDING:
                    _change(steps, steps[key], StepChange.NEED_MISSED)
        else:
            state = RunState.COMPENSATING
    if state is RunState.COMPENSATING:
        _spread(steps, commands, on_failure=True)
    if not steps.all_ended or state is RunState.BLOCKED:
        return Advance(replace(run, state=state, steps=steps, ending=ending), tuple(commands))
    final = ending or RunState.SUCCEEDED
    commands.append(FinishRun(final))
    return Advance(replace(run, state=final, steps=steps, ending=ending), tuple(commands))


def _spread(steps: RunProgress, commands: list[Command], *, on_failure: bool) -> None:
    """Carry what has ended over to the steps that waited for it, until nothing changes."""
    for step in steps.to_look_at(on_failure=on_failure):
        standing = steps.standing(step.key)
        if standing is False:
            _change(steps, step, StepChange.NEED_MISSED)
        elif standing and step.rule.decided:
            steps[step.key] = replace(step, asked=True)
            commands.append(DecideStep(step.key))
        elif standing:
            _dispatch(steps, _change(steps, step, StepChange.NEEDS_MET), commands)
