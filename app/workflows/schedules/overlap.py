"""
The overlap policy: what happens to a fire while the run of an earlier fire is still active.

    waiting ──→ starting ──→ fired      its run was submitted
       │            └──────→ failed     its run could not be submitted
       └──→ skipped
    missed                              it was never waiting

At most one run of a schedule is active at a time, unless its policy is `allow`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from app.workflows.schedules.schedule import Overlap

#: Maximum number of fires that wait for an earlier run; further fires are skipped.
MAX_WAITING = 100


class FireState(StrEnum):
    """The state of a fire."""

    #: It is due and not decided yet, or it waits for an earlier run to end.
    WAITING = "waiting"
    #: Its run is about to be submitted.
    STARTING = "starting"
    FIRED = "fired"
    SKIPPED = "skipped"
    MISSED = "missed"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ActiveFire:
    """A started fire whose run has not ended."""

    at: datetime
    #: The id of its run, for messages; None before the run is submitted.
    run_id: str | None


@dataclass(frozen=True, slots=True)
class OverlapDecision:
    """The decision about waiting fires. A fire that it does not contain keeps waiting."""

    #: Indices of the waiting fires that start.
    start: tuple[int, ...] = ()
    #: Index and reason of each waiting fire that is skipped.
    skip: tuple[tuple[int, str], ...] = ()
    #: Whether the active runs must be cancelled.
    cancel: bool = False


def decide_overlap(overlap: Overlap, waiting: Sequence[datetime], active: Sequence[ActiveFire]) -> OverlapDecision:
    """Decide about the waiting fires, which are ordered by their instants."""
    places = range(len(waiting))
    if not waiting:
        return OverlapDecision()
    match overlap:
        case Overlap.ALLOW:
            return OverlapDecision(start=tuple(places))
        case Overlap.SKIP:
            start = () if active else (0,)
            reason = (
                _still_running(active[0]) if active else f"the run of {_format_instant(waiting[0])} has just started"
            )
            return OverlapDecision(start=start, skip=tuple((place, reason) for place in places[len(start) :]))
        case Overlap.QUEUE:
            start = () if active else (0,)
            full = f"{MAX_WAITING} earlier fires are already waiting"
            spare = places[len(start) + MAX_WAITING :]
            return OverlapDecision(start=start, skip=tuple((place, full) for place in spare))
        case Overlap.CANCEL_RUNNING:
            newest = places[-1]
            reason = f"the fire of {_format_instant(waiting[newest])} became due before it could start"
            start = () if active else (newest,)
            return OverlapDecision(
                start=start, skip=tuple((place, reason) for place in places[:-1]), cancel=bool(active)
            )


def _still_running(active: ActiveFire) -> str:
    run = "the run" if active.run_id is None else f"run {active.run_id}"
    return f"{run} of {_format_instant(active.at)} is still active"


def _format_instant(instant: datetime) -> str:
    return instant.strftime("%Y-%m-%d %H:%M:%SZ")
