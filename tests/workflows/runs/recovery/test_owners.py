"""Owners: the leases of a dead process expire at once, and no others."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from app.kernel.database import Database
from app.kernel.errors import LeaseLost
from app.workflows.runs import views
from app.workflows.runs.recovery import owners
from app.workflows.runs.service import Runs
from app.workflows.state_machine.outcomes import Success
from tests.workflows.conftest import StepWorker

TWO = """
workflow: two
steps:
  - {id: a, kind: generate, model: "m:1", prompt: hello}
  - {id: b, kind: generate, model: "m:1", prompt: hello}
"""
DEAD = owners.owner_of("pool.m-1.abc123", "here", 7, "0198c0de-0000-7000-8000-000000abc123")
#: The same names and pid: only its incarnation is another.
ALIVE = owners.owner_of("pool.m-1.abc123", "here", 7, "0198c0de-0000-7000-8000-000001abc123")


def test_the_steps_of_a_dead_process_are_requeued_at_once_and_recorded_once(worker: StepWorker, runs: Runs) -> None:
    run_id = worker.submit(TWO)
    worker.owner = DEAD
    lost = worker.claim("a", run_id)
    worker.owner = ALIVE
    kept = worker.claim("b", run_id)
    assert worker.sweep().lost == 0, "both leases hold"

    assert owners.expire_leases(runs.database, DEAD.rpartition("/")[2]) == 1
    assert owners.expire_leases(runs.database, DEAD.rpartition("/")[2]) == 0
    assert worker.sweep().lost == 1

    worker.work(run_id)
    with pytest.raises(LeaseLost):
        runs.succeed(lost, DEAD, Success("late"))
    runs.succeed(kept, ALIVE, Success("kept"))
    found = views.run(runs.database, run_id)
    assert found.run.output == {"a": "the text of a", "b": "kept"}
    outcomes = {step.key: [one.outcome for one in found.attempts[step.id]] for step in found.steps}
    assert outcomes == {"a": ["worker_lost", "succeeded"], "b": ["succeeded"]}


def test_a_result_that_was_recorded_before_the_end_of_its_process_stays(
    worker: StepWorker, runs: Runs, database: Database
) -> None:
    """A record in progress while the process is seen dead wins: its row is locked, and skipped."""
    worker.owner = DEAD
    run_id = worker.submit(TWO)
    claim = worker.claim("a", run_id)
    with database.work() as recording:
        recording.run(text("SELECT 1 FROM step WHERE id = :id FOR NO KEY UPDATE"), {"id": claim.step_id})
        assert owners.expire_leases(runs.database, DEAD.rpartition("/")[2]) == 0
    runs.succeed(claim, DEAD, Success("in time"))
    assert owners.expire_leases(runs.database, DEAD.rpartition("/")[2]) == 0
    assert worker.sweep().lost == 0


def test_a_long_worker_name_is_cut_and_the_incarnation_is_not() -> None:
    owner = owners.owner_of("pool." + "m" * 300, "here", 12345, "incarnation")
    assert len(owner) == owners.MAX_LENGTH
    assert owner.endswith("/12345/incarnation")
