"""
A scheduled job as operators see and change it: when it runs, whether it is paused, and how its passes ended.

An interval or a cron expression replaces the interval of the settings.
A job with an interval of at least a minute, or a cron expression, is claimed before each pass: whatever sends the
message, and however often, at most one control worker runs it for each instant.

Nothing here reads a clock: the caller passes `now`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from itertools import islice, takewhile
from zoneinfo import ZoneInfo

from app.workflows.schedules import cron

#: The bounds of intervals.
MIN_EVERY, MAX_EVERY = timedelta(seconds=1), timedelta(days=366)
#: From this interval on, a pass is claimed in the database.
CLAIMED_FROM = timedelta(minutes=1)
#: How often beat asks whether a cron expression matches.
CRON_CHECK = timedelta(seconds=10)
#: How far back the last instant of a cron expression is looked for, doubling from the first to the last.
_SPANS = (timedelta(hours=2), timedelta(days=2), timedelta(days=62), timedelta(days=800))
#: Most instants that are looked at in one such span.
_MAX_INSTANTS = 5_000


class PassOutcome(StrEnum):
    """How a pass of a job ended."""

    #: It did something.
    DONE = "done"
    #: There was nothing to do.
    IDLE = "idle"
    #: The database or the broker was unavailable; the next pass tries again.
    POSTPONED = "postponed"
    #: It raised an error.
    FAILED = "failed"


class PassState(StrEnum):
    """Where a pass that is kept in the history stands."""

    REQUESTED = "requested"
    RUNNING = "running"
    ENDED = "ended"
    #: No control worker took it, or the one that did is gone.
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Trigger:
    """When a job runs: exactly one of `every` and `cron` is set."""

    every: timedelta | None = None
    #: Five fields (see `app/workflows/schedules/cron.py`).
    cron: str | None = None
    #: The time zone of `cron`.
    timezone: str = "UTC"

    @property
    def is_claimed(self) -> bool:
        """Whether a pass is claimed in the database first."""
        return self.every is None or self.every >= CLAIMED_FROM

    @property
    def sent_every(self) -> timedelta:
        """How often beat sends the message of the job."""
        return CRON_CHECK if self.every is None else self.every

    def is_due(self, claimed_at: datetime | None, since: datetime, now: datetime) -> bool:
        """
        Whether a pass may begin, when the last one was claimed at `claimed_at`.

        An interval tolerates half of itself: messages are not evenly spaced. The instants of a cron expression count
        after `since` only; several missed ones are one pass.
        """
        if self.every is not None:
            return claimed_at is None or now - claimed_at >= self.every / 2
        last = self.last_instant(now)
        return last is not None and last > (since if claimed_at is None else max(claimed_at, since))

    def last_instant(self, now: datetime) -> datetime | None:
        """Return the last instant of the cron expression up to `now`; None when none is found within 800 days."""
        for span in _SPANS:
            past = takewhile(lambda at: at <= now, self._instants(now - span))
            if found := deque(islice(past, _MAX_INSTANTS), maxlen=1):
                return found[0]
        return None

    def next_after(self, last: datetime | None, now: datetime) -> datetime | None:
        """Return when it runs next, when it was last due at `last`; None when it never does."""
        if self.every is not None:
            return now if last is None else max(now, last + self.every)
        return next(self._instants(now), None)

    def _instants(self, after: datetime) -> Iterator[datetime]:
        assert self.cron is not None
        return cron.instants(self.cron, ZoneInfo(self.timezone), after)
