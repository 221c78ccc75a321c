"""Servers that are killed and restarted: every run ends, each step is recorded once, no worker needs a restart."""

from __future__ import annotations

from pytest_celery import CeleryBrokerCluster, CeleryWorkerCluster

from app.workflows.state_machine.states import RunState
from tests.faults.conftest import Cluster, generate, lattice, pids_of, until


def test_a_killed_broker_loses_no_step(
    cluster: Cluster, celery_broker_cluster: CeleryBrokerCluster, celery_worker_cluster: CeleryWorkerCluster
) -> None:
    """Valkey is killed and restarted: runs submitted before and meanwhile end, with each step executed once."""
    (valkey,) = celery_broker_cluster
    pool = cluster.pool()
    assert pool.ready()
    workers = pids_of(*celery_worker_cluster, pool)
    run_ids = [cluster.submit(generate(60)), *(cluster.submit(lattice()) for _ in range(20))]
    until(lambda: cluster.steps_done() >= 60)
    until(lambda: cluster.is_held(run_ids[0]) or cluster.state(run_ids[0]) == RunState.SUCCEEDED)

    valkey.kill("SIGKILL")
    assert cluster.open_runs() > 0, "runs were in progress"
    run_ids += [cluster.submit(lattice(1)), cluster.submit(generate(4))]
    valkey.restart()

    until(lambda: cluster.open_runs() == 0)
    cluster.assert_each_step_is_recorded_once(run_ids)
    assert pids_of(*celery_worker_cluster, pool) == workers
    errors = [
        line for node in celery_worker_cluster for line in node.logs().splitlines() if "concurrent.futures" in line
    ]
    assert errors == [], "the end of a task still wakes the consumer"


def test_a_broker_that_lost_its_data_loses_no_step(
    cluster: Cluster, celery_broker_cluster: CeleryBrokerCluster, celery_worker_cluster: CeleryWorkerCluster
) -> None:
    """Messages, the schedule and the lock of beat are deleted: the schedule is written again, and the sweep runs."""
    (valkey,) = celery_broker_cluster
    control, beat = celery_worker_cluster
    stand_by = cluster.beat("stand-by")
    workers = pids_of(control, beat, stand_by)
    run_ids = [cluster.submit(lattice()) for _ in range(20)]
    until(lambda: cluster.steps_done() >= 60)

    with valkey.container.client as client:
        client.flushall()
    assert cluster.open_runs() > 0, "runs were in progress"

    until(lambda: cluster.open_runs() == 0)
    cluster.assert_each_step_is_recorded_once(run_ids)
    assert pids_of(control, beat, stand_by) == workers


def test_a_killed_database_loses_no_step(cluster: Cluster, celery_worker_cluster: CeleryWorkerCluster) -> None:
    """Postgres is killed and restarted: every run ends, each step is recorded once, and the workers continue."""
    pool = cluster.pool()
    assert pool.ready()
    workers = pids_of(*celery_worker_cluster, pool)
    run_ids = [cluster.submit(generate(60)), *(cluster.submit(lattice()) for _ in range(20))]
    until(lambda: cluster.steps_done() >= 60)

    cluster.postgres.kill("SIGKILL")
    cluster.postgres.restart()
    assert until(cluster.open_runs) > 0, "runs were in progress"
    run_ids.append(cluster.submit(lattice(1)))

    until(lambda: cluster.open_runs() == 0)
    cluster.assert_each_step_is_recorded_once(run_ids)
    assert pids_of(*celery_worker_cluster, pool) == workers
    password = str(cluster.database.engine.url.password)
    assert [log.name for log in cluster.directory.rglob("*.log") if password in log.read_text(errors="replace")] == []
