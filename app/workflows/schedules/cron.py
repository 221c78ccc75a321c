"""
Cron expressions: five fields, read as Debian's cron reads them, in a time zone.

    minute  hour  day of the month  month  day of the week (0 and 7 are Sunday)

Where both days are restricted, either may match. `L` is the last day of a month, `MON#2` its second Monday, `5L` its
last Friday. When clocks go forward, what a fixed time skips fires once, right after the change; when they go back, it
fires at the first of the two. An expression whose minute or hour begins with `*` goes by the clock as it is: what is
skipped is skipped, and an hour that comes twice fires twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, tzinfo

from cronsim import CronSim, CronSimError

ALIASES = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
#: What messages tell people to write.
ACCEPTED = f"minute hour day-of-month month day-of-week, such as '30 2 * * 1-5', or {', '.join(ALIASES)}"
#: Characters of one expression.
MAX_LENGTH = 200

#: The places of fields, by the names that the library gives them; and what stands in each.
_FIELDS = {
    "minute": (0, "0-59"),
    "hour": (1, "0-23"),
    "day-of-month": (2, "1-31, L, LW"),
    "month": (3, "1-12, JAN-DEC"),
    "day-of-week": (4, "0-7, SUN-SAT, MON#2, 5L"),
}


def parse(text: str) -> str:
    """
    The five fields that the text stands for.

    Raises ValueError naming the field that is wrong and what may stand there; also for a date that never comes.
    """
    fields = ALIASES.get(text.strip().lower(), text).split()
    if len(text) > MAX_LENGTH or len(fields) != 5:
        raise ValueError(f"this is no cron expression of five fields: write {ACCEPTED}")
    expression = " ".join(fields)
    try:
        next(CronSim(expression, datetime(2000, 1, 1, tzinfo=UTC)))
    except CronSimError as error:
        name = str(error).removeprefix("Bad ")
        place, accepted = _FIELDS[name]
        reason = f"there is no {name} {fields[place]!r}: write {accepted}, lists, ranges or steps such as */15"
        raise ValueError(reason) from None
    except StopIteration:
        raise ValueError("this names a date that never comes") from None
    return expression


def instants(expression: str, zone: tzinfo, after: datetime) -> Iterator[datetime]:
    """
    Every instant after `after` that the parsed expression names, rising, in UTC. Ends when none comes for 50 years.

    Wherever it begins, the instants are the same.
    """
    try:
        # In the second of two equal hours the library begins with those of the first; from a second within a minute, it
        # may find what it passes over when it begins earlier.
        begin = after.astimezone(zone).replace(second=0, microsecond=0)
        for found in CronSim(expression, begin):
            instant = found.astimezone(UTC)
            if instant > after:
                yield instant
    except OverflowError:  # the calendar ends with the year 9999
        return
