"""Schedules under faults of beat, workers and broker: no instant is skipped, and none has two runs."""

from __future__ import annotations

from datetime import timedelta
from itertools import pairwise
from typing import Any

from pytest_celery import CeleryBrokerCluster

from app.workflows import registry
from app.workflows.language import check
from app.workflows.schedules.overlap import FireState
from app.workflows.schedules.schedule import Schedule
from app.workflows.schedules.service import Schedules
from app.workflows.state_machine.transitions import RunState
from tests.faults.conftest import Cluster, until

SECOND = timedelta(seconds=1)
TICKING = {
    "schedule": "ticking",
    "workflow": "tick",
    "every": "1s",
    "overlap": "allow",
    "catch_up": {"within": "10m", "runs": "all", "limit": 1000},
}


def test_no_fire_is_lost_or_doubled_when_beat_worker_and_broker_fail(
    cluster: Cluster, celery_broker_cluster: CeleryBrokerCluster
) -> None:
    """
    A schedule with an interval of a second, and two beats: the leader and a control worker are killed, and the broker
    loses its data. The stand-by takes over, and missed fires are caught up.
    """
    (valkey,) = celery_broker_cluster
    schedules = Schedules(cluster.runs, timedelta(days=1))
    registry.put(cluster.database, "tick", check.parse("workflow: tick\nsteps: [{id: a, kind: noop}]\n"))
    leader, control, other = cluster.beat("leader"), cluster.control("first"), cluster.control("second")
    assert leader.ready()
    stand_by = cluster.beat("stand-by")
    assert control.ready()
    assert other.ready()
    schedules.put(Schedule.model_validate(TICKING))

    def fires() -> list[Any]:
        """The fires in chronological order."""
        return schedules.fires("ticking", limit=1000).fires[::-1]  # type: ignore[return-value]  # it is a tuple

    until(lambda: len(fires()) >= 3)
    leader.kill("SIGKILL")
    control.kill("SIGKILL")
    with valkey.container.client as client:
        client.flushall()
    before = len(fires())
    until(lambda: len(fires()) >= before + 4)
    assert b"beat_elected" in stand_by.container.log()

    schedules.pause("ticking")
    until(lambda: not {fire.state for fire in fires()} & {FireState.WAITING, FireState.STARTING})
    until(lambda: cluster.open_runs() == 0)
    made = [fire for fire in fires() if fire.reason != "the schedule was paused"]
    assert {fire.state for fire in made} == {"fired"}
    assert {following.at - fire.at for fire, following in pairwise(made)} == {SECOND}
    assert len({fire.run_id for fire in made}) == len(made)
    assert cluster._count("SELECT count(*) AS n FROM run") == len(made)
    assert {cluster.state(fire.run_id) for fire in made} == {RunState.SUCCEEDED}
