"""
A pool: where it stands, from what three writers say of it.

The reconciler says what is desired, the host's agent what it observes of the process, the pool itself what it does;
the ledger knows whether it may touch its bytes. None of them writes what another says.
"""

from __future__ import annotations

from enum import StrEnum

from app.fleet.ledger.reservation import ReservationState


class PoolState(StrEnum):
    """Where a pool stands."""

    #: Granted; its process begins when the pools that it waits for are gone.
    WAITING = "waiting"
    #: Its process begins or loads.
    STARTING = "starting"
    SERVING = "serving"
    #: Takes no more work and ends when it has none.
    DRAINING = "draining"
    #: Its lease ran out; whether its process lives is not known.
    SUSPECT = "suspect"


#: States of a pool that serves, or will.
COMING = frozenset({PoolState.WAITING, PoolState.STARTING, PoolState.SERVING})


#: Folder below the data directory, with a file for each pool whose metrics can be asked for.
METRICS_FOLDER = "metrics"


class Desired(StrEnum):
    """What the reconciler wants of a pool."""

    RUN = "run"
    #: It ends when its steps have ended.
    DRAIN = "drain"
    #: It hands its steps back at their next token, and ends.
    PREEMPT = "preempt"


class ProcessState(StrEnum):
    """What the agent observes of a pool's process."""

    RUNNING = "running"
    #: It was asked to end.
    STOPPING = "stopping"
    #: It is gone, and its bytes are back.
    ENDED = "ended"


class PoolPhase(StrEnum):
    """What a pool is doing, as it tells."""

    STARTING = "starting"
    #: It finds out how many bytes it needs.
    MEASURING = "measuring"
    LOADING = "loading"
    #: It writes a first token.
    WARMING = "warming"
    SERVING = "serving"
    #: It takes no more steps.
    DRAINING = "draining"
    #: It lets go of its model.
    UNLOADING = "unloading"
    #: It cannot have the bytes that it needs, and ends.
    REFUSED = "refused"
    #: It cannot serve for another reason, and ends.
    FAILED = "failed"


#: Of a pool that takes no more steps.
_LEAVING = frozenset({PoolPhase.DRAINING, PoolPhase.UNLOADING, PoolPhase.REFUSED, PoolPhase.FAILED})


def state_of(reservation: ReservationState, *, waits: bool, desired: Desired, phase: PoolPhase | None) -> PoolState:
    """Where a pool stands whose reservation is charged. `waits` says that it waits for the bytes of others."""
    if reservation is ReservationState.SUSPECT:
        return PoolState.SUSPECT
    if desired is not Desired.RUN or phase in _LEAVING:
        return PoolState.DRAINING
    if waits:
        return PoolState.WAITING
    return PoolState.SERVING if phase is PoolPhase.SERVING else PoolState.STARTING
