"""
Cron expressions of five fields in a time zone, with the semantics of Debian's cron.

    minute  hour  day of the month  month  day of the week (0 and 7 are Sunday)

When both day fields are restricted, a match of either is enough. `L` is the last day of a month, `MON#2` its second
Monday, `5L` its last Friday.
When clocks go forward, a skipped fixed time fires once, right after the change. When clocks go back, a repeated fixed
time fires at its first occurrence only. An expression whose minute or hour starts with `*` follows the wall clock:
skipped times do not fire, and a repeated hour fires twice.
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
#: The accepted syntax, for messages.
ACCEPTED = f"minute hour day-of-month month day-of-week, such as '30 2 * * 1-5', or {', '.join(ALIASES)}"
#: Maximum characters of one expression.
MAX_LENGTH = 200

#: The position of each field and its accepted values, by the field's name in the library's errors.
_FIELDS = {
    "minute": (0, "0-59"),
    "hour": (1, "0-23"),
    "day-of-month": (2, "1-31, L, LW"),
    "month": (3, "1-12, JAN-DEC"),
    "day-of-week": (4, "0-7, SUN-SAT, MON#2, 5L"),
}


def parse(text: str) -> str:
    """
    Return the expression with aliases expanded to five fields.

    Raises ValueError with the invalid field and its accepted values, or when the expression never matches a date.
    """
    fields = ALIASES.get(text.strip().lower(), text).split()
    if len(text) > MAX_LENGTH or len(fields) != 5:
        raise ValueError(f"this is not a cron expression of five fields: write {ACCEPTED}")
    expression = " ".join(fields)
    try:
        next(CronSim(expression, datetime(2000, 1, 1, tzinfo=UTC)))
    except CronSimError as error:
        name = str(error).removeprefix("Bad ")
        place, accepted = _FIELDS[name]
        reason = f"the {name} {fields[place]!r} is invalid: write {accepted}, lists, ranges or steps such as */15"
        raise ValueError(reason) from None
    except StopIteration:
        raise ValueError("the expression never matches a date") from None
    return expression


def instants(expression: str, zone: tzinfo, after: datetime) -> Iterator[datetime]:
    """
    Yield the matching instants after `after`, ascending, in UTC. Ends when none follows within 50 years.

    The instants do not depend on `after`.
    """
    try:
        # When the search starts in the second of two equal hours, the library also returns instants of the first hour.
        # When it starts within a minute, the library may return an instant that an earlier start would skip.
        begin = after.astimezone(zone).replace(second=0, microsecond=0)
        for found in CronSim(expression, begin):
            instant = found.astimezone(UTC)
            if instant > after:
                yield instant
    except OverflowError:  # the calendar ends with the year 9999
        return
