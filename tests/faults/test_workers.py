"""Workers that die or are told to stop: what they held is finished by others, once."""

from __future__ import annotations

import time
from datetime import timedelta

from pytest_celery import CeleryWorkerCluster

from app.catalog import files
from app.workflows.state_machine.states import RunState
from tests.faults.conftest import MODEL, Stage, generate, lattice, until


def test_killed_pool_costs_no_run(stage: Stage, celery_worker_cluster: CeleryWorkerCluster) -> None:
    """What a killed pool held is taken from it when its lease ends, and done by the next one, once."""
    pool = stage.pool()
    run_ids = [stage.submit(generate(80)), stage.submit(generate(4)), stage.submit(generate(4))]
    until(lambda: stage.is_held(run_ids[0]))

    pool.kill("SIGKILL")
    assert stage.step(run_ids[0]).state == "running", "nobody knows yet"
    pool.restart()

    until(lambda: stage.open_runs() == 0)
    assert stage.outcomes(run_ids[0]) == ["worker_lost", "succeeded"]
    assert stage.step(run_ids[0]).losses == 1
    stage.assert_each_step_is_recorded_once(run_ids)


def test_killed_control_worker_costs_no_step(stage: Stage, celery_worker_cluster: CeleryWorkerCluster) -> None:
    """Short steps that a killed control worker held, or had been sent, are done by its replacement, each once."""
    control, _ = celery_worker_cluster
    run_ids = [stage.submit(lattice()) for _ in range(30)]
    until(lambda: stage.steps_done() >= 100)

    control.kill("SIGKILL")
    assert stage.open_runs() > 0, "it was in the middle"
    control.restart()

    until(lambda: stage.open_runs() == 0)
    stage.assert_each_step_is_recorded_once(run_ids)


def test_step_that_does_not_end_in_time_is_handed_back(stage: Stage) -> None:
    """A pool told to stop gives up a step that outlasts the drain; that costs the step nothing, and another does it."""
    first = stage.pool("first", drain=timedelta(seconds=0.2))
    run_id = stage.submit(generate(120))
    until(lambda: stage.is_held(run_id))

    first.kill("SIGTERM")
    second = stage.pool("second")

    until(lambda: not first.container.child.alive)
    assert first.container.child.returncode == 0
    until(lambda: stage.state(run_id) == RunState.SUCCEEDED)
    assert second.container.child.alive
    # A pool that stops may meet its own message once more before it has left the queue: then it hands it back again.
    *handed_back, last = stage.outcomes(run_id)
    assert (set(handed_back), last) == ({"worker_stopped"}, "succeeded")
    step = stage.step(run_id)
    assert (step.failures, step.losses) == (0, 0)


def test_step_that_ends_in_time_is_finished_by_a_pool_that_stops(stage: Stage) -> None:
    """A pool told to stop finishes what it holds, and then ends with exit code 0."""
    pool = stage.pool()
    run_id = stage.submit(generate(60))
    until(lambda: stage.is_held(run_id))

    pool.kill("SIGTERM")
    until(lambda: b"worker_draining" in pool.container.log())
    assert stage.outcomes(run_id) == [None], "it was in the middle"
    until(lambda: not pool.container.child.alive)

    assert pool.container.child.returncode == 0
    assert stage.outcomes(run_id) == ["succeeded"]
    assert stage.state(run_id) == RunState.SUCCEEDED


def test_cancelled_step_leaves_its_slot_at_once(stage: Stage) -> None:
    """A cancel stops the model within a few tokens, and the slot serves the next run."""
    stage.pool()
    measured = stage.submit(generate(20))
    until(lambda: stage.state(measured) == RunState.SUCCEEDED)
    step = stage.step(measured)
    token = (step.finished_at - step.started_at).total_seconds() / step.tokens_out

    slots = files.read_catalog().get(MODEL).slots
    endless = [stage.submit(generate(1500)) for _ in range(slots)]
    until(lambda: all(stage.is_held(run_id) for run_id in endless))
    following = stage.submit(generate(4))

    began = time.monotonic()
    assert stage.runs.cancel(endless[0]) == RunState.CANCELLING
    until(lambda: stage.state(endless[0]) == RunState.CANCELLED)
    assert time.monotonic() - began < 40 * slots * token + 2, f"of {1500 * slots * token:.0f} s"
    until(lambda: stage.state(following) == RunState.SUCCEEDED)

    assert stage.outcomes(endless[0]) == ["cancelled"]
    assert stage.outcomes(following) == ["succeeded"]
    assert stage.step(following).started_at > stage.step(endless[0]).finished_at, "it waited for the slot"
    assert all(stage.is_held(run_id) for run_id in endless[1:]), "the others go on"
