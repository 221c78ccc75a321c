"""When a rule is evaluated: its days and hours, in its time zone."""

from __future__ import annotations

from datetime import datetime, time, timedelta

from app.governance.rules.rule import ActiveHours

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


def is_active(hours: ActiveHours | None, now: datetime) -> bool:
    """
    Return whether a rule is evaluated at this instant.

    Hours that end before they begin, such as 22:00-06:00, go on into the next day; the day is that of their begin.
    """
    if hours is None:
        return True
    local = now.astimezone(hours.zone)
    if hours.hours is None:
        return not hours.days or _DAYS[local.weekday()] in hours.days
    begin, _, end = hours.hours.partition("-")
    first, last, at = time.fromisoformat(begin), time.fromisoformat(end), local.time()
    if first <= last:
        return first <= at < last and (not hours.days or _DAYS[local.weekday()] in hours.days)
    if first <= at:
        day = local
    elif at < last:
        day = local - timedelta(days=1)
    else:
        return False
    return not hours.days or _DAYS[day.weekday()] in hours.days
