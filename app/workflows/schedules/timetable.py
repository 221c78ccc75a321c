"""
The timetable of a schedule: when it fires, what is due, and what was missed.

Every instant that the trigger names after `last` is decided once: it fires, or it is missed with the reason said.
What is due fires unless it is later than the catch-up window; of several, the latest, or all up to a limit.
A jitter makes a fire late by a part that follows from the schedule and the instant, the same wherever it is asked.

Nothing here reads a clock: the caller passes `now`. What a long outage costs does not grow with its length.
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

#: Missed fires are counted up to here.
COUNTED = 1000

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_TICK = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class Fire:
    """An instant of the trigger, and when it is due: `at`, and its jitter."""

    at: datetime
    due_at: datetime


@dataclass(frozen=True, slots=True)
class Missed:
    """Instants in a row that do not fire."""

    first: Fire
    #: The instant of the last of them.
    last: datetime
    #: None when there are more than COUNTED.
    count: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class Due:
    """What is decided about the instants after `last`, as far as they are due."""

    #: They fire, in this order.
    fires: tuple[Fire, ...]
    #: They do not; they lie before those that fire.
    missed: tuple[Missed, ...]
    #: Up to here every instant is decided.
    last: datetime
    #: The first that is not due yet, if there is one.
    next: Fire | None


@dataclass(frozen=True, slots=True)
class Timetable:
    """The instants of a schedule."""

    schedule: Schedule
    #: Makes the jitters of two schedules differ: the schedule's id.
    salt: str

    def fires(self, after: datetime) -> Iterator[Fire]:
        """The fires after an instant, in their order."""
        starts, ends = self.schedule.starts, self.schedule.ends
        begin = after if starts is None else max(after, starts - _TICK)
        jitter = self.schedule.jitter
        if not jitter:
            every = (Fire(at, at) for at in self._instants(begin))
        else:
            every = (
                Fire(at, at + self._part(at) * min(jitter, following - at)) for at, following in self._pairs(begin)
            )
        return every if ends is None else takewhile(lambda fire: fire.at < ends, every)

    def _instants(self, after: datetime) -> Iterator[datetime]:
        if self.schedule.cron is not None:
            return cron.instants(cron.parse(self.schedule.cron), self.schedule.zone, after)
        assert self.schedule.every is not None
        return _multiples(self.schedule.every, self.schedule.starts or _EPOCH, after)

    def _pairs(self, after: datetime) -> Iterator[tuple[datetime, datetime]]:
        """Each instant with the one after it."""
        return pairwise(self._instants(after))

    def _part(self, at: datetime) -> float:
        """A number from [0, 1)."""
        digest = hashlib.sha256(f"{self.salt} {at.isoformat()}".encode()).digest()
        return int.from_bytes(digest[:6], "big") / (1 << 48)


def upcoming(timetable: Timetable, after: datetime, count: int) -> list[Fire]:
    """The next fires."""
    return list(islice(timetable.fires(after), count))


def due(timetable: Timetable, last: datetime, now: datetime) -> Due:
    """What is to be done about the instants after `last`, up to which all are decided."""
    window, most = timetable.schedule.catch_up.within, timetable.schedule.catch_up.most
    counted = list(islice(_due(timetable, last, now), COUNTED + 1))
    whole = len(counted) <= COUNTED
    known = counted if whole else _latest(timetable, last, now, most + 1)
    if not known:
        return Due((), (), last, _first(timetable, last))
    fires = [fire for fire in known if now - fire.due_at <= window][-most:]
    left = [fire for fire in known if not fires or fire.at < fires[0].at]
    late = f"later than the catch-up window of {durations.show(window)}"
    spare = "of the fires in the catch-up window, only the latest " + (f"{most} are" if most > 1 else "is") + " made up"
    missed: list[Missed] = []
    if not whole:
        reason = late if now - counted[0].due_at > window else spare
        missed.append(Missed(counted[0], left[-1].at, None, reason))
    else:
        old = [fire for fire in left if now - fire.due_at > window]
        for part, reason in ((old, late), (left[len(old) :], spare)):
            if part:
                missed.append(Missed(part[0], part[-1].at, len(part), reason))
    return Due(tuple(fires), tuple(missed), known[-1].at, _first(timetable, known[-1].at))


def passed(timetable: Timetable, last: datetime, now: datetime, reason: str) -> Missed | None:
    """All that came due after `last`, as not to be fired."""
    counted = list(islice(_due(timetable, last, now), COUNTED + 1))
    if not counted:
        return None
    if len(counted) <= COUNTED:
        return Missed(counted[0], counted[-1].at, len(counted), reason)
    return Missed(counted[0], _latest(timetable, last, now, 1)[-1].at, None, reason)


def _due(timetable: Timetable, after: datetime, now: datetime) -> Iterator[Fire]:
    return takewhile(lambda fire: fire.due_at <= now, timetable.fires(after))


def _latest(timetable: Timetable, after: datetime, now: datetime, count: int) -> list[Fire]:
    """The last so many fires that are due, looked for from the end."""
    span = timedelta(minutes=1)
    while True:
        begin = max(after, now - span)
        found = deque(_due(timetable, begin, now), maxlen=count)
        if len(found) == count or begin == after:
            return list(found)
        span *= 2


def _first(timetable: Timetable, after: datetime) -> Fire | None:
    return next(timetable.fires(after), None)


def _multiples(every: timedelta, anchor: datetime, after: datetime) -> Iterator[datetime]:
    number = (after - anchor) // every + 1
    try:
        while True:
            yield anchor + number * every
            number += 1
    except OverflowError:  # the calendar ends with the year 9999
        return
