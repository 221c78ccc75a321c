"""
Crashes: what follows when the pools of a configuration fail on a host. They are started again, later each time; a pool
that had served, and died for once, at once.

After a few failures in a row the host is left alone for long, and everybody can read why; an operator's order, or
a pool that served, ends that.

Nothing here reads a clock: the caller passes `now`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta


@dataclass(frozen=True, slots=True)
class Backoff:
    """A configuration that is not started on a host for a while, such as after crashes."""

    configuration: str
    host: str
    until: datetime
    #: As a person reads it: "its process died 3 times".
    reason: str


#: The first delay; it doubles with each failure in a row.
FIRST_DELAY = timedelta(seconds=2)
#: A pool that had served is started again at once when none had failed for so long.
ONCE = timedelta(minutes=1)
#: After so many failures in a row, and for so long, the host is left alone.
QUARANTINE_AFTER, QUARANTINE = 5, timedelta(minutes=30)


@dataclass(frozen=True, slots=True)
class Past:
    """A pool that has ended."""

    configuration: str
    host: str
    ended: datetime
    #: Otherwise than it was asked to.
    failed: bool
    #: It had begun to serve.
    served: bool
    ending: str


def backoffs(history: Iterable[Past], pardoned: dict[str, datetime], now: datetime) -> tuple[Backoff, ...]:
    """
    The configurations that are not started on a host for a while.

    `history` is the recent past. `pardoned` says by configuration since when an operator wants it tried again.
    """
    rows: dict[tuple[str, str], list[Past]] = {}
    failed: dict[tuple[str, str], datetime] = {}
    for one in sorted(history, key=lambda one: one.ended):
        where = one.configuration, one.host
        in_a_row = rows.setdefault(where, [])
        if one.served or not one.failed:
            in_a_row.clear()
        before = failed.get(where)
        if one.failed:
            failed[where] = one.ended
        if one.served and (before is None or one.ended - before > ONCE):
            continue
        if one.failed and one.ended > pardoned.get(one.configuration, one.ended - QUARANTINE):
            in_a_row.append(one)
    found = []
    for (configuration, host), failures in rows.items():
        if not failures:
            continue
        count, last = len(failures), failures[-1]
        quarantined = count >= QUARANTINE_AFTER
        until = last.ended + (QUARANTINE if quarantined else FIRST_DELAY * 2 ** (count - 1))
        if until > now:
            times = "once" if count == 1 else f"{count} times in a row"
            found.append(Backoff(configuration, host, until, f"it failed {times} on {host}, at last: {last.ending}"))
    return tuple(found)
