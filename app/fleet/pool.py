"""
A pool: its state, derived from what three writers report.

The reconciler writes the desired state, the host's agent writes the observed process, and the pool itself writes its
phase. The ledger knows whether the pool may use its bytes. No writer changes the values of another.
"""

from __future__ import annotations

from enum import StrEnum

from app.fleet.ledger.reservation import ReservationState


class PoolState(StrEnum):
    """The state of a pool."""

    #: Granted; its process starts when the pools that it waits for have ended.
    WAITING = "waiting"
    #: Its process starts or loads the model.
    STARTING = "starting"
    SERVING = "serving"
    #: Takes no more work, and ends when it has none.
    DRAINING = "draining"
    #: Its lease expired; its process may be alive.
    SUSPECT = "suspect"

    #: That of the text, which is kept; an enumeration computes its own each time, and a plan looks at every pool.
    __hash__ = str.__hash__


#: States of a pool that serves or will serve.
COMING = frozenset({PoolState.WAITING, PoolState.STARTING, PoolState.SERVING})


#: Directory below the data directory, with a file for each pool that serves metrics.
METRICS_FOLDER = "metrics"


class Desired(StrEnum):
    """The desired state of a pool."""

    RUN = "run"
    #: End when its steps have ended.
    DRAIN = "drain"
    #: Requeue its steps at their next token, and end.
    PREEMPT = "preempt"


class ProcessState(StrEnum):
    """The state of a pool's process, as its agent observes it."""

    RUNNING = "running"
    #: It was asked to end.
    STOPPING = "stopping"
    #: It has ended, and its memory is free.
    ENDED = "ended"


class PoolPhase(StrEnum):
    """The phase of a pool, as it reports it."""

    STARTING = "starting"
    #: It determines how many bytes it needs.
    MEASURING = "measuring"
    LOADING = "loading"
    #: It generates a first token.
    WARMING = "warming"
    SERVING = "serving"
    #: It takes no more steps.
    DRAINING = "draining"
    #: It frees its model.
    UNLOADING = "unloading"
    #: The bytes that it needs were refused, and it ends.
    REFUSED = "refused"
    #: It cannot serve for another reason, and ends.
    FAILED = "failed"


#: Phases of a pool that takes no more steps.
_LEAVING = frozenset({PoolPhase.DRAINING, PoolPhase.UNLOADING, PoolPhase.REFUSED, PoolPhase.FAILED})


def state_of(reservation: ReservationState, *, waits: bool, desired: Desired, phase: PoolPhase | None) -> PoolState:
    """Return the state of a pool with a charged reservation. `waits`: it waits for bytes of other pools."""
    if reservation is ReservationState.SUSPECT:
        return PoolState.SUSPECT
    if desired is not Desired.RUN or phase in _LEAVING:
        return PoolState.DRAINING
    if waits:
        return PoolState.WAITING
    return PoolState.SERVING if phase is PoolPhase.SERVING else PoolState.STARTING
