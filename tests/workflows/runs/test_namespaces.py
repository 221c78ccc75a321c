"""The namespace of what comes from a run: called runs, forks, and runs of schedules stay in it."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import text

from app.kernel.database import Database
from app.workflows import registry
from app.workflows.language import check
from app.workflows.runs import control, forks, views
from app.workflows.runs.control import Filter
from app.workflows.runs.service import Runs
from app.workflows.runs.submission import Submission
from app.workflows.schedules.schedule import Schedule
from app.workflows.schedules.service import Schedules
from tests import growth
from tests.workflows.conftest import StepWorker

#: Its own label names another namespace.
CALLED = "workflow: called\nlabels: {namespace: elsewhere}\nsteps: [{id: a, kind: noop}]"
CALLER = "workflow: caller\nsteps: [{id: c, kind: workflow, workflow: called}]"


def namespaces(runs: Runs) -> set[tuple[str, str, str]]:
    with runs.database.work() as work:
        rows = work.rows(text("SELECT workflow, namespace, COALESCE(labels ->> 'namespace', '') AS label FROM run"))
    return {(row.workflow, row.namespace, row.label) for row in rows}


@pytest.mark.parametrize(("namespace", "label"), [("a", "a"), ("default", "")])
def test_a_called_run_stays_in_the_namespace_of_its_caller(runs: Runs, namespace: str, label: str) -> None:
    registry.put(runs.database, "called", check.parse(CALLED), namespace=namespace)
    worker = StepWorker(runs)
    accepted = runs.submit(Submission(check.parse(CALLER), {}, namespace=namespace))
    worker.work(accepted.id)

    # Its own label, which names another one, gives way.
    assert namespaces(runs) == {("caller", namespace, label), ("called", namespace, namespace)}


def test_a_workflow_of_another_namespace_cannot_be_called(runs: Runs) -> None:
    registry.put(runs.database, "called", check.parse(CALLED), namespace="b")
    worker = StepWorker(runs)
    accepted = runs.submit(Submission(check.parse(CALLER), {}, namespace="a"))
    worker.work(accepted.id)

    step = views.run(runs.database, accepted.id).steps[0]
    assert step.state == "failed"
    assert step.error is not None
    assert "no workflow 'called'" in step.error["message"]


def test_a_fork_stays_in_the_namespace_of_its_source(runs: Runs) -> None:
    worker = StepWorker(runs)
    accepted = runs.submit(Submission(check.parse(CALLED), {}, namespace="a"))
    worker.work(accepted.id)
    forks.fork(runs, accepted.id, "a", {})

    assert namespaces(runs) == {("called", "a", "a")}


def test_the_run_of_a_schedule_belongs_to_the_namespace_of_the_schedule(runs: Runs) -> None:
    registry.put(runs.database, "called", check.parse(CALLED), namespace="a")
    schedules = Schedules(runs, timedelta(days=1), "a")
    document = {"schedule": "s", "workflow": "called", "every": "1d", "labels": {"namespace": "b"}}
    schedules.put(Schedule.model_validate(document))
    assert schedules.trigger("s").state == "fired"

    assert namespaces(runs) == {("called", "a", "a")}
    assert Schedules(runs, timedelta(days=1), "b").all("b") == []


def test_what_a_namespace_costs_does_not_grow_with_the_runs_of_others(runs: Runs) -> None:
    """Its lists, its look-ups by a part of an id, and its requests for many read its own rows."""
    one = Database(runs.database.url, pool_size=1)
    alone = Runs(one, runs.publisher, runs.policy)
    mine = [runs.submit(Submission(check.parse(CALLED), {}, namespace="a")).id for _ in range(3)]

    def looks() -> None:
        assert [run.id for run in views.page(one, limit=50, namespace="a").runs] == mine[::-1]
        assert len(views.page(one, limit=50, namespace="a", states=["queued"]).runs) == 3
        assert views.find(one, str(mine[0]), "a") == mine[0]
        assert views.find(one, str(mine[0])[-12:], "a") == mine[0]
        assert control.retry_all(alone, Filter(namespace="a")).done == []

    try:
        growth.keep_ended(one, 2_000, each=1)
        looks()  # what is read once
        few = growth.rows_read(one, looks)
        growth.keep_ended(one, 20_000, each=1)
        many = growth.rows_read(one, looks)
    finally:
        one.close()
    assert many < few + 1_000
