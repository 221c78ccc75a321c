"""Two beats: one ticks, the other takes over. No worker is there, so the ticks stay in the queue and can be counted."""

from __future__ import annotations

import time
from datetime import timedelta

from app.kernel.broker import CONTROL_QUEUE
from app.kernel.settings import ScheduleSettings
from tests.faults.conftest import RUNS, Stage, until

INTERVAL = RUNS.sweep_every.total_seconds()


def seconds_of_ticks(stage: Stage, count: int) -> float:
    """How long it takes until that many more sweeps were sent."""
    before, began = stage.publisher.depth(CONTROL_QUEUE), time.monotonic()
    until(lambda: stage.publisher.depth(CONTROL_QUEUE) >= before + count)
    return time.monotonic() - began


def test_stand_by_takes_over_from_a_killed_beat_and_never_ticks_beside_it(stage: Stage) -> None:
    """One of two beats sends the sweep, once an interval; when it is killed, the other one does."""
    rarely = ScheduleSettings(check_every=timedelta(hours=1))
    fleet = stage.settings.fleet.model_copy(update={"reconcile_every": timedelta(hours=1)})
    stage.settings = stage.settings.model_copy(update={"schedules": rarely, "fleet": fleet})
    leader = stage.beat("leader")
    assert leader.ready()
    stand_by = stage.beat("stand-by")
    until(lambda: stage.clients_of(stand_by) > 0)

    # Two that tick would take half of the time; one of the intervals may have begun before.
    assert seconds_of_ticks(stage, 9) > 8 * INTERVAL * 0.75

    leader.kill("SIGKILL")
    assert b"beat_elected" not in stand_by.container.log()
    assert stand_by.ready(), "it has the lock"
    assert seconds_of_ticks(stage, 5) > 4 * INTERVAL * 0.75
    assert stand_by.container.child.alive
