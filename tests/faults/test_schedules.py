"""Schedules, while what drives them dies: no instant is passed over, none has two runs."""

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
from tests.faults.conftest import Stage, until

SECOND = timedelta(seconds=1)
TICKING = {
    "schedule": "ticking",
    "workflow": "tick",
    "every": "1s",
    "overlap": "allow",
    "catch_up": {"within": "10m", "runs": "all", "limit": 1000},
}


def test_killed_beat_and_control_worker_and_a_lost_broker_double_and_drop_no_fire(
    stage: Stage, celery_broker_cluster: CeleryBrokerCluster
) -> None:
    """
    A schedule of each second and two beats: the leader is killed together with a control worker, and the broker
    forgets everything. The stand-by goes on, and what came due meanwhile is made up.
    """
    (valkey,) = celery_broker_cluster
    schedules = Schedules(stage.runs, timedelta(days=1))
    registry.put(stage.database, "tick", check.parse("workflow: tick\nsteps: [{id: a, kind: noop}]\n"))
    leader, control, other = stage.beat("leader"), stage.control("first"), stage.control("second")
    assert leader.ready()
    stand_by = stage.beat("stand-by")
    assert control.ready()
    assert other.ready()
    schedules.put(Schedule.model_validate(TICKING))

    def fires() -> list[Any]:
        """The fires, the earliest first."""
        return schedules.fires("ticking", limit=1000).fires[::-1]  # type: ignore[return-value]  # a tuple will do

    until(lambda: len(fires()) >= 3)
    leader.kill("SIGKILL")
    control.kill("SIGKILL")
    with valkey.container.client as client:
        client.flushall()
    seen = len(fires())
    until(lambda: len(fires()) >= seen + 4)
    assert b"beat_elected" in stand_by.container.log()

    schedules.pause("ticking")
    until(lambda: not {fire.state for fire in fires()} & {FireState.WAITING, FireState.STARTING})
    until(lambda: stage.open_runs() == 0)
    made = [fire for fire in fires() if fire.why != "the schedule was paused"]
    assert {fire.state for fire in made} == {"fired"}
    assert {following.at - fire.at for fire, following in pairwise(made)} == {SECOND}
    assert len({fire.run_id for fire in made}) == len(made)
    assert stage._count("SELECT count(*) AS n FROM run") == len(made)
    assert {stage.state(fire.run_id) for fire in made} == {RunState.SUCCEEDED}
