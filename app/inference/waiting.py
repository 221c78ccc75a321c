"""
The wait of a call for a model: its position in the queue of the model, and when a slot is expected to be free for it.

An estimate is a sum of measured means: the rest of a pool's start, and the time for which each call before it keeps a
slot. None means that nobody knows: no pool is coming, or its start was never measured.

Nothing here reads a database or a clock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from app.kernel.priority import Priority

#: Why a model is not loaded, for those who do not see what others do.
REFUSED = "no pool of it can be started now"


@dataclass(frozen=True, slots=True)
class ModelQueue:
    """What waits for a model, and what serves it or will."""

    model: str
    #: Slots of the pools that serve it.
    slots: int = 0
    #: Slots of one pool.
    slots_per_pool: int = 1
    #: Expected seconds until a pool that starts serves; None without such a pool.
    starts_in: float | None = None
    #: The part of the model that this pool has loaded, 0 to 1.
    loaded: float = 0.0
    #: Seconds of a start, as measured; 0 while that is not known.
    load: float = 0.0
    #: Mean seconds for which a call keeps a slot.
    duration: float = 5.0
    #: The positions of waiting runs by id, and the number of all that wait, which may be more.
    runs: Mapping[str, int] = field(default_factory=dict)
    #: Expected seconds in a slot of the waiting ones, the first one first; those beyond take the mean time.
    work: Sequence[float] = ()
    #: The factors of the least and of the most time that 80 % of calls take of what was expected of them; None while
    #: too few were predicted.
    spread: tuple[float, float] | None = None
    waiting: int = 0
    #: Of the waiting ones, those before which no new interactive call goes.
    before_new: int = 0
    #: The same for a new call of the other classes.
    before_standard: int = 0
    before_batch: int = 0
    #: Why no pool can be started now, and seconds until one is expected to serve.
    refusal: str = ""
    refused_for: float | None = None


@dataclass(frozen=True, slots=True)
class WaitEstimate:
    """How long a call waits."""

    #: 1 is the next one; None for a call that is not in the queue, which has just been taken or has ended.
    position: int | None
    waiting: int
    #: Seconds until it begins; None when that is not known.
    seconds: float | None
    #: Between these, by how much single calls differed from what was expected of them; None when it is not known.
    low: float | None
    high: float | None
    #: A pool serves the model, or starts: the estimate does not depend on a decision of the scheduler.
    is_coming: bool
    #: A sentence for people.
    detail: str
    #: The same without what others do: why no pool can be started names their pools and devices.
    outline: str


def estimate(queue: ModelQueue, run_id: str | None, priority: Priority = Priority.INTERACTIVE) -> WaitEstimate:
    """The wait of a run that waits in the queue; without one, of a new call of that class."""
    position = _before(queue, priority) + 1 if run_id is None else queue.runs.get(run_id)
    ahead = (position or 1) - 1
    is_coming, seconds, outline = True, None, ""
    if queue.slots:
        seconds = (_work(queue, ahead) + queue.duration) / queue.slots
        if queue.waiting == 0 and run_id is None:
            seconds = 0.0
        state = "all its slots are taken"
    elif queue.starts_in is not None:
        seconds = queue.starts_in + _rounds(queue, ahead)
        state = f"it is loading, {queue.loaded:.0%}" if queue.loaded else "it is being started"
    else:
        is_coming = False
        if queue.refusal:
            state, outline, seconds = queue.refusal, REFUSED, queue.refused_for
        else:
            state, seconds = "it is not loaded", queue.load or None
        if seconds is not None:
            seconds += _rounds(queue, ahead)
    # What many calls take together differs less from what was expected than what one takes.
    low = high = None
    if seconds is not None and queue.spread is not None:
        low, high = (seconds * factor ** (1 / math.sqrt(ahead + 1)) for factor in queue.spread)
    between = None if low is None or high is None else (low, high)
    detail, outlined = (_detail(queue, position, one, seconds, between) for one in (state, outline or state))
    return WaitEstimate(position, queue.waiting, seconds, low, high, is_coming, detail, outlined)


def _work(queue: ModelQueue, ahead: int) -> float:
    """Return the expected seconds in slots of so many of the waiting ones."""
    return sum(queue.work[:ahead]) + max(ahead - len(queue.work), 0) * queue.duration


def _rounds(queue: ModelQueue, ahead: int) -> float:
    """Return the seconds until a slot of one pool is free after so many, which begin together."""
    rounds = ahead // queue.slots_per_pool
    return _work(queue, rounds * queue.slots_per_pool) / queue.slots_per_pool


def _before(queue: ModelQueue, priority: Priority) -> int:
    match priority:
        case Priority.INTERACTIVE:
            return queue.before_new
        case Priority.STANDARD:
            return queue.before_standard
        case Priority.BATCH:
            return queue.before_batch


def _detail(
    queue: ModelQueue, position: int | None, state: str, seconds: float | None, between: tuple[float, float] | None
) -> str:
    place = "" if position is None else f"position {position} of {max(queue.waiting, position)}, "
    rest = f"; about {math.ceil(seconds)} s" if seconds is not None else f"; see: arriero fleet why {queue.model}"
    if between is not None and seconds:
        rest += f" ({math.floor(between[0])} to {math.ceil(between[1])} s)"
    return f"waiting for {queue.model}: {place}{state}{rest}"
