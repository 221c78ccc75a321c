"""Servers that die and come back: every run ends, each step is recorded once, and no worker needs a restart."""

from __future__ import annotations

from pytest_celery import CeleryBrokerCluster, CeleryWorkerCluster

from app.workflows.state_machine.states import RunState
from tests.faults.conftest import Stage, generate, lattice, pids_of, until


def test_killed_broker_costs_no_step(
    stage: Stage, celery_broker_cluster: CeleryBrokerCluster, celery_worker_cluster: CeleryWorkerCluster
) -> None:
    """Valkey is killed and comes back: what was submitted before, and meanwhile, is done, each step once."""
    (valkey,) = celery_broker_cluster
    pool = stage.pool()
    assert pool.ready()
    workers = pids_of(*celery_worker_cluster, pool)
    run_ids = [stage.submit(generate(60)), *(stage.submit(lattice()) for _ in range(20))]
    until(lambda: stage.steps_done() >= 60)
    until(lambda: stage.is_held(run_ids[0]) or stage.state(run_ids[0]) == RunState.SUCCEEDED)

    valkey.kill("SIGKILL")
    assert stage.open_runs() > 0, "it was in the middle"
    run_ids += [stage.submit(lattice(1)), stage.submit(generate(4))]
    valkey.restart()

    until(lambda: stage.open_runs() == 0)
    stage.assert_each_step_is_recorded_once(run_ids)
    assert pids_of(*celery_worker_cluster, pool) == workers
    errors = [
        line for node in celery_worker_cluster for line in node.logs().splitlines() if "concurrent.futures" in line
    ]
    assert errors == [], "the end of a task still wakes the consumer"


def test_broker_that_forgot_everything_costs_no_step(
    stage: Stage, celery_broker_cluster: CeleryBrokerCluster, celery_worker_cluster: CeleryWorkerCluster
) -> None:
    """Messages, the schedule and the lock of beat are flushed away: the schedule comes back, and with it the work."""
    (valkey,) = celery_broker_cluster
    control, beat = celery_worker_cluster
    stand_by = stage.beat("stand-by")
    workers = pids_of(control, beat, stand_by)
    run_ids = [stage.submit(lattice()) for _ in range(20)]
    until(lambda: stage.steps_done() >= 60)

    with valkey.container.client as client:
        client.flushall()
    assert stage.open_runs() > 0, "it was in the middle"

    until(lambda: stage.open_runs() == 0)
    stage.assert_each_step_is_recorded_once(run_ids)
    assert pids_of(control, beat, stand_by) == workers


def test_killed_database_costs_no_step(stage: Stage, celery_worker_cluster: CeleryWorkerCluster) -> None:
    """Postgres is killed in the middle and comes back: every run ends, each step is recorded once, workers live on."""
    pool = stage.pool()
    assert pool.ready()
    workers = pids_of(*celery_worker_cluster, pool)
    run_ids = [stage.submit(generate(60)), *(stage.submit(lattice()) for _ in range(20))]
    until(lambda: stage.steps_done() >= 60)

    stage.postgres.kill("SIGKILL")
    stage.postgres.restart()
    assert until(stage.open_runs) > 0, "it was in the middle"
    run_ids.append(stage.submit(lattice(1)))

    until(lambda: stage.open_runs() == 0)
    stage.assert_each_step_is_recorded_once(run_ids)
    assert pids_of(*celery_worker_cluster, pool) == workers
    password = str(stage.database.engine.url.password)
    assert [log.name for log in stage.directory.rglob("*.log") if password in log.read_text(errors="replace")] == []
