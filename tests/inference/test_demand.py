"""Demand: the waiting steps that the planner reads, on the real Postgres."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest

from app.catalog import files
from app.inference import demand
from app.kernel.errors import InvalidInput, NotFound
from app.scheduler.observation import FleetDemand
from app.workflows import registry
from app.workflows.language import check
from app.workflows.runs import control, views
from app.workflows.runs.service import Runs
from app.workflows.runs.submission import Submission
from tests.workflows.conftest import StepWorker, fails_then, failure

TWO = """
workflow: two
defaults: {model: 'm:1'}
steps:
  - {id: a, kind: generate, prompt: x}
  - {id: b, kind: generate, model: 'n:1', prompt: x, needs: [a]}
"""
CATALOG = files.read_catalog()


def observed(runs: Runs) -> FleetDemand:
    return demand.observe(runs.database, CATALOG, ["smollm2:135m"])


def submit(runs: Runs, **more: Any) -> UUID:
    return runs.submit(Submission(check.parse(TWO), {}, **more)).id


def step_of(runs: Runs, run_id: UUID, key: str) -> UUID:
    id_: UUID = next(row for row in views.run(runs.database, run_id).steps if row.key == key).id
    return id_


def test_demand_is_grouped_by_model_priority_and_namespace(runs: Runs) -> None:
    for labels in ({"namespace": "team-a"}, {"namespace": "team-a"}, {}):
        submit(runs, labels=labels)
    paused = submit(runs, labels={"namespace": "team-b"}, priority="interactive")
    control.pause(runs, paused)

    found = {(one.model, one.namespace): one for one in observed(runs).waiting if one.ready is None}
    assert {key: one.steps for key, one in found.items()} == {("m:1", "team-a"): 2, ("m:1", "default"): 1}
    assert observed(runs).targets.keys() == {"smollm2:135m"}

    control.resume(runs, paused)
    assert ("m:1", "team-b") in {(one.model, one.namespace) for one in observed(runs).waiting}


def test_the_deadline_of_demand_is_that_of_the_start_of_a_step(runs: Runs) -> None:
    run_id = submit(runs, deadline=timedelta(minutes=5))
    (waiting,) = observed(runs).waiting
    assert waiting.deadline is not None
    assert waiting.deadline == views.run(runs.database, run_id).run.deadline_at - waiting.work


def test_future_steps_are_demand_and_running_steps_count_for_their_namespace(runs: Runs) -> None:
    worker = StepWorker(runs)
    run_id = submit(runs, labels={"namespace": "team-a"})
    worker.claim("a", run_id)

    found = observed(runs)
    (coming,) = found.waiting
    assert (coming.model, coming.namespace, coming.ready is not None) == ("n:1", "team-a", True)
    assert {worker: one.steps for worker, one in found.in_flight.items()} == {"worker": {"team-a": 1}}


def test_steps_in_flight_have_their_number_of_preemptions(runs: Runs) -> None:
    worker = StepWorker(runs)
    run_id = submit(runs)
    worker.do(worker.claim("a", run_id), {"a": failure("worker_stopped")})
    worker.claim("a", run_id)

    assert observed(runs).in_flight["worker"].preemptions == 1


def test_a_called_run_belongs_to_the_namespace_of_its_caller(runs: Runs) -> None:
    registry.put(runs.database, "two", check.parse(TWO), namespace="team-a")
    caller = "workflow: caller\nlabels: {namespace: team-a, other: x}\nsteps: [{id: c, kind: workflow, workflow: two}]"
    worker = StepWorker(runs)
    run_id = worker.submit(caller)
    worker.work(run_id)

    assert {one.namespace for one in observed(runs).waiting} == {"team-a"}


def test_an_invalid_namespace_label_is_rejected(runs: Runs) -> None:
    with pytest.raises(InvalidInput, match=r"labels.namespace: 'Team A' is not a valid name of a namespace"):
        submit(runs, labels={"namespace": "Team A"})
    assert observed(runs).waiting == []


def test_the_detail_of_a_step_says_what_it_waits_for(runs: Runs) -> None:
    worker = StepWorker(runs)
    run_id = submit(runs)
    a, b = step_of(runs, run_id, "a"), step_of(runs, run_id, "b")

    def detail(step: UUID) -> str:
        return demand.find_step(runs.database, step).detail

    assert (demand.find_step(runs.database, a).model, detail(a)) == ("m:1", "it waits for a slot of its model")
    assert "the steps that it needs" in detail(b)
    control.pause(runs, run_id)
    assert f"arriero runs resume {run_id}" in detail(a)
    control.resume(runs, run_id)
    claim = worker.claim("a", run_id)
    assert detail(a) == "it is running, on worker"
    worker.do(claim, {"a": fails_then("x", 100)})
    assert "the next one starts in" in detail(a)
    with pytest.raises(NotFound):
        demand.find_step(runs.database, run_id)
