"""When a scheduled job is due."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from app.governance.jobs.job import Trigger

NOW = datetime(2026, 3, 29, 12, 0, tzinfo=UTC)
LONG_AGO = NOW - timedelta(days=400)


def minutes(count: float) -> timedelta:
    return timedelta(minutes=count)


def test_an_interval_is_due_once_for_each_instant() -> None:
    """Messages come late and early; a duplicate comes at once."""
    hourly = Trigger(every=timedelta(hours=1))
    assert hourly.is_due(None, LONG_AGO, NOW)
    assert hourly.is_due(NOW - minutes(58), LONG_AGO, NOW)
    assert not hourly.is_due(NOW - minutes(5), LONG_AGO, NOW)
    assert not hourly.is_due(NOW, LONG_AGO, NOW)


def test_an_instant_of_a_cron_expression_is_due_until_it_is_claimed() -> None:
    daily = Trigger(cron="30 9 * * *", timezone="Europe/Berlin")
    instant = datetime(2026, 3, 29, 7, 30, tzinfo=UTC)
    assert daily.last_instant(NOW) == instant
    assert daily.is_due(instant - minutes(1), LONG_AGO, NOW)
    assert not daily.is_due(instant, LONG_AGO, NOW)
    assert not daily.is_due(instant + minutes(3), LONG_AGO, NOW)
    assert not daily.is_due(None, instant + minutes(1), NOW), "instants before the change do not count"
    assert daily.is_due(instant - timedelta(days=9), LONG_AGO, NOW), "missed instants are one pass"


@pytest.mark.parametrize(
    ("cron", "last"),
    [
        ("* * * * *", "2026-03-29T12:00"),
        ("*/7 * * * *", "2026-03-29T12:00"),
        ("0 3 * * 1", "2026-03-23T03:00"),
        ("0 0 1 1 *", "2026-01-01T00:00"),
        ("0 0 31 12 *", "2025-12-31T00:00"),
    ],
)
def test_the_last_instant_of_rare_and_frequent_expressions(cron: str, last: str) -> None:
    assert Trigger(cron=cron).last_instant(NOW) == datetime.fromisoformat(last).replace(tzinfo=UTC)


def test_the_next_instant() -> None:
    hourly = Trigger(every=timedelta(hours=1))
    assert hourly.next_after(NOW - minutes(20), NOW) == NOW + minutes(40)
    assert hourly.next_after(NOW - minutes(90), NOW) == NOW, "it is overdue"
    assert Trigger(cron="0 13 * * *").next_after(None, NOW) == NOW + timedelta(hours=1)
