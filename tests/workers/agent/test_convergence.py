"""The decisions of an agent about a pool."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from app.fleet.hosts import AssignedPool
from app.fleet.ledger.reservation import ReservationState
from app.fleet.pool import Desired, PoolPhase
from workers.agent.convergence import (
    ConvergenceAction,
    ConvergenceLimits,
    DatabaseContact,
    Kill,
    LocalProcess,
    Release,
    StartProcess,
    Terminate,
    decide,
    is_at_rest,
)


def seconds(value: float) -> timedelta:
    return timedelta(seconds=value)


LIMITS = ConvergenceLimits(
    start=seconds(300), drain=seconds(20), exit=seconds(10), progress=seconds(120), heartbeat=seconds(30)
)
HELD = AssignedPool(
    id="p", epoch=1, state=ReservationState.HELD, waits=False, configuration="m.1", model="m:1",
    desired=Desired.RUN, stop_reason="", bytes={"d": 1}, phase=None, stalled=seconds(0), silent=seconds(0), detail="",
)  # fmt: skip
SERVING = replace(HELD, state=ReservationState.ACTIVE, phase=PoolPhase.SERVING)
STOPPED = replace(SERVING, desired=Desired.DRAIN, stop_reason="makes room")
RUNNING = LocalProcess(alive=True, age=seconds(60), contact=seconds(600))
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
SILENT = "it sent no heartbeat for 31s (setting fleet.heartbeat_timeout)"
STOPPING = replace(RUNNING, stop_requested=Desired.DRAIN, stop_requested_ago=seconds(5))


@pytest.mark.parametrize(
    ("pool", "local", "action"),
    [
        (HELD, None, StartProcess()),
        (replace(HELD, waits=True), None, None),
        (replace(HELD, desired=Desired.DRAIN), None, None),
        (SERVING, RUNNING, None),
        (SERVING, None, Release("its process is gone")),
        (SERVING, replace(RUNNING, alive=False), Release("its process ended")),
        (replace(SERVING, state=ReservationState.SUSPECT), None, Release("its process is gone")),
        (STOPPED, RUNNING, Terminate("makes room")),
        (STOPPED, STOPPING, None),
        (
            STOPPED,
            replace(STOPPING, stop_requested_ago=seconds(31)),
            Kill("it did not end within 30s after it was asked to (setting pools.drain_timeout)"),
        ),
        (replace(STOPPED, desired=Desired.PREEMPT), STOPPING, Terminate("makes room")),
        (
            replace(STOPPED, desired=Desired.PREEMPT),
            replace(STOPPING, stop_requested=Desired.PREEMPT, stop_requested_ago=seconds(11)),
            Kill("it did not end within 10s after it was asked to (setting pools.drain_timeout)"),
        ),
        (STOPPED, replace(STOPPING, alive=False), Release("its process ended")),
        (replace(SERVING, phase=PoolPhase.LOADING), RUNNING, None),
        (
            replace(SERVING, phase=PoolPhase.LOADING),
            replace(RUNNING, age=seconds(301)),
            Kill("it did not begin to serve within 5m (setting pools.start_timeout)"),
        ),
        (
            replace(SERVING, stalled=seconds(121)),
            RUNNING,
            Kill("its engine made no progress for 2m1s (setting fleet.progress_timeout)"),
        ),
        (replace(SERVING, state=ReservationState.SUSPECT, silent=seconds(20)), RUNNING, None),
        (replace(SERVING, state=ReservationState.SUSPECT, silent=seconds(99), phase=None), RUNNING, None),
        (replace(SERVING, phase=PoolPhase.REFUSED), replace(RUNNING, alive=False), Release("its process ended")),
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
        (replace(SERVING, silent=seconds(31)), replace(RUNNING, contact=seconds(30)), None),
        (replace(SERVING, silent=seconds(31), phase=None), RUNNING, None),
        (replace(SERVING, state=ReservationState.SUSPECT, silent=seconds(31)), RUNNING, Kill(SILENT)),
        (replace(STOPPED, silent=seconds(31)), STOPPING, Kill(SILENT)),
    ],
)
def test_the_action_for_a_pool(
    pool: AssignedPool, local: LocalProcess | None, action: ConvergenceAction | None
) -> None:
    assert decide(pool, local, LIMITS) == action


def test_missing_heartbeats_count_only_while_the_agent_reaches_the_database() -> None:
    contact = DatabaseContact(heartbeat=seconds(20))
    for now in (100, 102, 112):
        contact.note(NOON + seconds(now))
    assert contact.duration == seconds(12)
    contact.note(NOON + seconds(123))
    assert contact.duration == seconds(0), "a gap of more than half of the timeout"
    contact.note(NOON + seconds(130))
    assert contact.duration == seconds(7)
    contact.note(NOON + seconds(129))
    assert contact.duration == seconds(0), "the clock was set back"


@pytest.mark.parametrize(
    ("pool", "rests"),
    [
        (SERVING, True),
        (HELD, False),
        (STOPPED, False),
        (replace(SERVING, phase=PoolPhase.LOADING), False),
        (replace(SERVING, silent=seconds(9)), False),
    ],
)
def test_an_agent_may_look_less_often_only_while_its_pools_serve(pool: AssignedPool, rests: bool) -> None:
    assert is_at_rest(pool, seconds(2)) is rests
