"""
Convergence: what an agent does about each pool of its host, so that what is observed becomes what is desired.

A process is begun only for bytes that are held and free of others' claims, and its bytes are given back only when it
is seen dead. What does not begin to serve, makes no progress, or does not end when it is asked to, is killed.

Nothing here reads a clock or touches a process: the caller passes durations and does what is decided.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from app.fleet.hosts import Granted
from app.fleet.pool import Desired, Stage
from app.fleet.reservation import State
from app.kernel import durations


@dataclass(frozen=True, slots=True)
class Limits:
    """How long what may take."""

    #: From the start of a process until it serves.
    start: timedelta
    #: For the steps of a pool that drains, before it hands them back.
    drain: timedelta
    #: For a pool that hands its steps back, to be gone.
    leave: timedelta
    #: Without progress while there is work.
    progress: timedelta
    #: For a pool whose lease ran out, to be heard of again.
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


@dataclass(frozen=True, slots=True)
class Begin:
    """Let the pool touch its bytes, and begin its process."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask its process to end."""

    why: str


@dataclass(frozen=True, slots=True)
class Kill:
    """End its process by force."""

    why: str


@dataclass(frozen=True, slots=True)
class GiveBack:
    """Its process is gone: see its bytes back, and give them back."""

    why: str


Step = Begin | Ask | Kill | GiveBack

#: Of a pool that has not begun to serve, and of one that ends by itself.
_BEFORE = frozenset({None, Stage.STARTING, Stage.MEASURING, Stage.LOADING, Stage.WARMING, Stage.REFUSED, Stage.FAILED})
_ENDING = frozenset({Stage.DRAINING, Stage.UNLOADING})


def decide(pool: Granted, local: Local | None, limits: Limits) -> Step | None:
    """What is to be done about a pool now; None when there is nothing."""
    if local is None:
        return _without_process(pool)
    if not local.alive:
        return GiveBack("its process ended")
    lapsed = pool.state is State.SUSPECT or pool.expired
    if lapsed and pool.stage is not None and pool.silent > limits.silence:  # before, it had no voice
        return Kill(f"it was silent for {_shown(pool.silent)} and its lease ran out")
    if local.asked is not None:
        return _leaving(pool, local, limits)
    if pool.desired is not Desired.RUN:
        return Ask(pool.stop_reason)
    if pool.stage in _ENDING:
        return Ask(pool.told or "it ends by itself")
    if pool.stage in _BEFORE and local.age > limits.start:
        return Kill(f"it did not begin to serve within {_shown(limits.start)} (setting pools.start_timeout)")
    if pool.stalled > limits.progress:
        return Kill(f"its engine made no progress for {_shown(pool.stalled)}")
    return None


def _without_process(pool: Granted) -> Step | None:
    if pool.state is not State.HELD:
        return GiveBack("its process is gone")
    if pool.waits or pool.desired is not Desired.RUN:
        return None
    return Begin()


def _leaving(pool: Granted, local: Local, limits: Limits) -> Step | None:
    if pool.desired is Desired.PREEMPT and local.asked is not Desired.PREEMPT:
        return Ask(pool.stop_reason)
    limit = limits.leave if local.asked is Desired.PREEMPT else limits.drain + limits.leave
    if local.asked_ago > limit:
        return Kill(f"it did not end within {_shown(limit)} after it was asked to")
    return None


def _shown(value: timedelta) -> str:
    return durations.show(timedelta(seconds=round(value.total_seconds(), 1)))
