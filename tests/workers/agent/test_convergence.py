"""What an agent does about a pool: one decision at a time."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from app.fleet.hosts import AssignedPool
from app.fleet.ledger.reservation import ReservationState
from app.fleet.pool import Desired, PoolPhase
from workers.agent.convergence import (
    Begin,
    ConvergenceAction,
    ConvergenceLimits,
    GiveBack,
    Kill,
    Local,
    Terminate,
    Watch,
    decide,
)


def seconds(value: float) -> timedelta:
    return timedelta(seconds=value)


LIMITS = ConvergenceLimits(
    start=seconds(300), drain=seconds(20), leave=seconds(10), progress=seconds(120), silence=seconds(30)
)
HELD = AssignedPool(
    id="p", epoch=1, state=ReservationState.HELD, waits=False, configuration="m.1", model="m:1",
    desired=Desired.RUN, stop_reason="", bytes={"d": 1}, phase=None, stalled=seconds(0), silent=seconds(0), detail="",
)  # fmt: skip
SERVING = replace(HELD, state=ReservationState.ACTIVE, phase=PoolPhase.SERVING)
STOPPED = replace(SERVING, desired=Desired.DRAIN, stop_reason="makes room")
RUNNING = Local(alive=True, age=seconds(60), watched=seconds(600))
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
SILENT = "it was silent for 31s (setting fleet.heartbeat_timeout)"
ASKED = replace(RUNNING, asked=Desired.DRAIN, asked_ago=seconds(5))


@pytest.mark.parametrize(
    ("pool", "local", "step"),
    [
        (HELD, None, Begin()),
        (replace(HELD, waits=True), None, None),
        (replace(HELD, desired=Desired.DRAIN), None, None),
        (SERVING, RUNNING, None),
        (SERVING, None, GiveBack("its process is gone")),
        (SERVING, replace(RUNNING, alive=False), GiveBack("its process ended")),
        (replace(SERVING, state=ReservationState.SUSPECT), None, GiveBack("its process is gone")),
        (STOPPED, RUNNING, Terminate("makes room")),
        (STOPPED, ASKED, None),
        (STOPPED, replace(ASKED, asked_ago=seconds(31)), Kill("it did not end within 30s after it was asked to")),
        (replace(STOPPED, desired=Desired.PREEMPT), ASKED, Terminate("makes room")),
        (
            replace(STOPPED, desired=Desired.PREEMPT),
            replace(ASKED, asked=Desired.PREEMPT, asked_ago=seconds(11)),
            Kill("it did not end within 10s after it was asked to"),
        ),
        (STOPPED, replace(ASKED, alive=False), GiveBack("its process ended")),
        (replace(SERVING, phase=PoolPhase.LOADING), RUNNING, None),
        (
            replace(SERVING, phase=PoolPhase.LOADING),
            replace(RUNNING, age=seconds(301)),
            Kill("it did not begin to serve within 5m (setting pools.start_timeout)"),
        ),
        (replace(SERVING, stalled=seconds(121)), RUNNING, Kill("its engine made no progress for 2m1s")),
        (replace(SERVING, state=ReservationState.SUSPECT, silent=seconds(20)), RUNNING, None),
        (replace(SERVING, state=ReservationState.SUSPECT, silent=seconds(99), phase=None), RUNNING, None),
        (replace(SERVING, phase=PoolPhase.REFUSED), replace(RUNNING, alive=False), GiveBack("its process ended")),
        (
            replace(SERVING, phase=PoolPhase.DRAINING),
            replace(RUNNING, age=seconds(9999)),
            Terminate("it ends by itself"),
        ),
        (
            replace(SERVING, phase=PoolPhase.UNLOADING, detail="its claim was lost"),
            RUNNING,
            Terminate("its claim was lost"),
        ),
        (replace(SERVING, silent=seconds(30)), RUNNING, None),
        (replace(SERVING, silent=seconds(31)), RUNNING, Kill(SILENT)),
        (replace(SERVING, silent=seconds(31)), replace(RUNNING, watched=seconds(30)), None),
        (replace(SERVING, silent=seconds(31), phase=None), RUNNING, None),
        (replace(SERVING, state=ReservationState.SUSPECT, silent=seconds(31)), RUNNING, Kill(SILENT)),
        (replace(STOPPED, silent=seconds(31)), ASKED, Kill(SILENT)),
    ],
)
def test_what_is_done_about_a_pool(pool: AssignedPool, local: Local | None, step: ConvergenceAction | None) -> None:
    assert decide(pool, local, LIMITS) == step


def test_a_silence_counts_only_while_the_agent_reaches_the_database() -> None:
    watch = Watch(silence=seconds(20))
    for now in (100, 102, 112):
        watch.reached(NOON + seconds(now))
    assert watch.lasted == seconds(12)
    watch.reached(NOON + seconds(123))
    assert watch.lasted == seconds(0), "it was away for more than half of the limit"
    watch.reached(NOON + seconds(130))
    assert watch.lasted == seconds(7)
    watch.reached(NOON + seconds(129))
    assert watch.lasted == seconds(0), "somebody has set the clock back"
