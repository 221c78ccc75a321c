"""The state machine: random graphs and random histories against what a run promises."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.kernel.errors import FailureReason, InvalidTransition
from app.workflows import run as runs
from app.workflows.events import (
    CancelRequested,
    DelayOver,
    DispatchStep,
    Event,
    FinishRun,
    RunSubmitted,
    StepClaimed,
    StepFailed,
    StepSucceeded,
    StopStep,
)
from app.workflows.run import TRANSITIONS, Advance, Change
from app.workflows.states import FINAL_RUNS, FINAL_STEPS, HELD_STEPS, Rule, Run, RunState, StepState
from app.workflows.steps import Retry


def run_of(needs: dict[str, tuple[str, ...]], **retry: int) -> Run:
    rule = Retry(**retry)
    steps = {
        key: runs.begin(key, Rule(needs=tuple((need, None) for need in of), retry=rule)) for key, of in needs.items()
    }
    return Run("r", RunState.QUEUED, steps)


def failed(key: str, attempt: int, reason: FailureReason = FailureReason.ENGINE_ERROR) -> StepFailed:
    return StepFailed(key, attempt, reason, chance=0.5, max_losses=3)


def after(run: Run, *events: Event) -> Advance:
    advanced = Advance(run, ())
    for event in events:
        advanced = runs.advance(advanced.run, event)
    return advanced


def states(run: Run) -> dict[str, str]:
    return {key: step.state.value for key, step in run.steps.items()}


def test_first_steps_are_sent_at_submission() -> None:
    advanced = after(run_of({"a": (), "b": (), "c": ("a", "b")}), RunSubmitted())

    assert advanced.commands == (DispatchStep("a", 1), DispatchStep("b", 1))
    assert states(advanced.run) == {"a": "ready", "b": "ready", "c": "pending"}
    assert advanced.run.state is RunState.QUEUED


def test_a_join_waits_for_all_that_it_needs() -> None:
    run = run_of({"a": (), "b": (), "c": ("a", "b")})
    events = (RunSubmitted(), StepClaimed("a", 1), StepClaimed("b", 1), StepSucceeded("a", 1))

    assert after(run, *events).commands == ()
    assert after(run, *events, StepSucceeded("b", 1)).commands == (DispatchStep("c", 1),)


def test_a_failed_step_skips_what_needs_it_and_lets_other_branches_go_on() -> None:
    run = run_of({"a": (), "b": (), "c": ("a",), "d": ("c",), "e": ("b",)}, max_attempts=1)
    events = (RunSubmitted(), StepClaimed("a", 1), StepClaimed("b", 1), failed("a", 1))
    advanced = after(run, *events)

    assert states(advanced.run) == {"a": "failed", "b": "running", "c": "skipped", "d": "skipped", "e": "pending"}
    assert advanced.run.state is RunState.RUNNING

    ended = after(advanced.run, StepSucceeded("b", 1), StepClaimed("e", 1), StepSucceeded("e", 1))
    assert ended.commands == (FinishRun(RunState.FAILED),)


def test_a_failure_is_tried_again_after_a_delay_and_then_given_up() -> None:
    run = after(run_of({"a": ()}, max_attempts=2), RunSubmitted(), StepClaimed("a", 1)).run

    first = after(run, failed("a", 1))
    assert first.commands == (runs.DelayStep("a", timedelta(seconds=0.5)),)
    assert states(first.run) == {"a": "waiting"}

    second = after(first.run, DelayOver("a", 1))
    assert second.commands == (DispatchStep("a", 2),)

    last = after(second.run, StepClaimed("a", 2), failed("a", 2))
    assert last.commands == (runs.NoteGivenUp("a", "2 of 2 attempts failed"), FinishRun(RunState.FAILED))


def test_reasons_that_would_only_come_back_are_not_retried() -> None:
    run = after(run_of({"a": ()}), RunSubmitted(), StepClaimed("a", 1)).run

    assert states(after(run, failed("a", 1, FailureReason.TEMPLATE_ERROR)).run) == {"a": "failed"}


def test_a_lost_worker_costs_no_attempt_but_is_not_forgiven_for_ever() -> None:
    run = after(run_of({"a": ()}, max_attempts=1), RunSubmitted()).run
    for attempt in (1, 2):
        advanced = after(run, StepClaimed("a", attempt), failed("a", attempt, FailureReason.WORKER_LOST))
        assert advanced.commands == (DispatchStep("a", attempt + 1),)
        run = advanced.run

    poisoned = after(run, StepClaimed("a", 3), failed("a", 3, FailureReason.WORKER_LOST))
    assert states(poisoned.run) == {"a": "failed"}
    assert "3 workers died" in next(c.why for c in poisoned.commands if isinstance(c, runs.NoteGivenUp))


def test_a_step_handed_back_is_sent_at_once_and_costs_nothing() -> None:
    run = after(run_of({"a": ()}, max_attempts=1), RunSubmitted(), StepClaimed("a", 1)).run
    advanced = after(run, failed("a", 1, FailureReason.WORKER_STOPPED))

    assert advanced.commands == (DispatchStep("a", 2),)
    assert (advanced.run.steps["a"].failures, advanced.run.steps["a"].losses) == (0, 0)


def test_a_cancel_stops_what_runs_and_keeps_the_rest_from_beginning() -> None:
    run = after(run_of({"a": (), "b": (), "c": ("a",)}), RunSubmitted(), StepClaimed("a", 1)).run
    advanced = after(run, CancelRequested())

    assert advanced.commands == (StopStep("a"),)
    assert states(advanced.run) == {"a": "cancelling", "b": "cancelled", "c": "cancelled"}
    assert advanced.run.state is RunState.CANCELLING

    confirmed = after(advanced.run, failed("a", 1, FailureReason.CANCELLED))
    assert confirmed.commands == (FinishRun(RunState.CANCELLED),)


def test_a_cancel_of_what_has_not_begun_ends_the_run_at_once() -> None:
    advanced = after(run_of({"a": ()}), RunSubmitted(), CancelRequested())

    assert advanced.commands == (FinishRun(RunState.CANCELLED),)


def test_a_record_of_an_old_attempt_is_refused() -> None:
    run = after(
        run_of({"a": ()}),
        RunSubmitted(),
        StepClaimed("a", 1),
        failed("a", 1, FailureReason.WORKER_LOST),
        StepClaimed("a", 2),
    ).run

    with pytest.raises(InvalidTransition, match="attempt 2"):
        runs.advance(run, StepSucceeded("a", 1))


def test_nothing_happens_to_a_run_that_has_ended() -> None:
    run = after(run_of({"a": ()}), RunSubmitted(), StepClaimed("a", 1), StepSucceeded("a", 1)).run

    with pytest.raises(InvalidTransition, match="run r is succeeded"):
        runs.advance(run, CancelRequested())


def test_no_edge_leaves_a_final_state_and_every_other_state_has_a_way_out() -> None:
    sources = {state for state, change in TRANSITIONS if change is not Change.RETRIED}

    assert not sources & FINAL_STEPS
    assert sources | FINAL_STEPS == set(StepState)
    assert {change for _, change in TRANSITIONS} == set(Change)


@st.composite
def graphs(draw: st.DrawFn) -> dict[str, tuple[str, ...]]:
    """Acyclic graphs of up to eight steps: each needs some of those before it."""
    count = draw(st.integers(1, 8))
    keys = [f"s{i}" for i in range(count)]
    return {
        key: tuple(draw(st.lists(st.sampled_from(keys[:i]), unique=True, max_size=3))) if i else ()
        for i, key in enumerate(keys)
    }


@dataclass
class World:
    """What workers, the sweep and clients can do to a run, and what must hold whatever they do."""

    run: Run
    #: Messages that were sent and may arrive, any number of times.
    sent: set[tuple[str, int]] = field(default_factory=set)
    #: Attempts that some worker believes that it holds, dead and late ones too.
    held: set[tuple[str, int]] = field(default_factory=set)
    succeeded: list[str] = field(default_factory=list)
    begun: list[tuple[str, int]] = field(default_factory=list)
    cancel_confirmed: bool = False

    def apply(self, event: Event) -> None:
        try:
            advanced = runs.advance(self.run, event)
        except InvalidTransition:
            return
        if isinstance(event, StepClaimed):
            assert not self.cancel_confirmed
            assert self.run.state is not RunState.CANCELLING, "nothing begins after a cancel"
            needs = [self.run.steps[need] for need, _ in self.run.steps[event.key].rule.needs]
            assert all(need.state is StepState.SUCCEEDED for need in needs)
            self.begun.append((event.key, event.attempt))
            self.held.add((event.key, event.attempt))
        if isinstance(event, StepSucceeded):
            self.succeeded.append(event.key)
        self.run = advanced.run
        for command in advanced.commands:
            if isinstance(command, DispatchStep):
                assert (command.key, command.attempt) not in self.sent, "each dispatch has an attempt of its own"
                self.sent.add((command.key, command.attempt))
            if isinstance(command, FinishRun):
                self.cancel_confirmed = command.state is RunState.CANCELLED
        self.check()

    def check(self) -> None:
        steps = self.run.steps.values()
        assert len(self.succeeded) == len(set(self.succeeded)), "no step succeeds twice"
        assert len(self.begun) == len(set(self.begun)), "no attempt is claimed twice"
        ended = all(step.state in FINAL_STEPS for step in steps)
        assert ended == (self.run.state in FINAL_RUNS), "a run ends exactly when nothing of it is left to do"
        if self.run.state is RunState.SUCCEEDED:
            assert set(self.succeeded) == set(self.run.steps)
        for step in steps:
            waits = {
                StepState.READY: (step.key, step.attempt) in self.sent,
                StepState.WAITING: True,
                StepState.PENDING: any(self.run.steps[need].state not in FINAL_STEPS for need, _ in step.rule.needs),
            }
            assert step.state in FINAL_STEPS | HELD_STEPS or waits[step.state], "it waits for something that will come"


_REASONS = (FailureReason.ENGINE_ERROR, FailureReason.TIMEOUT, FailureReason.WORKER_LOST, FailureReason.WORKER_STOPPED)


@settings(max_examples=150, deadline=None)
@given(graphs(), st.data())
def test_any_history_keeps_the_promises(needs: dict[str, tuple[str, ...]], data: st.DataObject) -> None:
    """Duplicated, lost and late messages, failures, deaths, a cancel: in any order."""
    world = World(run_of(needs, max_attempts=2))
    world.apply(RunSubmitted())
    for _ in range(data.draw(st.integers(0, 40), label="events")):
        if world.run.state in FINAL_RUNS:
            break
        choices: list[Event] = [StepClaimed(key, attempt) for key, attempt in sorted(world.sent)]
        for key, attempt in sorted(world.held):
            choices.append(StepSucceeded(key, attempt))
            choices.extend(failed(key, attempt, reason) for reason in _REASONS)
            choices.append(DelayOver(key, attempt))
        if data.draw(st.integers(0, 19), label="cancel?") == 0:
            choices = [CancelRequested()]
        if choices:
            world.apply(data.draw(st.sampled_from(choices), label="event"))
    _finish(world)


def _finish(world: World) -> None:
    """However it stands, workers that do their work and a sweep bring it to its end."""
    for _ in range(200):
        if world.run.state in FINAL_RUNS:
            return
        for step in list(world.run.steps.values()):
            match step.state:
                case StepState.READY:
                    world.apply(StepClaimed(step.key, step.attempt))
                case StepState.RUNNING:
                    world.apply(StepSucceeded(step.key, step.attempt))
                case StepState.CANCELLING:
                    world.apply(failed(step.key, step.attempt, FailureReason.CANCELLED))
                case StepState.WAITING:
                    world.apply(DelayOver(step.key, step.attempt))
                case _:
                    pass
    raise AssertionError(f"the run did not end: {states(world.run)}")
