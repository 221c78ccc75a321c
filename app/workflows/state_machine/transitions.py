"""
The transitions of a run and its steps.

`TRANSITIONS` (steps) and `RUN_TRANSITIONS` (runs) are the tables of all state changes; a transition that is absent
raises InvalidTransition. `sql_changes` lists the statements that make some of them in SQL.
`proceed(run, event)` returns the run after an event and the commands that follow; it executes nothing itself.

A step becomes ready when its needs are met (`join`): all have succeeded, any has, or all have ended. When they cannot
be met any more, it is skipped, and other branches continue. Before a switch or a step with a condition, a command
requests the decision. The run fails when nothing is left to do and a step has failed that was not allowed to. After a
cancel no step begins; running steps are asked to stop, and the run ends when the last holder has answered or lost its
lease.
A run that does not succeed executes its `on_failure` steps before it ends.

Nothing here reads a clock, a database or chance.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from app.kernel.errors import FailureReason, InvalidTransition
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
    StepResumed,
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
    #: Its condition could not be computed.
    BROKEN = "broken"
    CLAIMED = "claimed"
    #: The holder has left it: it waits, or its work is delegated.
    AWAITED = "awaited"
    #: The items of an agent have ended, and its next turn is decided.
    RESUMED = "resumed"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    FAILED_FOR_GOOD = "failed_for_good"
    DELAY_OVER = "delay_over"
    OUT_OF_TIME = "out_of_time"
    CANCEL_REQUESTED = "cancel_requested"
    #: It was cancelled while it waited for time or an event: no holder has to answer.
    DROPPED = "dropped"
    RETRIED = "retried"
    #: Its run is a fork, and takes its output from the source.
    COPIED = "copied"
    #: Its run is ended without its definition.
    ABANDONED = "abandoned"


TRANSITIONS: Mapping[tuple[StepState, StepChange], StepState] = {
    (StepState.PENDING, StepChange.NEEDS_MET): StepState.READY,
    (StepState.PENDING, StepChange.NEED_MISSED): StepState.SKIPPED,
    (StepState.PENDING, StepChange.DECIDED): StepState.SUCCEEDED,
    (StepState.PENDING, StepChange.BROKEN): StepState.FAILED,
    (StepState.PENDING, StepChange.CANCEL_REQUESTED): StepState.CANCELLED,
    (StepState.READY, StepChange.CLAIMED): StepState.RUNNING,
    (StepState.READY, StepChange.OUT_OF_TIME): StepState.FAILED,
    (StepState.READY, StepChange.CANCEL_REQUESTED): StepState.CANCELLED,
    (StepState.RUNNING, StepChange.AWAITED): StepState.AWAITING,
    (StepState.RUNNING, StepChange.SUCCEEDED): StepState.SUCCEEDED,
    (StepState.RUNNING, StepChange.FAILED): StepState.WAITING,
    (StepState.RUNNING, StepChange.FAILED_FOR_GOOD): StepState.FAILED,
    (StepState.RUNNING, StepChange.CANCEL_REQUESTED): StepState.CANCELLING,
    (StepState.WAITING, StepChange.DELAY_OVER): StepState.READY,
    (StepState.WAITING, StepChange.OUT_OF_TIME): StepState.FAILED,
    (StepState.WAITING, StepChange.CANCEL_REQUESTED): StepState.CANCELLED,
    (StepState.AWAITING, StepChange.RESUMED): StepState.READY,
    (StepState.AWAITING, StepChange.SUCCEEDED): StepState.SUCCEEDED,
    (StepState.AWAITING, StepChange.FAILED): StepState.WAITING,
    (StepState.AWAITING, StepChange.FAILED_FOR_GOOD): StepState.FAILED,
    (StepState.AWAITING, StepChange.CANCEL_REQUESTED): StepState.CANCELLING,
    (StepState.AWAITING, StepChange.DROPPED): StepState.CANCELLED,
    # The work was done before its holder was notified of the cancel.
    (StepState.CANCELLING, StepChange.SUCCEEDED): StepState.SUCCEEDED,
    (StepState.CANCELLING, StepChange.FAILED): StepState.CANCELLED,
    (StepState.CANCELLING, StepChange.FAILED_FOR_GOOD): StepState.CANCELLED,
    (StepState.CANCELLING, StepChange.CANCEL_REQUESTED): StepState.CANCELLING,
    (StepState.FAILED, StepChange.RETRIED): StepState.PENDING,
    (StepState.SKIPPED, StepChange.RETRIED): StepState.PENDING,
    (StepState.CANCELLED, StepChange.RETRIED): StepState.PENDING,
    # `on_failure` steps, which are done again if the run fails again; and items of maps with another value.
    (StepState.SUCCEEDED, StepChange.RETRIED): StepState.PENDING,
    (StepState.PENDING, StepChange.COPIED): StepState.SUCCEEDED,
    (StepState.PENDING, StepChange.ABANDONED): StepState.SKIPPED,
    (StepState.READY, StepChange.ABANDONED): StepState.CANCELLED,
    (StepState.RUNNING, StepChange.ABANDONED): StepState.CANCELLED,
    (StepState.WAITING, StepChange.ABANDONED): StepState.CANCELLED,
    (StepState.AWAITING, StepChange.ABANDONED): StepState.CANCELLED,
    (StepState.CANCELLING, StepChange.ABANDONED): StepState.CANCELLED,
}

RUN_TRANSITIONS: Mapping[RunState, frozenset[RunState]] = {
    RunState.BLOCKED: frozenset({RunState.QUEUED, RunState.CANCELLING, RunState.FAILED}),
    RunState.QUEUED: frozenset(
        {RunState.RUNNING, RunState.CANCELLING, RunState.COMPENSATING, RunState.SUCCEEDED, RunState.FAILED}
    ),
    RunState.RUNNING: frozenset({RunState.CANCELLING, RunState.COMPENSATING, RunState.SUCCEEDED, RunState.FAILED}),
    # SUCCEEDED: an item of a map, whose work was done before its holder was notified of the cancel.
    RunState.CANCELLING: frozenset(
        {RunState.CANCELLING, RunState.COMPENSATING, RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED}
    ),
    RunState.COMPENSATING: frozenset({RunState.FAILED, RunState.CANCELLED}),
    RunState.SUCCEEDED: frozenset(),
    # By a retry.
    RunState.FAILED: frozenset({RunState.RUNNING}),
    RunState.CANCELLED: frozenset({RunState.RUNNING}),
}


@dataclass(frozen=True, slots=True)
class Advance:
    """The run after an event, and the commands to execute."""

    run: Run
    commands: tuple[Command, ...]


def tracked(run: Run) -> Run:
    """The same run, with the counts that `proceed` needs."""
    return replace(run, steps=RunProgress(run.steps))


def proceed(run: Run, event: Event) -> Advance:
    """
    Return the run after an event, with the commands that follow. The steps of the run are changed in place.

    Raises InvalidTransition when the event cannot happen: to a step in that state, for another attempt, or to a run
    that has ended. The run must not be used after that.
    """
    assert isinstance(run.steps, RunProgress), "the run is tracked"
    retried = isinstance(event, RetryRequested)
    if (run.state in FINAL_RUNS) != retried or (retried and run.state is RunState.SUCCEEDED):
        raise InvalidTransition(f"run {run.id}", run.state, _words(event))
    steps, commands = run.steps, list[Command]()
    state, ending = run.state, run.ending
    match event:
        case RunSubmitted():
            pass
        case RunAdmitted():
            state = _enter(run, state, RunState.QUEUED)
        case StepDecided():
            _decide(steps, event, commands)
        case StepClaimed(key, attempt):
            _change(steps, _at(run, key, attempt, event), StepChange.CLAIMED)
        case StepAwaited(key, attempt, delegated):
            _await(steps, _at(run, key, attempt, event), delegated, commands)
        case StepResumed(key, attempt):
            resumed = replace(_at(run, key, attempt, event), delegated=False)
            _dispatch(steps, _change(steps, resumed, StepChange.RESUMED), commands)
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
            state = _enter(run, state, RunState.CANCELLING)
            regular = (step for step in steps.values() if not step.rule.on_failure)
            _cancel(steps, [step for step in regular if step.state not in FINAL_STEPS], commands)
            ending = ending or wanted
        case OutputComputed(made):
            if not made:
                ending = RunState.FAILED
        case RetryRequested():
            state, ending = _enter(run, state, RunState.RUNNING), None
            reset = dict(steps)
            _reset(reset)
            steps = RunProgress(reset)
    if state is RunState.QUEUED and not isinstance(event, RunSubmitted | RunAdmitted | StepDecided):
        state = _enter(run, state, RunState.RUNNING)
    return _settle(replace(run, state=state, ending=ending), steps, commands, isinstance(event, OutputComputed))


def _words(event: Event) -> str:
    """The name of an event in words: `retry requested`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(event).__name__).lower()


def _enter(run: Run, state: RunState, new: RunState) -> RunState:
    if new not in RUN_TRANSITIONS[state]:
        raise InvalidTransition(f"run {run.id}", state, new)
    return new


def _at(run: Run, key: str, attempt: int, event: Event) -> RunStep:
    step = run.steps[key]
    if step.attempt != attempt:
        raise InvalidTransition(
            f"step {key} of run {run.id}, attempt {step.attempt},",
            step.state,
            f"{_words(event)} (of attempt {attempt})",
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
    """After the request of a cancel, delegated work is stopped at once, and a wait ends."""
    if step.delegated:
        raise InvalidTransition(f"step {step.key}", step.state, "step awaited, for the second time")
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
    """A step without a holder fails at once. Delegated work is stopped first, and its step fails at its end."""
    if step.state is StepState.AWAITING and step.delegated:
        _change(steps, step, StepChange.CANCEL_REQUESTED)
        commands.append(StopStep(step.key))
    elif step.state is StepState.AWAITING:
        _change(steps, step, StepChange.FAILED_FOR_GOOD)
    else:
        _change(steps, step, StepChange.OUT_OF_TIME)


def _cancel(steps: dict[str, RunStep], wanted: list[RunStep], commands: list[Command]) -> None:
    for step in wanted:
        alone = step.state is StepState.AWAITING and not step.delegated
        changed = _change(steps, step, StepChange.DROPPED if alone else StepChange.CANCEL_REQUESTED)
        if changed.state is StepState.CANCELLING:
            commands.append(StopStep(step.key))


def _reset(steps: dict[str, RunStep]) -> None:
    """Reset the steps that did not succeed, and all `on_failure` steps."""
    for step in list(steps.values()):
        if step.state is not StepState.SUCCEEDED or step.rule.on_failure:
            fresh = replace(step, failures=0, losses=0, model=0, branch=None, deciding=False)
            _change(steps, fresh, StepChange.RETRIED)


def _settle(run: Run, steps: RunProgress, commands: list[Command], computed: bool) -> Advance:
    """Begin or skip the steps whose needs are decided, and end the run if nothing is left."""
    state, ending = run.state, run.ending
    if state in (RunState.QUEUED, RunState.RUNNING):
        _propagate(steps, commands, on_failure=False)
    if state not in (RunState.COMPENSATING, RunState.BLOCKED) and steps.regular_ended:
        if ending is None and steps.failed:
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
            state = _enter(run, state, RunState.COMPENSATING)
    if state is RunState.COMPENSATING:
        _propagate(steps, commands, on_failure=True)
    if not steps.all_ended or state is RunState.BLOCKED:
        return Advance(replace(run, state=state, steps=steps, ending=ending), tuple(commands))
    final = _enter(run, state, ending or RunState.SUCCEEDED)
    commands.append(FinishRun(final))
    return Advance(replace(run, state=final, steps=steps, ending=ending), tuple(commands))


def _propagate(steps: RunProgress, commands: list[Command], *, on_failure: bool) -> None:
    """Begin or skip the steps that depend on ended ones, until nothing changes."""
    for step in steps.candidates(on_failure=on_failure):
        met = steps.needs_met(step.key)
        if met is False:
            _change(steps, step, StepChange.NEED_MISSED)
        elif met and step.rule.decided:
            steps[step.key] = replace(step, deciding=True)
            commands.append(DecideStep(step.key))
        elif met:
            _dispatch(steps, _change(steps, step, StepChange.NEEDS_MET), commands)
