"""
The timetable of a schedule: when it fires, which fires are due, and which were missed.

Every instant of the trigger after `last` is decided once: it fires, or it is missed with a reason.
A due instant fires unless it is later than the catch-up window; of several, the latest fires, or all up to a limit.
Jitter delays a fire by a part that is derived from the schedule and the instant, so every host computes the same delay.

Nothing here reads a clock: the caller passes `now`. The cost does not grow with the length of an outage.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise, takewhile

from app.kernel.units import durations
from app.workflows.schedules import cron
from app.workflows.schedules.schedule import Schedule

#: The maximum number of missed fires that are counted.
MAX_COUNTED = 1000

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_TICK = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class Fire:
    """An instant `at` of the trigger, and when its fire is due: `at` plus its jitter."""

    at: datetime
    due_at: datetime


@dataclass(frozen=True, slots=True)
class Missed:
    """Consecutive instants that do not fire."""

    first: Fire
    #: The instant of the last of them.
    last: datetime
    #: None when there are more than MAX_COUNTED.
    count: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class Due:
    """The decisions about all due instants."""

    #: The fires to start, in this order.
    fires: tuple[Fire, ...]
    #: The missed instants, all of which are before `fires`.
    missed: tuple[Missed, ...]
    #: All instants up to this one are decided.
    last: datetime


@dataclass(frozen=True, slots=True)
class Timetable:
    """The fires of a schedule."""

    schedule: Schedule
    #: The id of the schedule, so that the jitter of two schedules differs.
    salt: str

    def fires(self, after: datetime) -> Iterator[Fire]:
        """Yield the fires after an instant, ascending."""
        starts, ends = self.schedule.starts, self.schedule.ends
        begin = after if starts is None else max(after, starts - _TICK)
        jitter = self.schedule.jitter
        if not jitter:
            every = (Fire(at, at) for at in self._instants(begin))
        else:
            every = (
                Fire(at, at + self._jitter_fraction(at) * min(jitter, following - at))
                for at, following in self._pairs(begin)
            )
        return every if ends is None else takewhile(lambda fire: fire.at < ends, every)

    def _instants(self, after: datetime) -> Iterator[datetime]:
        if self.schedule.cron is not None:
            return cron.instants(cron.parse(self.schedule.cron), self.schedule.zone, after)
        assert self.schedule.every is not None
        return _multiples(self.schedule.every, self.schedule.starts or _EPOCH, after)

    def _pairs(self, after: datetime) -> Iterator[tuple[datetime, datetime]]:
        """Yield each instant with the next one."""
        return pairwise(self._instants(after))

    def _jitter_fraction(self, at: datetime) -> float:
        """Return the part of the jitter for an instant, from [0, 1)."""
        digest = hashlib.sha256(f"{self.salt} {at.isoformat()}".encode()).digest()
        return int.from_bytes(digest[:6], "big") / (1 << 48)


def upcoming(timetable: Timetable, after: datetime, count: int) -> list[Fire]:
    """Return the next `count` fires after an instant."""
    return list(islice(timetable.fires(after), count))


def due(timetable: Timetable, last: datetime, now: datetime) -> Due:
    """Decide about the due instants after `last`."""
    window, max_fires = timetable.schedule.catch_up.within, timetable.schedule.catch_up.max_fires
    counted = list(islice(_due(timetable, last, now), MAX_COUNTED + 1))
    all_counted = len(counted) <= MAX_COUNTED
    known = counted if all_counted else _latest(timetable, last, now, max_fires + 1)
    if not known:
        return Due((), (), last)
    fires = [fire for fire in known if now - fire.due_at <= window][-max_fires:]
    left = [fire for fire in known if not fires or fire.at < fires[0].at]
    late = f"later than the catch-up window of {durations.show(window)}"
    subject, verb = (f"{max_fires} fires", "are") if max_fires > 1 else ("fire", "is")
    spare = f"only the latest {subject} in the catch-up window {verb} started"
    missed: list[Missed] = []
    if not all_counted:
        reason = late if now - counted[0].due_at > window else spare
        missed.append(Missed(counted[0], left[-1].at, None, reason))
    else:
        old = [fire for fire in left if now - fire.due_at > window]
        for part, reason in ((old, late), (left[len(old) :], spare)):
            if part:
                missed.append(Missed(part[0], part[-1].at, len(part), reason))
    return Due(tuple(fires), tuple(missed), known[-1].at)


def all_missed(timetable: Timetable, last: datetime, now: datetime, reason: str) -> Missed | None:
    """Return all due instants after `last` as missed, with the given reason; None when there are none."""
    counted = list(islice(_due(timetable, last, now), MAX_COUNTED + 1))
    if not counted:
        return None
    if len(counted) <= MAX_COUNTED:
        return Missed(counted[0], counted[-1].at, len(counted), reason)
    return Missed(counted[0], _latest(timetable, last, now, 1)[-1].at, None, reason)


def _due(timetable: Timetable, after: datetime, now: datetime) -> Iterator[Fire]:
    return takewhile(lambda fire: fire.due_at <= now, timetable.fires(after))


def _latest(timetable: Timetable, after: datetime, now: datetime, count: int) -> list[Fire]:
    """Return the latest `count` due fires, searched backwards from `now`."""
    span = timedelta(minutes=1)
    while True:
        begin = max(after, now - span)
        found = deque(_due(timetable, begin, now), maxlen=count)
        if len(found) == count or begin == after:
            return list(found)
        span *= 2


def _multiples(every: timedelta, anchor: datetime, after: datetime) -> Iterator[datetime]:
    number = (after - anchor) // every + 1
    try:
        while True:
            yield anchor + number * every
            number += 1
    except OverflowError:  # the calendar ends with the year 9999
        return
