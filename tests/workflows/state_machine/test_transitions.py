"""The state machine: invariants under random graphs and random histories."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.kernel.errors import FailureReason, InvalidTransition
from app.workflows.language.rule import StepRule
from app.workflows.language.step_work import Fallback, Retry
from app.workflows.state_machine import retry
from app.workflows.state_machine import transitions as runs
from app.workflows.state_machine.events import (
    CancelRequested,
    Command,
    ComputeOutput,
    DecideStep,
    DelayOver,
    DispatchStep,
    Event,
    FinishRun,
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
from app.workflows.state_machine.run import Run, RunStep
from app.workflows.state_machine.states import FINAL_RUNS, FINAL_STEPS, RunState, StepState
from app.workflows.state_machine.transitions import TRANSITIONS, Advance, StepChange


def run_of(needs: dict[str, tuple[str, ...]], **retry: int) -> Run:
    rule = Retry(**retry)
    steps = {
        key: RunStep(key, StepState.PENDING, StepRule(needs=tuple((need, None) for need in of), retry=rule))
        for key, of in needs.items()
    }
    return Run("r", RunState.QUEUED, steps)


def failed(key: str, attempt: int, reason: FailureReason = FailureReason.ENGINE_ERROR) -> StepFailed:
    return StepFailed(key, attempt, reason, chance=0.5, max_losses=3)


def after(run: Run, *events: Event) -> Advance:
    advanced = Advance(run, ())
    for event in events:
        advanced = runs.proceed(runs.tracked(advanced.run), event)
    return advanced


def states(run: Run) -> dict[str, str]:
    return {key: step.state.value for key, step in run.steps.items()}


def test_first_steps_are_sent_at_submission() -> None:
    advanced = after(run_of({"a": (), "b": (), "c": ("a", "b")}), RunSubmitted())

    assert advanced.commands == (DispatchStep("a", 1), DispatchStep("b", 1))
    assert states(advanced.run) == {"a": "ready", "b": "ready", "c": "pending"}
    assert advanced.run.state is RunState.QUEUED


def test_a_join_waits_for_all_its_needs() -> None:
    run = run_of({"a": (), "b": (), "c": ("a", "b")})
    events = (RunSubmitted(), StepClaimed("a", 1), StepClaimed("b", 1), StepSucceeded("a", 1))

    assert after(run, *events).commands == ()
    assert after(run, *events, StepSucceeded("b", 1)).commands == (DispatchStep("c", 1),)


def test_a_failed_step_skips_its_dependents_and_other_branches_continue() -> None:
    run = run_of({"a": (), "b": (), "c": ("a",), "d": ("c",), "e": ("b",)}, max_attempts=1)
    events = (RunSubmitted(), StepClaimed("a", 1), StepClaimed("b", 1), failed("a", 1))
    advanced = after(run, *events)

    assert states(advanced.run) == {"a": "failed", "b": "running", "c": "skipped", "d": "skipped", "e": "pending"}
    assert advanced.run.state is RunState.RUNNING

    ended = after(advanced.run, StepSucceeded("b", 1), StepClaimed("e", 1), StepSucceeded("e", 1))
    assert ended.commands == (FinishRun(RunState.FAILED),)


def test_a_failed_step_is_retried_after_a_delay_and_then_given_up() -> None:
    run = after(run_of({"a": ()}, max_attempts=2), RunSubmitted(), StepClaimed("a", 1)).run

    first = after(run, failed("a", 1))
    assert first.commands == (runs.DelayStep("a", timedelta(seconds=0.5)),)
    assert states(first.run) == {"a": "waiting"}

    second = after(first.run, DelayOver("a", 1))
    assert second.commands == (DispatchStep("a", 2),)

    last = after(second.run, StepClaimed("a", 2), failed("a", 2))
    assert last.commands == (runs.NoteGivenUp("a", "2 of 2 attempts failed"), FinishRun(RunState.FAILED))


def test_permanent_errors_are_not_retried() -> None:
    run = after(run_of({"a": ()}), RunSubmitted(), StepClaimed("a", 1)).run

    assert states(after(run, failed("a", 1, FailureReason.TEMPLATE_ERROR)).run) == {"a": "failed"}


def test_a_lost_worker_costs_no_attempt_but_counts_against_its_own_limit() -> None:
    run = after(run_of({"a": ()}, max_attempts=1), RunSubmitted()).run
    for attempt in (1, 2):
        advanced = after(run, StepClaimed("a", attempt), failed("a", attempt, FailureReason.WORKER_LOST))
        assert advanced.commands == (DispatchStep("a", attempt + 1),)
        run = advanced.run

    poisoned = after(run, StepClaimed("a", 3), failed("a", 3, FailureReason.WORKER_LOST))
    assert states(poisoned.run) == {"a": "failed"}
    assert "3 workers died" in next(c.message for c in poisoned.commands if isinstance(c, runs.NoteGivenUp))


def test_a_requeued_step_is_sent_at_once_and_costs_no_attempt() -> None:
    run = after(run_of({"a": ()}, max_attempts=1), RunSubmitted(), StepClaimed("a", 1)).run
    advanced = after(run, failed("a", 1, FailureReason.WORKER_STOPPED))

    assert advanced.commands == (DispatchStep("a", 2),)
    assert (advanced.run.steps["a"].failures, advanced.run.steps["a"].losses) == (0, 0)


def test_a_cancel_stops_running_steps_and_begins_no_others() -> None:
    run = after(run_of({"a": (), "b": (), "c": ("a",)}), RunSubmitted(), StepClaimed("a", 1)).run
    advanced = after(run, CancelRequested())

    assert advanced.commands == (StopStep("a"),)
    assert states(advanced.run) == {"a": "cancelling", "b": "cancelled", "c": "cancelled"}
    assert advanced.run.state is RunState.CANCELLING

    confirmed = after(advanced.run, failed("a", 1, FailureReason.CANCELLED))
    assert confirmed.commands == (FinishRun(RunState.CANCELLED),)


def test_a_cancel_of_a_run_that_has_not_begun_ends_it_at_once() -> None:
    advanced = after(run_of({"a": ()}), RunSubmitted(), CancelRequested())

    assert advanced.commands == (FinishRun(RunState.CANCELLED),)


def test_a_record_of_an_older_attempt_is_refused() -> None:
    run = after(
        run_of({"a": ()}),
        RunSubmitted(),
        StepClaimed("a", 1),
        failed("a", 1, FailureReason.WORKER_LOST),
        StepClaimed("a", 2),
    ).run

    with pytest.raises(InvalidTransition, match="attempt 2"):
        runs.proceed(runs.tracked(run), StepSucceeded("a", 1))


def test_events_of_a_run_that_has_ended_are_refused() -> None:
    run = after(run_of({"a": ()}), RunSubmitted(), StepClaimed("a", 1), StepSucceeded("a", 1)).run

    with pytest.raises(InvalidTransition, match="run r is succeeded"):
        runs.proceed(runs.tracked(run), CancelRequested())


def test_only_a_retry_leaves_a_final_state_and_every_other_state_has_a_transition() -> None:
    sources = {state for state, change in TRANSITIONS if change is not StepChange.RETRIED}

    assert not sources & FINAL_STEPS
    assert sources | FINAL_STEPS == set(StepState)
    assert {change for _, change in TRANSITIONS} == set(StepChange)


@st.composite
def graphs(draw: st.DrawFn) -> dict[str, StepRule]:
    """
    Acyclic graphs of up to eight steps, and up to two for failures: each needs some of those before it, or a branch of
    them, joined in any way; some are decided, have other models, or are allowed to fail.
    """
    rules: dict[str, StepRule] = {}
    for late, count in ((False, draw(st.integers(1, 8))), (True, draw(st.integers(0, 2)))):
        for i in range(count):
            before = [key for key, rule in rules.items() if rule.on_failure == late]
            needs = draw(st.lists(st.sampled_from(before), unique=True, max_size=3)) if before else []
            rules[f"{'undo' if late else 's'}{i}"] = StepRule(
                needs=tuple((need, draw(st.sampled_from([None, None, None, *BRANCHES]))) for need in needs),
                join=draw(st.sampled_from(["all", "all", "any", "all_done"])) if needs else "all",
                decided=draw(st.integers(0, 3)) == 0,
                retry=Retry(max_attempts=2),
                models=2,
                fallback=draw(st.sampled_from([None, Fallback(models=("b",), on=(FailureReason.TIMEOUT,))])),
                allow_failure=draw(st.integers(0, 4)) == 0,
                on_failure=late,
            )
    return rules


BRANCHES = ("left", "right")


@dataclass
class World:
    """The actions of workers, the sweep and clients on a run, and the invariants."""

    run: Run
    draw: Callable[[st.SearchStrategy[Any]], Any]
    #: Messages that were sent and may arrive, any number of times.
    sent: set[tuple[str, int]] = field(default_factory=set)
    #: Attempts that some worker believes that it holds, dead and late ones too.
    held: set[tuple[str, int]] = field(default_factory=set)
    #: Steps whose work goes on elsewhere, and must end before they have.
    delegated: set[tuple[str, int]] = field(default_factory=set)
    succeeded: list[str] = field(default_factory=list)
    begun: list[tuple[str, int]] = field(default_factory=list)
    #: Events that must be applied at once.
    requested: list[Event] = field(default_factory=list)
    cancelled: bool = False

    def apply(self, event: Event) -> None:
        before = self.run
        try:
            advanced = runs.proceed(runs.tracked(self.run), event)
        except InvalidTransition:
            return
        self._saw(event, before)
        self.run = advanced.run
        for command in advanced.commands:
            self._told(command)
        if self.requested:
            self.apply(self.requested.pop(0))
        else:
            self.check()

    def _saw(self, event: Event, before: Run) -> None:
        match event:
            case StepClaimed(key, attempt):
                step = before.steps[key]
                assert before.state not in FINAL_RUNS | {RunState.CANCELLING}, "nothing begins after a cancel"
                assert step.rule.on_failure == (before.state is RunState.COMPENSATING)
                assert self.stands(step.rule), "what it needs has come about"
                self.begun.append((key, attempt))
                self.held.add((key, attempt))
            case StepAwaited(key, attempt, delegated):
                self.held.discard((key, attempt))
                if delegated:
                    self.delegated.add((key, attempt))
            case StepSucceeded(key, attempt):
                self.succeeded.append(key)
                self.delegated.discard((key, attempt))
            case StepFailed(key=key, attempt=attempt):
                self.delegated.discard((key, attempt))
            case CancelRequested():
                self.cancelled = True
            case RetryRequested():
                self.cancelled = False
                # What undid is done again if the run fails again.
                self.succeeded = [key for key in self.succeeded if not before.steps[key].rule.on_failure]
            case _:
                pass

    def _told(self, command: Command) -> None:
        match command:
            case DispatchStep(key, attempt):
                assert (key, attempt) not in self.sent, "each dispatch has an attempt of its own"
                self.sent.add((key, attempt))
            case DecideStep(key):
                holds = self.draw(st.sampled_from([True, True, False, None]))
                switch = holds is True and self.draw(st.booleans())
                branch = self.draw(st.sampled_from([None, *BRANCHES])) if switch else None
                self.requested.append(StepDecided(key, holds, switch, branch))
                if switch:
                    self.succeeded.append(key)
            case ComputeOutput():
                self.requested.append(OutputComputed(self.draw(st.integers(0, 3)) > 0))
            case FinishRun(state):
                assert not self.delegated or state is not RunState.CANCELLED, "no step runs after a confirmed cancel"
                if self.cancelled:
                    assert state is not RunState.SUCCEEDED
            case _:
                pass

    def stands(self, rule: StepRule) -> bool:
        """Whether a step may begin, computed from the documentation of `join`."""
        found = []
        for need, branch in rule.needs:
            step = self.run.steps[need]
            met = step.state is StepState.SUCCEEDED and branch in (None, step.branch)
            found.append((met, step.state in FINAL_STEPS))
        match rule.join:
            case "all":
                return all(met for met, _ in found)
            case "any":
                return not found or any(met for met, _ in found)
            case "all_done":
                return all(ended for _, ended in found)

    def check(self) -> None:
        steps = self.run.steps.values()
        assert len(self.succeeded) == len(set(self.succeeded)), "no step succeeds twice"
        assert len(self.begun) == len(set(self.begun)), "no attempt is claimed twice"
        ended = all(step.state in FINAL_STEPS for step in steps)
        assert ended == (self.run.state in FINAL_RUNS), "a run ends exactly when nothing of it is left to do"
        regular = [step for step in steps if not step.rule.on_failure]
        missed = [step for step in regular if step.state in (StepState.FAILED, StepState.CANCELLED)]
        if self.run.state is RunState.SUCCEEDED:
            assert all(step.rule.allow_failure for step in missed)
            undone = {step.state for step in steps if step.rule.on_failure}
            assert undone <= {StepState.SKIPPED, StepState.CANCELLED}
        for step in steps:
            assert step.state in FINAL_STEPS or self.waits(step), f"{step.key} waits for something that will come"

    def waits(self, step: runs.Step) -> bool:
        match step.state:
            case StepState.READY:
                return (step.key, step.attempt) in self.sent
            case StepState.PENDING if self.run.state is RunState.BLOCKED:
                return True
            case StepState.PENDING if step.rule.on_failure:
                return self.run.state is not RunState.COMPENSATING or self._needs_open(step)
            case StepState.PENDING:
                return self._needs_open(step)
            case StepState.CANCELLING:
                return (step.key, step.attempt) in self.held | self.delegated
            case _:
                return True

    def _needs_open(self, step: runs.Step) -> bool:
        return any(self.run.steps[need].state not in FINAL_STEPS for need, _ in step.rule.needs)

    def choices(self) -> list[Event]:
        """Possible events, and many impossible ones."""
        found: list[Event] = [StepClaimed(key, attempt) for key, attempt in sorted(self.sent)]
        for key, attempt in sorted(self.held | self.delegated):
            found.append(StepSucceeded(key, attempt, self.draw(st.sampled_from([None, *BRANCHES]))))
            found += [failed(key, attempt, reason) for reason in _REASONS]
            found += [StepAwaited(key, attempt, delegated) for delegated in (False, True)]
            found.append(DelayOver(key, attempt))
        for key, step in self.run.steps.items():
            if step.state is StepState.AWAITING and not step.delegated:
                found.append(StepSucceeded(key, step.attempt))
            found.append(StepOutOfTime(key))
        return found


_REASONS = (FailureReason.ENGINE_ERROR, FailureReason.TIMEOUT, FailureReason.WORKER_LOST, FailureReason.WORKER_STOPPED)


@settings(max_examples=250, deadline=None)
@given(graphs(), st.booleans(), st.data())
def test_random_histories_keep_the_invariants(rules: dict[str, StepRule], computes: bool, data: st.DataObject) -> None:
    """Duplicated, lost and late messages, failures, deaths, waits, cancels of a run or a step, and retries."""
    steps = {key: RunStep(key, StepState.PENDING, rule) for key, rule in rules.items()}
    first = data.draw(st.sampled_from([RunState.QUEUED, RunState.QUEUED, RunState.BLOCKED]))
    world = World(Run("r", first, steps, computes_output=computes), data.draw)
    world.apply(RunSubmitted())
    if first is RunState.BLOCKED:
        assert {step.state for step in world.run.steps.values()} == {StepState.PENDING}
        world.apply(data.draw(st.sampled_from([RunAdmitted(), RunAdmitted(), CancelRequested()])))
    for _ in range(data.draw(st.integers(0, 40), label="events")):
        rare = data.draw(st.integers(0, 24), label="rare?")
        if rare == 0:
            world.apply(data.draw(st.sampled_from([CancelRequested(), CancelRequested(RunState.FAILED)])))
        elif rare == 1:
            world.apply(StepCancelRequested(data.draw(st.sampled_from(sorted(rules)))))
        elif world.run.state in FINAL_RUNS:
            world.apply(RetryRequested())
        elif choices := world.choices():
            world.apply(data.draw(st.sampled_from(choices), label="event"))
    _finish(world)


def _finish(world: World) -> None:
    """Workers that do their work, and a sweep, end the run from any state."""
    for _ in range(200):
        if world.run.state in FINAL_RUNS:
            return
        for step in list(world.run.steps.values()):
            match step.state:
                case StepState.READY:
                    world.apply(StepClaimed(step.key, step.attempt))
                case StepState.RUNNING | StepState.AWAITING:
                    world.apply(StepSucceeded(step.key, step.attempt))
                case StepState.CANCELLING:
                    world.apply(failed(step.key, step.attempt, FailureReason.CANCELLED))
                case StepState.WAITING:
                    world.apply(DelayOver(step.key, step.attempt))
                case _:
                    pass
    raise AssertionError(f"the run did not end: {states(world.run)}")


@pytest.mark.parametrize("failures", [1, 48, 99])
def test_delays_never_pass_their_cap_however_many_attempts_failed(failures: int) -> None:
    rule = Retry.model_validate({"max_attempts": 100, "delay": "1s", "factor": 100, "cap": "1m"})
    decided = retry.decide(rule, FailureReason.TIMEOUT, retry.FailureCounts(failures, 0), max_losses=3, chance=1.0)
    assert decided == retry.Again(timedelta(seconds=1 if failures == 1 else 60))


@pytest.mark.parametrize(("delay", "cap", "expected"), [("0s", "1m", 0), ("2m", "1m", 60), ("1s", "0s", 0)])
def test_delays_at_the_edges(delay: str, cap: str, expected: int) -> None:
    rule = Retry.model_validate({"max_attempts": 100, "delay": delay, "cap": cap})
    decided = retry.decide(rule, FailureReason.TIMEOUT, retry.FailureCounts(48, 0), max_losses=3, chance=1.0)
    assert decided == retry.Again(timedelta(seconds=expected))
