"""Workers that are killed or stopped: other workers finish their steps, exactly once."""

from __future__ import annotations

import time
from datetime import timedelta

from pytest_celery import CeleryWorkerCluster

from app.catalog import files
from app.workflows.state_machine.states import RunState
from tests.faults.conftest import MODEL, Cluster, generate, lattice, until


def test_a_killed_pool_loses_no_run(cluster: Cluster, celery_worker_cluster: CeleryWorkerCluster) -> None:
    """The steps of a killed pool are requeued when their leases expire, and the next pool executes them once."""
    pool = cluster.pool()
    run_ids = [cluster.submit(generate(80)), cluster.submit(generate(4)), cluster.submit(generate(4))]
    until(lambda: cluster.is_held(run_ids[0]))

    pool.kill("SIGKILL")
    assert cluster.step(run_ids[0]).state == "running", "the lease has not expired yet"
    pool.restart()

    until(lambda: cluster.open_runs() == 0)
    assert cluster.outcomes(run_ids[0]) == ["worker_lost", "succeeded"]
    assert cluster.step(run_ids[0]).losses == 1
    cluster.assert_each_step_is_recorded_once(run_ids)


def test_a_killed_control_worker_loses_no_step(cluster: Cluster, celery_worker_cluster: CeleryWorkerCluster) -> None:
    """The replacement of a killed control worker executes its claimed steps and its messages, each once."""
    control, _ = celery_worker_cluster
    run_ids = [cluster.submit(lattice()) for _ in range(30)]
    until(lambda: cluster.steps_done() >= 100)

    control.kill("SIGKILL")
    assert cluster.open_runs() > 0, "runs were in progress"
    control.restart()

    until(lambda: cluster.open_runs() == 0)
    cluster.assert_each_step_is_recorded_once(run_ids)


def test_a_step_that_does_not_end_within_the_drain_timeout_is_requeued(cluster: Cluster) -> None:
    """A stopping pool requeues a step that exceeds the timeout; that is no failure, and another pool executes it."""
    first = cluster.pool("first", drain=timedelta(seconds=0.2))
    run_id = cluster.submit(generate(120))
    until(lambda: cluster.is_held(run_id))

    first.kill("SIGTERM")
    second = cluster.pool("second")

    until(lambda: not first.container.child.alive)
    assert first.container.child.returncode == 0
    until(lambda: cluster.state(run_id) == RunState.SUCCEEDED)
    assert second.container.child.alive
    # A stopping pool may receive the requeued message before it stops to consume; then it requeues the step again.
    *earlier, last = cluster.outcomes(run_id)
    assert (set(earlier), last) == ({"worker_stopped"}, "succeeded")
    step = cluster.step(run_id)
    assert (step.failures, step.losses) == (0, 0)


def test_a_stopping_pool_finishes_a_step_that_ends_within_the_drain_timeout(cluster: Cluster) -> None:
    """A stopping pool finishes its steps, and ends with exit code 0."""
    pool = cluster.pool()
    run_id = cluster.submit(generate(60))
    until(lambda: cluster.is_held(run_id))

    pool.kill("SIGTERM")
    until(lambda: b"worker_draining" in pool.container.log())
    assert cluster.outcomes(run_id) == [None], "runs were in progress"
    until(lambda: not pool.container.child.alive)

    assert pool.container.child.returncode == 0
    assert cluster.outcomes(run_id) == ["succeeded"]
    assert cluster.state(run_id) == RunState.SUCCEEDED


def test_a_cancelled_step_frees_its_slot_immediately(cluster: Cluster) -> None:
    """A cancel stops the model within a few tokens, and the next run gets the slot."""
    cluster.pool()
    measured = cluster.submit(generate(20))
    until(lambda: cluster.state(measured) == RunState.SUCCEEDED)
    step = cluster.step(measured)
    token = (step.finished_at - step.started_at).total_seconds() / step.tokens_out

    slots = files.read_catalog().get(MODEL).slots
    endless = [cluster.submit(generate(1500)) for _ in range(slots)]
    until(lambda: all(cluster.is_held(run_id) for run_id in endless))
    following = cluster.submit(generate(4))

    began = time.monotonic()
    assert cluster.runs.cancel(endless[0]) == RunState.CANCELLING
    until(lambda: cluster.state(endless[0]) == RunState.CANCELLED)
    assert time.monotonic() - began < 40 * slots * token + 2, f"of {1500 * slots * token:.0f} s"
    until(lambda: cluster.state(following) == RunState.SUCCEEDED)

    assert cluster.outcomes(endless[0]) == ["cancelled"]
    assert cluster.outcomes(following) == ["succeeded"]
    assert cluster.step(following).started_at > cluster.step(endless[0]).finished_at, "it waited for the slot"
    assert all(cluster.is_held(run_id) for run_id in endless[1:]), "the others continue"
