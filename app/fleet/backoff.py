"""
Backoff: the delay before a configuration is started on a host again after failures.

It doubles with each failure in a row. A pool that had served and failed once is started again at once.
After several failures in a row the configuration is in quarantine on that host, with a reason that operators can read.
An operator's start command, or a pool that serves, ends the quarantine.

Nothing here reads a clock: the caller passes `now`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta


@dataclass(frozen=True, slots=True)
class Backoff:
    """A configuration that is not started on a host for some time, for example after crashes."""

    configuration: str
    host: str
    until: datetime
    #: A sentence for operators: "it failed 3 times in a row".
    reason: str


#: The first delay; it doubles with each failure in a row.
FIRST_DELAY = timedelta(seconds=2)
#: A pool that had served is started again at once if no other failed within this time before.
FAILURE_FREE = timedelta(minutes=1)
#: Failures in a row after which a configuration is in quarantine on a host, and for how long.
QUARANTINE_AFTER, QUARANTINE = 5, timedelta(minutes=30)


@dataclass(frozen=True, slots=True)
class PastPool:
    """A pool that has ended."""

    configuration: str
    host: str
    ended: datetime
    #: It ended in another way than requested.
    failed: bool
    #: It had served.
    served: bool
    ending: str


def backoffs(history: Iterable[PastPool], cleared: dict[str, datetime], now: datetime) -> tuple[Backoff, ...]:
    """
    Return the configurations that are not started on a host for some time.

    `history` holds the pools that ended recently. `cleared` is the time of an operator's last start command, by
    configuration: earlier failures do not count.
    """
    rows: dict[tuple[str, str], list[PastPool]] = {}
    failed: dict[tuple[str, str], datetime] = {}
    for one in sorted(history, key=lambda one: one.ended):
        key = one.configuration, one.host
        in_a_row = rows.setdefault(key, [])
        if one.served or not one.failed:
            in_a_row.clear()
        before = failed.get(key)
        if one.failed:
            failed[key] = one.ended
        if one.served and (before is None or one.ended - before > FAILURE_FREE):
            continue
        if one.failed and one.ended > cleared.get(one.configuration, one.ended - QUARANTINE):
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
            found.append(Backoff(configuration, host, until, f"it failed {times}, most recently: {last.ending}"))
    return tuple(found)
