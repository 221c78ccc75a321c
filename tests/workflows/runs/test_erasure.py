"""Runs are erased as a whole, with their payloads, and nothing that others need goes with them."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import text

from app.kernel import ids
from app.kernel.database import Database
from app.workflows import erasure, registry, retention
from app.workflows.language import check
from app.workflows.runs.service import Runs
from app.workflows.state_machine.states import RunState
from tests.workflows.conftest import StepWorker
from tests.workflows.language.test_language import flow

CALLED = flow("\n  - {id: inner, kind: generate, prompt: hi}", name="called")
CALLING = flow("""
  - {id: first, kind: generate, prompt: hi}
  - {id: call, kind: workflow, workflow: called, needs: [first]}
""")
LONG = "x" * 70_000


def counts(database: Database) -> dict[str, int]:
    found = {}
    with database.work() as work:
        for table in ("run", "step", "payload", "definition", "history"):
            row = work.row(text(f"SELECT count(*) AS count FROM {table}"))
            assert row is not None
            found[table] = int(row.count)
    return found


def called_run(database: Database) -> UUID:
    with database.work() as work:
        (row,) = work.rows(text("SELECT id FROM run WHERE parent_step_id IS NOT NULL"))
        assert isinstance(row.id, UUID)
        return row.id


def test_a_run_goes_with_its_caller_its_payloads_and_its_definition(runs: Runs, database: Database) -> None:
    worker = StepWorker(runs)
    registry.put(database, "called", check.parse(CALLED))
    before = counts(database)
    worker.submit(CALLING)
    worker.work(first=LONG + "1", inner=LONG + "2")
    assert counts(database)["payload"] > before["payload"]

    assert erasure.erase(runs, {called_run(database)}) == erasure.ErasedRuns(1, ())

    assert counts(database) == before


def test_what_another_run_needs_stays(runs: Runs, database: Database) -> None:
    worker = StepWorker(runs)
    registry.put(database, "called", check.parse(CALLED))
    gone, kept = worker.submit(CALLING), worker.submit(CALLING)
    worker.work(gone, first=LONG)
    worker.work(kept, first=LONG)
    worker.work()

    assert erasure.erase(runs, {gone, ids.new_id()}).removed == 1

    assert (erasure.left(runs, {gone, kept}), counts(database)["payload"]) == (1, 1)


def test_a_run_that_a_worker_holds_goes_when_it_has_ended(runs: Runs, database: Database) -> None:
    worker = StepWorker(runs)
    registry.put(database, "called", check.parse(CALLED))
    run_id = worker.submit(CALLING)
    claim = worker.claim("first")

    assert erasure.erase(runs, {run_id}) == erasure.ErasedRuns(0, (run_id,))
    assert runs.cancel(run_id) is RunState.CANCELLING
    worker.do(claim, {})

    worker.pass_time(seconds=1)
    retention.remove_runs(database)
    assert erasure.left(runs, {run_id}) == 0
