"""Effects: collected as values, and carried out after the commit by the owner of the transaction."""

from __future__ import annotations

import contextlib
from typing import Any
from uuid import UUID

import pytest

from app.kernel.errors import StepFailure
from app.workflows.language import check
from app.workflows.runs import submission
from app.workflows.runs.changes.cancellation import cancel_run
from app.workflows.runs.changes.change import open_change
from app.workflows.runs.changes.effects import AdmitRuns, AnswerCaller, CancelCalledRuns, CancelRun
from app.workflows.runs.messages import StepMessage
from app.workflows.runs.service import Runs
from app.workflows.runs.submission import Submission
from app.workflows.state_machine.outcomes import TokenUsage
from tests.workflows.conftest import StepWorker
from tests.workflows.language.test_language import flow
from tests.workflows.language.test_language import store as keep

TWO = flow("\n  - {id: a, kind: generate, prompt: hi}\n  - {id: b, kind: generate, prompt: hi}")
LIMITED = flow("\n  - {id: a, kind: generate, prompt: hi}", head="concurrency: {key: one, limit: 1}")
NEWEST = flow(
    "\n  - {id: a, kind: generate, prompt: hi}",
    name="newest",
    head="concurrency: {key: one, limit: 1, policy: cancel_running}",
)
CHILD = flow("\n  - {id: a, kind: generate, prompt: hi}", name="child")
PARENT = flow("\n  - {id: ask, kind: workflow, workflow: child}", name="parent")


class _RolledBack(Exception):
    """Ends a transaction."""


def created(runs: Runs, source: str) -> tuple[UUID, list[Any]]:
    """A new run, and the effects of its transaction before these are carried out."""
    prepared = submission.prepare(Submission(check.parse(source), {}), runs.policy)
    with runs.transaction() as transaction:
        submission.create(transaction, prepared)
        return prepared.id, list(transaction.effects)


def test_a_submission_has_a_message_for_each_ready_step(worker: StepWorker) -> None:
    run_id, effects = created(worker.runs, TWO)

    assert all(isinstance(effect, StepMessage) for effect in effects)
    assert [effect.name for effect in effects] == ["flow/a", "flow/b"]
    assert {effect.step_id for effect in effects} == {worker.step(run_id, key).id for key in "ab"}


def test_a_blocked_run_asks_for_admission_and_the_newest_cancels_the_others(worker: StepWorker) -> None:
    first = worker.submit(LIMITED)
    key = worker.run(first).concurrency_key
    assert created(worker.runs, LIMITED)[1] == [AdmitRuns(key)]

    second = worker.submit(NEWEST)
    _, effects = created(worker.runs, NEWEST)
    assert CancelRun(second, "a newer run of its concurrency key came") in effects


def test_the_end_of_a_called_run_answers_its_caller_and_a_cancel_stops_it(worker: StepWorker) -> None:
    keep(worker, CHILD)
    parent = worker.submit(PARENT)
    worker.do(worker.claim("ask", parent), {})
    ask = worker.step(parent, "ask")
    claim = worker.claim("a", ask.called_run_id)
    runs = worker.runs
    with contextlib.suppress(_RolledBack), runs.transaction() as transaction:
        change = open_change(transaction, ask.called_run_id)
        change.succeed("a", claim.attempt, "x", TokenUsage())
        change.write()
        assert transaction.effects == [AnswerCaller(ask.called_run_id)]
        raise _RolledBack
    assert worker.states(parent) == {"ask": "awaiting"}, "nothing follows a transaction that was rolled back"

    with contextlib.suppress(_RolledBack), runs.transaction() as transaction:
        cancel_run(transaction, parent, "stop")
        assert transaction.effects == [CancelCalledRuns(ask.id)]
        raise _RolledBack
    assert worker.run(ask.called_run_id).state == "running"


def test_an_effect_that_raises_stops_no_other(worker: StepWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the caller, whose commit stands, nor the effects that follow."""
    run_id = worker.submit(TWO)
    carried_out = []

    def admit(_: Runs, key: str) -> int:
        carried_out.append(key)
        if key == "a":
            raise StepFailure("internal", "a defect")  # type: ignore[arg-type] # as text
        return 0

    monkeypatch.setattr(Runs, "admit", admit)
    with worker.runs.transaction() as transaction:
        cancel_run(transaction, run_id, "stop")
        transaction.effects.extend([AdmitRuns("a"), AdmitRuns("b")])

    assert carried_out == ["a", "b"]
    assert worker.run(run_id).state == "cancelled"
