"""
Convergence: what an agent does about each pool of its host, so that what is observed becomes what is desired.

A process is begun only for bytes that are held and free of others' claims, and its bytes are given back only when it
is seen dead. What does not begin to serve, makes no progress, or does not end when it is asked to, is killed.

Nothing here reads a clock or touches a process: the caller passes durations and does what is decided.
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
    """How long what may take."""

    #: From the start of a process until it serves.
    start: timedelta
    #: For the steps of a pool that drains, before it hands them back.
    drain: timedelta
    #: For a pool that hands its steps back, to be gone.
    leave: timedelta
    #: Without progress while there is work.
    progress: timedelta
    #: Without a heartbeat of the pool, while the agent reaches the database.
    silence: timedelta


@dataclass(frozen=True, slots=True)
class Local:
    """The process of a pool, as its host sees it."""

    alive: bool
    #: Since its start.
    age: timedelta
    #: What it was asked for, and how long ago; None before.
    asked: Desired | None = None
    asked_ago: timedelta = timedelta(0)
    #: How long its agent has reached the database without a gap: only a silence within that is the pool's own.
    watched: timedelta = timedelta(0)


@dataclass(slots=True)
class Watch:
    """
    How long an agent has reached the database without a gap.

    After a gap (a database that was away, a laptop that slept) pools were silent for the same reason as their agent:
    they get as long as before to be heard again.
    """

    #: After which a pool is killed; half of it is a gap.
    silence: timedelta
    lasted: timedelta = timedelta(0)
    _last: datetime | None = None

    def reached(self, now: datetime) -> None:
        """The agent has reached the database. `now` is of the wall clock, which goes on while a machine sleeps."""
        gap = self.silence if self._last is None else now - self._last
        self.lasted = self.lasted + gap if timedelta(0) <= gap <= self.silence / 2 else timedelta(0)
        self._last = now


@dataclass(frozen=True, slots=True)
class Begin:
    """Let the pool touch its bytes, and begin its process."""


@dataclass(frozen=True, slots=True)
class Terminate:
    """Ask its process to end."""

    reason: str


@dataclass(frozen=True, slots=True)
class Kill:
    """End its process by force."""

    reason: str


@dataclass(frozen=True, slots=True)
class GiveBack:
    """Its process is gone: see its bytes back, and give them back."""

    reason: str


ConvergenceAction = Begin | Terminate | Kill | GiveBack

#: Of a pool that has not begun to serve, and of one that ends by itself.
_BEFORE = frozenset(
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
_ENDING = frozenset({PoolPhase.DRAINING, PoolPhase.UNLOADING})


def decide(pool: AssignedPool, local: Local | None, limits: ConvergenceLimits) -> ConvergenceAction | None:
    """What is to be done about a pool now; None when there is nothing."""
    if local is None:
        return _without_process(pool)
    if not local.alive:
        return GiveBack("its process ended")
    if pool.phase is not None and min(pool.silent, local.watched) > limits.silence:  # before, it had no voice
        return Kill(f"it was silent for {_shown(pool.silent)} (setting fleet.heartbeat_timeout)")
    if local.asked is not None:
        return _leaving(pool, local, limits)
    if pool.desired is not Desired.RUN:
        return Terminate(pool.stop_reason)
    if pool.phase in _ENDING:
        return Terminate(pool.detail or "it ends by itself")
    if pool.phase in _BEFORE and local.age > limits.start:
        return Kill(f"it did not begin to serve within {_shown(limits.start)} (setting pools.start_timeout)")
    if pool.stalled > limits.progress:
        return Kill(f"its engine made no progress for {_shown(pool.stalled)}")
    return None


def _without_process(pool: AssignedPool) -> ConvergenceAction | None:
    if pool.state is not ReservationState.HELD:
        return GiveBack("its process is gone")
    if pool.waits or pool.desired is not Desired.RUN:
        return None
    return Begin()


def _leaving(pool: AssignedPool, local: Local, limits: ConvergenceLimits) -> ConvergenceAction | None:
    if pool.desired is Desired.PREEMPT and local.asked is not Desired.PREEMPT:
        return Terminate(pool.stop_reason)
    limit = limits.leave if local.asked is Desired.PREEMPT else limits.drain + limits.leave
    if local.asked_ago > limit:
        return Kill(f"it did not end within {_shown(limit)} after it was asked to")
    return None


def _shown(value: timedelta) -> str:
    return durations.show(timedelta(seconds=round(value.total_seconds(), 1)))
