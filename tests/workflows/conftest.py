"""StepWorker: a test double of a worker, with which a test controls the outcome of each step and its time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from app.kernel import settings
from app.kernel.errors import FailureReason, LeaseLost, StepFailure
from app.memory.recall.service import Recall
from app.workflows.language import check
from app.workflows.language.agent import AgentCall, AgentFields, AgentTurn
from app.workflows.language.http_fields import HttpFields
from app.workflows.language.steps import MODEL_KINDS
from app.workflows.runs import control, views
from app.workflows.runs.claims import Claim
from app.workflows.runs.recovery.sweep import sweep
from app.workflows.runs.service import Runs
from app.workflows.runs.submission import Submission
from app.workflows.state_machine.outcomes import Failure, Outcome, Success
from workers import step_kinds
from workers.leases import Holding

_READY = text("""
    SELECT step.id, step.key, step.attempt, step.run_id, step.queue FROM step JOIN run ON run.id = step.run_id
    WHERE step.state = 'ready' AND (CAST(:run AS uuid) IS NULL OR run_id = :run) ORDER BY run.id, position, item
""")

#: The outcome of a step: a value, an outcome, or a function of the claim that returns one.
Answer = Any


class StepWorker:
    """Runs the steps of runs one by one, like a worker."""

    owner = "worker@here/1/abc"

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        #: Keys of the executed steps, in order.
        self.done: list[str] = []

    def submit(self, source: str, **inputs: Any) -> UUID:
        return self.runs.submit(Submission(check.parse(source), inputs)).id

    def ready(self, run_id: UUID | None = None) -> list[Any]:
        with self.runs.database.work() as work:
            return work.rows(_READY, {"run": run_id})

    def claim(self, key: str, run_id: UUID | None = None) -> Claim:
        row = next(row for row in self.ready(run_id) if row.key == key)
        claim = self.runs.claim(row.id, row.attempt, self.owner)
        assert claim is not None, f"{key} can be taken"
        return claim

    def work(self, run_id: UUID | None = None, *, limit: int = 1000, **answers: Answer) -> None:
        """Run ready steps until none is left. The answer of a map also applies to its items."""
        for _ in range(limit):
            claims = (self.runs.claim(row.id, row.attempt, self.owner) for row in self.ready(run_id))
            claim = next((claim for claim in claims if claim is not None), None)
            if claim is None:
                return
            while claim is not None:
                claim = self.do(claim, answers)
        raise AssertionError("the steps do not end")

    def do(self, claim: Claim, answers: Mapping[str, Answer]) -> Claim | None:
        self.done.append(claim.key)
        outcome = self._outcome(claim, answers)
        try:
            match outcome:
                case Success():
                    return self.runs.succeed(claim, self.owner, outcome)
                case Failure():
                    self.runs.fail(claim, self.owner, outcome)
                case _:
                    self.runs.leave(claim, self.owner, outcome)
        except LeaseLost:
            pass
        except StepFailure as error:
            self.runs.fail(claim, self.owner, Failure(error.reason, error.message))
        return None

    def _outcome(self, claim: Claim, answers: Mapping[str, Answer]) -> Outcome:
        key = claim.key if claim.key in answers else claim.key.partition("[")[0]
        own = isinstance(claim.work, (*MODEL_KINDS, HttpFields, AgentTurn)) or (
            isinstance(claim.work, AgentCall) and claim.key in answers
        )
        own = own and not isinstance(claim.work, AgentFields)
        if own:
            answer = answers.get(key, f"the text of {claim.key}")
            found = answer(claim) if callable(answer) else answer
            return found if isinstance(found, Success | Failure) else Success(found)
        own_settings = settings.load(environment={}).settings
        runtime: Any = SimpleNamespace(
            runs=self.runs, recall=Recall(self.runs.database), engine=None, settings=own_settings, refinements=None
        )
        try:
            return step_kinds.execute(step_kinds.StepTask(claim, Holding(claim), runtime))
        except StepFailure as error:
            return Failure(error.reason, error.message)

    def sweep(self) -> Any:
        return sweep(self.runs, republish_after=timedelta(seconds=60))

    def pass_time(self, **interval: float) -> None:
        """Simulate the passing of time: moves all stored times into the past."""
        passed = timedelta(**interval)
        with self.runs.database.work() as work:
            work.run(
                text(
                    "UPDATE step SET not_before = not_before - CAST(:p AS interval),"
                    " deadline_at = deadline_at - CAST(:p AS interval)"
                ),
                {"p": passed},
            )
            work.run(
                text(
                    "UPDATE run SET deadline_at = deadline_at - CAST(:p AS interval),"
                    " created_at = created_at - CAST(:p AS interval),"
                    " finished_at = finished_at - CAST(:p AS interval),"
                    " expires_at = expires_at - CAST(:p AS interval)"
                ),
                {"p": passed},
            )

    def run(self, run_id: UUID) -> Any:
        return views.run(self.runs.database, run_id).run

    def states(self, run_id: UUID) -> dict[str, str]:
        return {row.key: row.state for row in views.run(self.runs.database, run_id).steps}

    def step(self, run_id: UUID, key: str) -> Any:
        return next(row for row in views.run(self.runs.database, run_id).steps if row.key == key)

    def items(self, run_id: UUID, key: str) -> list[Any]:
        return views.items(self.runs.database, run_id, key, limit=10_000)

    def history(self, run_id: UUID) -> list[Any]:
        return views.history(self.runs.database, run_id)[1]

    def send_event(self, run_id: UUID, name: str, payload: Any = None, key: str | None = None) -> control.SentEvent:
        return control.send_event(self.runs, run_id, name, payload, key)


def failure(reason: str = "engine_error", message: str = "it broke") -> Failure:
    return Failure(FailureReason(reason), message)


def fails_then(value: Any, times: int = 1, reason: str = "engine_error") -> Callable[[Claim], Any]:
    """Return an answer that fails `times` times for each key and then returns the value."""
    counts: dict[str, int] = {}

    def answer(claim: Claim) -> Any:
        counts[claim.key] = counts.get(claim.key, 0) + 1
        return failure(reason) if counts[claim.key] <= times else value

    return answer


@pytest.fixture
def worker(runs: Runs) -> StepWorker:
    """A worker for the runs of the test."""
    return StepWorker(runs)
