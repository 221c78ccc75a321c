"""Steps whose outcome cannot be recorded: the step fails with the reason, and is not executed again."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from app.catalog.catalog import Catalog
from app.kernel.activity import Activity
from app.kernel.security.secrets import Secrets
from app.kernel.settings import Settings
from app.scheduler.wake_up import AgentCalls
from app.workflows.language import check
from app.workflows.runs import claims, views
from app.workflows.runs.changes import change as changes
from app.workflows.runs.service import Runs
from app.workflows.runs.submission import Submission
from app.workflows.state_machine.outcomes import Success
from workers import step_kinds
from workers.leases import Leases
from workers.runtime import Runtime
from workers.steps import run_step

#: The step would be retried after these failures.
SOURCE = """
workflow: w
steps:
  - {id: a, kind: noop, retry: {max_attempts: 5, delay: 0s, on: [internal, worker_lost]}}
on_failure:
  - {id: undo, kind: noop}
"""


@pytest.fixture
def runtime(runs: Runs, tmp_path: Path) -> Iterator[Runtime]:
    leases = Leases(runs, "w@here/1/x", interval=timedelta(seconds=1), stalled_for=lambda: timedelta(0))
    leases.start()
    yield Runtime(
        Settings(),
        runs,
        leases,
        None,
        Secrets(tmp_path),
        Catalog(),
        Activity("redis://127.0.0.1:1"),
        AgentCalls("redis://127.0.0.1:1"),
    )
    leases.close()


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of the executed steps, in order."""
    found: list[str] = []

    def execute(task: step_kinds.StepTask) -> Success:
        found.append(task.claim.key)
        return Success(None)

    monkeypatch.setattr(step_kinds, "execute", execute)
    return found


def submit(runs: Runs) -> UUID:
    return runs.submit(Submission(check.parse(SOURCE), {})).id


def work(runtime: Runtime) -> None:
    """Execute steps as their messages would, until no step is ready."""
    while True:
        with runtime.runs.database.work() as work:
            row = work.row(text("SELECT id, attempt FROM step WHERE state = 'ready' LIMIT 1"))
        if row is None:
            return
        run_step(runtime, row.id, row.attempt)


def test_an_outcome_that_cannot_be_recorded_fails_the_step_which_is_not_executed_again(
    runtime: Runtime, executed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = submit(runtime.runs)
    monkeypatch.setattr(changes.RunChange, "succeed", raises)
    work(runtime)

    found = views.run(runtime.runs.database, run_id)
    assert executed == ["a", "undo"]
    assert found.run.state == "failed"
    assert "OverflowError: a defect" in found.run.error["message"]
    (step, _) = found.steps
    assert (step.state, step.attempt, step.error["reason"]) == ("failed", 1, "internal")
    assert "not repeated" in step.error["given_up"]


def test_the_run_ends_when_the_failure_cannot_be_recorded_either(
    runtime: Runtime, executed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = submit(runtime.runs)
    monkeypatch.setattr(changes.RunChange, "write", raises)
    work(runtime)

    found = views.run(runtime.runs.database, run_id)
    assert executed == ["a"]
    assert found.run.state == "failed"
    assert "OverflowError: a defect" in found.run.error["message"]


def test_a_step_that_cannot_be_claimed_ends_its_run(
    runtime: Runtime, executed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = submit(runtime.runs)
    monkeypatch.setattr(claims, "take", raises)
    work(runtime)

    found = views.run(runtime.runs.database, run_id)
    assert executed == []
    assert found.run.state == "failed"
    assert "OverflowError: a defect" in found.run.error["message"]


def raises(*_: Any, **__: Any) -> None:
    raise OverflowError("a defect")
