"""Demand is read every second: its cost, and its results with a large history in the database."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from uuid import UUID

import pytest
from sqlalchemy import text

from app.catalog import files
from app.inference import demand
from app.kernel.database import Database
from app.kernel.priority import Priority
from app.scheduler.observation import FleetDemand
from app.workflows.language import check
from app.workflows.runs.service import Runs
from app.workflows.runs.submission import Submission
from tests.growth import analyze, keep_ended, rows_read
from tests.workflows.conftest import StepWorker

MAP = """
workflow: maps
defaults: {model: 'm:1'}
inputs: {all: {type: array, items: {type: integer}}}
steps:
  - {id: read, kind: map, over: inputs.all, max_parallel: 2, step: {kind: generate, prompt: x}}
  - {id: after, kind: generate, model: 'n:1', prompt: x, needs: [read]}
"""
ONE = """
workflow: one
steps: [{id: a, kind: generate, model: 'm:1', prompt: x}]
"""
CATALOG = files.read_catalog()


@pytest.fixture
def one(database: Database) -> Iterator[Database]:
    """The same database with a single connection."""
    made = Database(database.url, pool_size=1)
    yield made
    made.close()


def observed(database: Database) -> FleetDemand:
    return demand.observe(database, CATALOG, [])


def cost(database: Database) -> int:
    observed(database)  # the first call plans and prepares the statements
    return rows_read(database, lambda: observed(database))


def submit_map(runs: Runs, items: int) -> UUID:
    """Submits a map of which two items are ready, and the others have not started."""
    worker = StepWorker(runs)
    run_id = worker.submit(MAP, all=list(range(items)))
    worker.do(worker.claim("read", run_id), {})
    analyze(runs.database)
    return run_id


def test_items_that_have_not_started_are_counted_and_not_read(runs: Runs, one: Database) -> None:
    costs = []
    for items in (1_000, 10_000):
        run_id = submit_map(runs, items)
        costs.append(cost(one))
        found = {(step.model, step.ready is not None): step for step in observed(one).waiting}
        assert {key: step.steps for key, step in found.items()} == {
            ("m:1", False): 2,
            ("m:1", True): items - 2,
            ("n:1", True): 1,
        }
        runs.cancel(run_id)
    assert costs[1] < costs[0] + 100


def test_a_step_after_a_map_is_expected_after_all_items(runs: Runs, one: Database) -> None:
    submit_map(runs, 100)
    found = {step.model: step for step in observed(one).waiting if step.ready is not None}
    assert found["m:1"].ready is not None
    assert found["n:1"].ready is not None
    rounds = (found["n:1"].ready - found["m:1"].ready) / found["n:1"].work
    assert 45 < rounds < 55  # 98 items wait, two at a time


def test_items_of_a_stopping_map_are_no_demand(runs: Runs, one: Database) -> None:
    submit_map(runs, 10)
    with runs.database.work() as work:
        work.run(text("UPDATE fan_out SET stopping = true"))
    assert not [step for step in observed(one).waiting if step.model == "m:1" and step.ready is not None]


def test_steps_of_ended_runs_are_not_read(runs: Runs, one: Database) -> None:
    runs.submit(Submission(check.parse(ONE), {}))
    costs = []
    for steps in (1_000, 9_000):
        keep_ended(runs.database, steps)
        costs.append(cost(one))
    assert costs[1] < costs[0] + 100


def test_ended_runs_are_not_read_for_ready_steps(runs: Runs, one: Database) -> None:
    for _ in range(100):
        runs.submit(Submission(check.parse(ONE), {}))
    costs = []
    for steps in (1_000, 9_000):
        keep_ended(runs.database, steps, each=1)
        costs.append(cost(one))
    assert costs[1] < costs[0] + 100


def test_each_ready_step_is_read_once(runs: Runs, one: Database) -> None:
    definition, costs = check.parse(ONE), []
    for more in (100, 900):
        for _ in range(more):
            runs.submit(Submission(definition, {}))
        analyze(runs.database)
        costs.append(cost(one))
    assert costs[1] < costs[0] * 15


def test_the_duration_of_old_attempts_is_used(runs: Runs, one: Database) -> None:
    """All attempts ended before the window: the arrival rate is that of the new step, their duration is known."""
    keep_ended(runs.database, 100)
    runs.submit(Submission(check.parse(ONE), {}))
    found = observed(one)
    assert [step.work for step in found.waiting] == [timedelta(hours=1)]
    assert found.rates["m:1"] == {"standard": pytest.approx(1 / 180)}
    assert found.requests["m:1"].priority is Priority.STANDARD
    with runs.database.work() as work:
        assert work.rows(text("SELECT max(ready_at) AS last FROM step"))[0].last == found.requests["m:1"].at


def test_the_duration_is_the_mean_of_the_last_attempts(runs: Runs, one: Database) -> None:
    """Delays before attempts, failed attempts and old attempts do not count."""
    keep_ended(runs.database, 200)
    worker = StepWorker(runs)
    for _ in range(50):
        run_id = worker.submit(ONE)
        worker.do(worker.claim("a", run_id), {})
    took = "UPDATE attempt SET started_at = finished_at - interval '2 s' WHERE finished_at > now() - interval '1 hour'"
    with runs.database.work() as work:
        work.run(text(took))
        work.run(text("UPDATE step SET started_at = finished_at - interval '1 minute' WHERE state = 'succeeded'"))
    worker.submit(ONE)
    assert [step.work for step in observed(one).waiting] == [timedelta(seconds=2)]


def test_a_model_without_attempts_has_the_default_duration(runs: Runs, one: Database) -> None:
    runs.submit(Submission(check.parse(ONE), {}))
    assert [step.work for step in observed(one).waiting] == [timedelta(seconds=5)]
