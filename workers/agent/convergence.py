"""
Convergence: decides what an agent does with each pool of its host, so that the observed state becomes the desired one.

A process is started only for bytes that are reserved and that no other claim waits for. Bytes are released only when
the process is seen dead. A process that does not begin to serve, makes no progress, or does not end on request is
killed.

Nothing here reads a clock or touches a process: the caller passes durations and carries out the decision.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from app.fleet.hosts import AssignedPool
from app.fleet.ledger.reservation import ReservationState
from app.fleet.pool import Desired, PoolPhase
from app.kernel.units import durations


@dataclass(frozen=True, slots=True)
class ConvergenceLimits:
    """The time limits of a pool's process."""

    #: From the start of the process until it serves.
    start: timedelta
    #: For the steps of a draining pool to end; then they are requeued.
    drain: timedelta
    #: From the requeue of its steps until the process has ended.
    exit: timedelta
    #: Without progress of an engine that has work.
    progress: timedelta
    #: Without a heartbeat of the pool, while the agent reaches the database.
    heartbeat: timedelta


@dataclass(frozen=True, slots=True)
class LocalProcess:
    """The state of a pool's process on its host."""

    alive: bool
    #: Since its start.
    age: timedelta
    #: How it was asked to stop; None when it was not.
    stop_requested: Desired | None = None
    #: Since that request.
    stop_requested_ago: timedelta = timedelta(0)
    #: How long its agent has reached the database without a gap. A pool that was silent for longer may only have lost
    #: the database too.
    contact: timedelta = timedelta(0)


def is_at_rest(pool: AssignedPool, heartbeat: timedelta) -> bool:
    """Whether a pool serves as it should, and was heard within the last heartbeats: its agent need not look soon."""
    return pool.phase is PoolPhase.SERVING and pool.desired is Desired.RUN and pool.silent < heartbeat * 4


@dataclass(slots=True)
class DatabaseContact:
    """
    How long an agent has reached the database without a gap.

    During a gap (a database that was unavailable, a laptop that slept) pools were silent for the same reason as their
    agent: after it they get the whole heartbeat timeout again.
    """

    #: Pools are killed after this time without a heartbeat; half of it counts as a gap.
    heartbeat: timedelta
    duration: timedelta = timedelta(0)
    _last: datetime | None = None

    def note(self, now: datetime) -> None:
        """Note that the agent reached the database. `now` is wall-clock time, which includes the sleep of a machine."""
        gap = self.heartbeat if self._last is None else now - self._last
        self.duration = self.duration + gap if timedelta(0) <= gap <= self.heartbeat / 2 else timedelta(0)
        self._last = now


@dataclass(frozen=True, slots=True)
class StartProcess:
    """Activate the reservation, so that the pool may use its bytes, and start the process."""


@dataclass(frozen=True, slots=True)
class Terminate:
    """Ask the process to end."""

    reason: str


@dataclass(frozen=True, slots=True)
class Kill:
    """Kill the process."""

    reason: str


@dataclass(frozen=True, slots=True)
class Release:
    """The process has ended: release its bytes once the driver reports them free."""

    reason: str


ConvergenceAction = StartProcess | Terminate | Kill | Release

#: Phases of a pool that does not serve yet.
_NOT_YET_SERVING = frozenset(
    {
        None,
        PoolPhase.STARTING,
        PoolPhase.MEASURING,
        PoolPhase.LOADING,
        PoolPhase.WARMING,
        PoolPhase.REFUSED,
        PoolPhase.FAILED,
    }
)
#: Phases of a pool that ends by itself.
_ENDING = frozenset({PoolPhase.DRAINING, PoolPhase.UNLOADING})


def decide(pool: AssignedPool, local: LocalProcess | None, limits: ConvergenceLimits) -> ConvergenceAction | None:
    """Return what must be done about a pool now; None when nothing must be done."""
    if local is None:
        return _without_process(pool)
    if not local.alive:
        return Release("its process ended")
    # A pool without a phase has not sent its first heartbeat yet.
    if pool.phase is not None and min(pool.silent, local.contact) > limits.heartbeat:
        return Kill(f"it sent no heartbeat for {_formatted(pool.silent)} (setting fleet.heartbeat_timeout)")
    if local.stop_requested is not None:
        return _stopping(pool, local, limits)
    if pool.desired is not Desired.RUN:
        return Terminate(pool.stop_reason)
    if pool.phase in _ENDING:
        return Terminate(pool.detail or "it ends by itself")
    if pool.phase in _NOT_YET_SERVING and local.age > limits.start:
        return Kill(f"it did not begin to serve within {_formatted(limits.start)} (setting pools.start_timeout)")
    if pool.stalled > limits.progress:
        return Kill(f"its engine made no progress for {_formatted(pool.stalled)} (setting fleet.progress_timeout)")
    return None


def _without_process(pool: AssignedPool) -> ConvergenceAction | None:
    if pool.state is not ReservationState.HELD:
        return Release("its process is gone")
    if pool.waits or pool.desired is not Desired.RUN:
        return None
    return StartProcess()


def _stopping(pool: AssignedPool, local: LocalProcess, limits: ConvergenceLimits) -> ConvergenceAction | None:
    if pool.desired is Desired.PREEMPT and local.stop_requested is not Desired.PREEMPT:
        return Terminate(pool.stop_reason)
    limit = limits.exit if local.stop_requested is Desired.PREEMPT else limits.drain + limits.exit
    if local.stop_requested_ago > limit:
        return Kill(f"it did not end within {_formatted(limit)} after it was asked to (setting pools.drain_timeout)")
    return None


def _formatted(value: timedelta) -> str:
    return durations.show(timedelta(seconds=round(value.total_seconds(), 1)))
