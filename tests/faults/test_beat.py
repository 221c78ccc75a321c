"""Two beats: one ticks, the other takes over. Without workers the messages stay in the queue and can be counted."""

from __future__ import annotations

import time
from datetime import timedelta

from app.governance.jobs.registry import JOBS, SWEEP
from app.kernel.broker import CONTROL_QUEUE
from app.kernel.settings import Settings
from tests.faults.conftest import RUNS, Cluster, until

INTERVAL = RUNS.sweep_every.total_seconds()


def seconds_of_ticks(cluster: Cluster, count: int) -> float:
    """The seconds until `count` more messages are sent."""
    before, began = cluster.publisher.depth(CONTROL_QUEUE), time.monotonic()
    until(lambda: cluster.publisher.depth(CONTROL_QUEUE) >= before + count)
    return time.monotonic() - began


def only_sweeps(settings: Settings) -> Settings:
    """The settings, with an interval of an hour for each other job."""
    for job in JOBS:
        section, _, name = job.setting.partition(".")
        if job.task != SWEEP:
            changed = getattr(settings, section).model_copy(update={name: timedelta(hours=1)})
            settings = settings.model_copy(update={section: changed})
    return settings


def test_a_stand_by_takes_over_from_a_killed_beat_and_never_ticks_next_to_it(cluster: Cluster) -> None:
    """One of two beats sends the sweep once per interval; after its kill the other one does."""
    cluster.settings = only_sweeps(cluster.settings)
    leader = cluster.beat("leader")
    assert leader.ready()
    stand_by = cluster.beat("stand-by")
    until(lambda: cluster.clients_of(stand_by) > 0)

    # Two ticking beats would need half of the time; one interval may have begun before.
    assert seconds_of_ticks(cluster, 9) > 8 * INTERVAL * 0.75

    leader.kill("SIGKILL")
    assert b"beat_elected" not in stand_by.container.log()
    assert stand_by.ready(), "it has taken the lock"
    assert seconds_of_ticks(cluster, 5) > 4 * INTERVAL * 0.75
    assert stand_by.container.child.alive
