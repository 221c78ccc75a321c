"""
Overlap: what becomes of the fires of a schedule while a run of an earlier one still goes on.

    waiting ──→ starting ──→ fired      a run was submitted
       │            └──────→ failed     it could not be
       └──→ skipped
    missed                              it never waited

Except where the schedule allows it, at most one of its runs goes on at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from app.workflows.schedules.schedule import Overlap

#: Fires that may wait for an earlier run; further ones are skipped.
MOST_WAITING = 100


class FireState(StrEnum):
    """Where a fire stands."""

    #: It came due and is not decided yet, or waits for an earlier run to end.
    WAITING = "waiting"
    #: Its run is about to be submitted.
    STARTING = "starting"
    FIRED = "fired"
    SKIPPED = "skipped"
    MISSED = "missed"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Going:
    """A fire that has begun, and whose run has not ended."""

    at: datetime
    #: For messages: the run's id, where there is one yet.
    run_id: str | None


@dataclass(frozen=True, slots=True)
class Settled:
    """What becomes of the fires that wait; those not named go on waiting."""

    #: Places in the list of those that wait.
    begin: tuple[int, ...] = ()
    #: Place, and why.
    skip: tuple[tuple[int, str], ...] = ()
    #: Every run that goes on is to be cancelled.
    cancel: bool = False


def settle(overlap: Overlap, waiting: Sequence[datetime], going: Sequence[Going]) -> Settled:
    """Decide about fires that wait, the earliest first."""
    places = range(len(waiting))
    if not waiting:
        return Settled()
    match overlap:
        case Overlap.ALLOW:
            return Settled(begin=tuple(places))
        case Overlap.SKIP:
            begin = () if going else (0,)
            reason = _told(going[0]) if going else f"the run of {_shown(waiting[0])} has just begun"
            return Settled(begin=begin, skip=tuple((place, reason) for place in places[len(begin) :]))
        case Overlap.QUEUE:
            begin = () if going else (0,)
            full = f"{MOST_WAITING} earlier fires wait already"
            spare = places[len(begin) + MOST_WAITING :]
            return Settled(begin=begin, skip=tuple((place, full) for place in spare))
        case Overlap.CANCEL_RUNNING:
            newest = places[-1]
            reason = f"the fire of {_shown(waiting[newest])} came before it could begin"
            begin = () if going else (newest,)
            return Settled(begin=begin, skip=tuple((place, reason) for place in places[:-1]), cancel=bool(going))


def _told(going: Going) -> str:
    run = "the run" if going.run_id is None else f"run {going.run_id}"
    return f"{run} of {_shown(going.at)} still goes on"


def _shown(instant: datetime) -> str:
    return instant.strftime("%Y-%m-%d %H:%M:%SZ")
