"""200 runs of all kinds under random kills of workers and a loss of the broker's data: each ends, exactly once."""

from __future__ import annotations

import random
from collections import Counter
from uuid import UUID

import pytest
from pytest_celery import CeleryBrokerCluster
from sqlalchemy import text

from app.workflows import registry
from app.workflows.language import check
from app.workflows.state_machine.states import RunState
from tests.faults.conftest import Cluster, generate, lattice, until

#: The seed of the order of kills.
SEED = 11
KILLS = 8
#: The last kill happens before so many steps and items have ended, about two thirds of all.
STEPS = 1800

MAP = """
workflow: mapped
inputs: {numbers: {type: array}}
steps:
  - id: each
    kind: map
    over: inputs.numbers
    max_parallel: 4
    step: {kind: transform, cel: item * item}
  - {id: sum, kind: transform, needs: [each], cel: "steps.each.output.filter(n, n > 1500)"}
outputs: {found: steps.sum.output}
"""
BRANCHES = """
workflow: branches
inputs: {n: {type: integer}}
steps:
  - {id: route, kind: switch, cases: {even: inputs.n % 2 == 0}, default: odd}
  - {id: even, kind: wait, for: 1s, needs: [route.even]}
  - {id: odd, kind: transform, cel: inputs.n / 0, needs: [route.odd], retry: {max_attempts: 1}}
  - {id: end, kind: join, needs: [even, odd], join: any}
on_failure:
  - {id: sorry, kind: noop}
"""
CALLER = """
workflow: caller
steps:
  - {id: call, kind: workflow, workflow: called}
  - {id: end, kind: join, needs: [call]}
"""
CALLED = """
workflow: called
steps:
  - {id: a, kind: noop}
  - {id: b, kind: transform, cel: "'done'", needs: [a]}
"""
LIMITED = """
workflow: limited
concurrency: {limit: 2}
steps:
  - {id: a, kind: noop}
  - {id: b, kind: noop, needs: [a]}
"""

_ATTEMPTS = text("""
    SELECT step.run_id, step.key, step.kind, step.state,
           count(*) FILTER (WHERE outcome = 'succeeded') AS succeeded,
           count(*) FILTER (WHERE outcome = 'left') AS left_once,
           count(*) FILTER (WHERE attempt.step_id IS NOT NULL AND outcome IS NULL) AS lost
    FROM step LEFT JOIN attempt ON attempt.step_id = step.id GROUP BY step.id
""")


@pytest.mark.storm
def test_runs_of_every_kind_survive_random_kills_and_a_loss_of_the_broker_s_data(
    cluster: Cluster, celery_broker_cluster: CeleryBrokerCluster
) -> None:
    (valkey,) = celery_broker_cluster
    chance = random.Random(SEED)
    workers = [cluster.control("control-1"), cluster.control("control-2"), cluster.pool()]
    assert cluster.beat().ready()
    assert all(worker.ready() for worker in workers)
    registry.put(cluster.database, "called", check.parse(CALLED))

    run_ids: dict[UUID, str] = {}
    sources = {
        "lattice": lattice(4),
        "mapped": MAP,
        "branches": BRANCHES,
        "caller": CALLER,
        "limited": LIMITED,
        "writing": generate(4),
    }
    kinds = [*("lattice", "mapped", "branches", "caller") * 2, "limited", "writing"]
    for n in range(200):
        kind = kinds[n % len(kinds)]
        given = {"branches": {"n": n // len(kinds)}, "mapped": {"numbers": list(range(41))}}
        run_ids[cluster.submit(sources[kind], **given.get(kind, {}))] = kind

    killed = Counter[str]()
    for n in range(KILLS):
        until(lambda done=(n + 1) * STEPS // (KILLS + 2): cluster.steps_done() >= done)  # type: ignore[misc] # a default
        assert cluster.open_runs() > 0, "runs are in progress"
        worker = chance.choice(workers)
        worker.kill("SIGKILL")
        killed[worker.name()] += 1
        worker.container.restart_without_waiting()
        if n == KILLS // 2:
            valkey.kill("SIGKILL")
            valkey.restart()
            with valkey.container.client as client:
                client.flushall()

    until(lambda: cluster.open_runs() == 0, 300)
    assert sum(killed.values()) == KILLS
    states = {run_id: cluster.state(run_id) for run_id in run_ids}
    for run_id, kind in run_ids.items():
        odd = kind == "branches" and cluster.view(run_id).run.inputs["n"] % 2 == 1
        expected = RunState.FAILED if odd else RunState.SUCCEEDED
        assert states[run_id] == expected, (kind, cluster.view(run_id).run.error)
        if kind == "mapped":
            assert cluster.view(run_id).run.output == {"found": [1521, 1600]}
    with cluster.database.work() as work:
        for row in work.rows(_ATTEMPTS):
            described = (row.key, row.kind, row.state)
            assert row.lost == 0, described
            assert row.succeeded <= 1, described
            if row.state == "succeeded" and row.kind not in ("switch", "map", "workflow", "wait"):
                assert row.succeeded == 1, described
            if row.kind in ("map", "workflow", "wait") and row.state == "succeeded":
                assert row.left_once == 1, described
