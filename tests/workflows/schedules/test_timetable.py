"""The timetable: instants of triggers, clock changes, and catch-up after outages."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import cache
from itertools import islice, pairwise
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.workflows.schedules import cron
from app.workflows.schedules.schedule import Schedule
from app.workflows.schedules.timetable import MAX_COUNTED, Due, Timetable, all_missed, due, upcoming

MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)


def timetable(salt: str = "", **fields: Any) -> Timetable:
    return Timetable(Schedule.model_validate({"schedule": "s", "workflow": "w", **fields}), salt)


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


def fired(table: Timetable, after: str, count: int) -> list[str]:
    zone = table.schedule.zone
    return [fire.at.astimezone(zone).isoformat(timespec="minutes") for fire in upcoming(table, at(after), count)]


# ---- through changes of the clock ----

#: Instants at which clocks change: an hour forward or back, at midnight and over a whole day too.
CHANGES = [
    ("Europe/Berlin", "2026-03-29T01:00Z"),
    ("Europe/Berlin", "2026-10-25T01:00Z"),
    ("America/New_York", "2026-03-08T07:00Z"),
    ("America/New_York", "2026-11-01T06:00Z"),
    ("America/Havana", "2026-03-08T05:00Z"),
    ("Asia/Beirut", "2026-03-28T22:00Z"),
    ("Africa/Cairo", "2026-10-29T21:00Z"),
    ("Pacific/Apia", "2011-12-30T10:00Z"),
    ("Asia/Kathmandu", "2026-06-01T00:00Z"),
]


def fields(last: int) -> st.SearchStrategy[str]:
    """Generate the text of a minute or hour field."""
    listed = st.lists(st.integers(0, last), min_size=1, max_size=4, unique=True)
    return st.one_of(
        st.just("*"),
        st.integers(1, last).map(lambda step: f"*/{step}"),
        listed.map(lambda numbers: ",".join(map(str, sorted(numbers)))),
    )


def numbers(field: str, last: int) -> set[int]:
    head, _, step = field.partition("/")
    return set(range(0, last + 1, int(step or 1))) if head == "*" else {int(part) for part in field.split(",")}


def promised(minute: str, hour: str, zone: ZoneInfo, begin: datetime, end: datetime) -> list[datetime]:
    """A reference implementation of the documented rules, minute by minute."""
    matches = numbers(minute, 59), numbers(hour, 23)

    def named(local: datetime) -> bool:
        return local.minute in matches[0] and local.hour in matches[1]

    instants = [begin + n * MINUTE for n in range(1, int((end - begin) / MINUTE) + 1)]
    if minute.startswith("*") or hour.startswith("*"):
        return [instant for instant in instants if named(instant.astimezone(zone))]
    found: set[datetime] = set()
    local = begin.astimezone(zone).replace(tzinfo=None)
    while local <= end.astimezone(zone).replace(tzinfo=None):
        if named(local):
            # Reading the wall clock before a gap goes beyond it by as much as was skipped.
            instant = local.replace(tzinfo=zone).astimezone(UTC)
            skipped = instant.astimezone(zone).replace(tzinfo=None) != local
            while skipped and (instant - MINUTE).astimezone(zone).replace(tzinfo=None) > local:
                instant -= MINUTE
            found.add(instant)
        local += MINUTE
    return sorted(instant for instant in found if begin < instant <= end)


@given(st.sampled_from(CHANGES), fields(59), fields(23), st.integers(-36 * 60, 12 * 60), st.integers(0, 59))
@settings(max_examples=80, deadline=None)
def test_cron_fires_as_documented_from_any_start(
    change: tuple[str, str], minute: str, hour: str, offset: int, second: int
) -> None:
    zone, middle = ZoneInfo(change[0]), at(change[1])
    begin = middle + offset * MINUTE
    # Whole minutes either side of the change; the search itself may start between them.
    expected = [x for x in promised(minute, hour, zone, begin - DAY, middle + DAY) if x > begin + second * MINUTE / 60]
    found = cron.instants(cron.parse(f"{minute} {hour} * * *"), zone, begin + timedelta(seconds=second))

    assert list(islice(found, len(expected))) == expected
    assert next(found) > middle + DAY


@pytest.mark.parametrize(
    ("expression", "after", "expected"),
    [
        ("30 2 * * *", "2026-03-28T12:00Z", ["2026-03-29T03:00+02:00", "2026-03-30T02:30+02:00"]),
        ("15,45 2 * * *", "2026-03-28T12:00Z", ["2026-03-29T03:00+02:00", "2026-03-30T02:15+02:00"]),
        ("30 2 * * *", "2026-10-24T12:00Z", ["2026-10-25T02:30+02:00", "2026-10-26T02:30+01:00"]),
        ("30 2 * * *", "2026-10-25T01:05Z", ["2026-10-26T02:30+01:00", "2026-10-27T02:30+01:00"]),
        ("0 * * * *", "2026-10-24T23:30Z", ["2026-10-25T02:00+02:00", "2026-10-25T02:00+01:00"]),
        ("*/30 2 * * *", "2026-10-25T00:10Z", ["2026-10-25T02:30+02:00", "2026-10-25T02:00+01:00"]),
        ("0 */2 * * *", "2026-03-28T23:30Z", ["2026-03-29T04:00+02:00", "2026-03-29T06:00+02:00"]),
        ("@daily", "2026-01-01T00:00Z", ["2026-01-02T00:00+01:00", "2026-01-03T00:00+01:00"]),
        ("0 9 * * MON#1", "2026-01-01T00:00Z", ["2026-01-05T09:00+01:00", "2026-02-02T09:00+01:00"]),
        ("0 0 L * *", "2026-01-01T00:00Z", ["2026-01-31T00:00+01:00", "2026-02-28T00:00+01:00"]),
        ("0 0 13 * 5", "2026-03-12T00:00Z", ["2026-03-13T00:00+01:00", "2026-03-20T00:00+01:00"]),
        ("0 12 29 2 *", "2026-01-01T00:00Z", ["2028-02-29T12:00+01:00", "2032-02-29T12:00+01:00"]),
    ],
)
def test_cron_in_berlin(expression: str, after: str, expected: list[str]) -> None:
    assert fired(timetable(cron=expression, timezone="Europe/Berlin"), after, 2) == expected


@pytest.mark.parametrize("after", ["2026-04-04T14:40:00Z", "2026-04-04T14:59:59Z"])
def test_a_repeated_half_hour_fires_once_from_any_start(after: str) -> None:
    """At 2:00 the clock goes back to 1:30."""
    table = timetable(cron="30 * * * *", timezone="Australia/Lord_Howe")
    assert fired(table, after, 1) == ["2026-04-05T02:30+10:30"]


def test_an_interval_counts_elapsed_time_from_its_anchor() -> None:
    assert fired(timetable(every="15m"), "2026-01-01T00:07Z", 2) == ["2026-01-01T00:15+00:00", "2026-01-01T00:30+00:00"]
    daily = timetable(every="1d", start="2026-10-24T04:00", timezone="Europe/Berlin")
    assert fired(daily, "2026-01-01T00:00Z", 2) == ["2026-10-24T04:00+02:00", "2026-10-25T03:00+01:00"]


def test_no_fire_before_the_start_or_from_the_end() -> None:
    table = timetable(every="1h", start="2026-01-01T05:00", end="2026-01-01T07:00")
    assert fired(table, "2020-01-01T00:00Z", 9) == ["2026-01-01T05:00+00:00", "2026-01-01T06:00+00:00"]
    assert due(table, at("2026-01-01T06:00Z"), at("2027-01-01T00:00Z")) == Due((), (), at("2026-01-01T06:00Z"))


def test_no_fire_after_the_end_of_the_calendar() -> None:
    assert upcoming(timetable(cron="0 0 1 1 *", timezone="Asia/Tokyo"), at("9999-12-31T23:00Z"), 3) == []
    assert upcoming(timetable(every="1d"), at("9999-12-31T00:00Z"), 3) == []


@given(st.text(max_size=8), st.integers(0, 10**9), st.sampled_from(["30s", "10m", "40d"]))
@settings(max_examples=30, deadline=None)
def test_jitter_is_deterministic_and_never_passes_the_next_fire(salt: str, when: int, jitter: str) -> None:
    table = timetable(salt, cron="*/7 3,4 * * *", timezone="Europe/Berlin", jitter=jitter)
    found = upcoming(table, datetime.fromtimestamp(when, UTC), 20)

    assert all(fire.at <= fire.due_at < following.at for fire, following in pairwise(found))
    assert all(fire.due_at - fire.at < timedelta(days=40) for fire in found)
    assert upcoming(table, found[7].at, 12) == found[8:]


def test_jitters_spread_over_their_range() -> None:
    delays = [
        (fire.due_at - fire.at) / MINUTE
        for salt in "abcdef"
        for fire in upcoming(timetable(salt, every="1h", jitter="10m"), at("2026-01-01T00:00Z"), 20)
    ]
    assert min(delays) < 1
    assert max(delays) > 9
    assert len(set(delays)) == len(delays)


# ---- after outages ----

CATCH_UPS: list[Any] = [
    "10s",
    "1h",
    {"within": "20m", "runs": "all", "limit": 1000},
    {"within": "6h", "runs": "all", "limit": 1000},
    {"within": "6h", "runs": "all", "limit": 3},
    {"within": "30d"},
]
TRIGGERS: list[dict[str, Any]] = [
    {"every": "7m"},
    {"every": "1h", "jitter": "50m"},
    {"cron": "*/10 * * * *", "timezone": "Europe/Berlin"},
    {"cron": "30 1,2,3 * * *", "timezone": "Europe/Berlin", "jitter": "20m"},
    {"cron": "0 3 * * *", "timezone": "America/New_York"},
]


@cache
def from_creation(trigger: int, created: str) -> list[tuple[datetime, datetime]]:
    found = upcoming(timetable("salt", **TRIGGERS[trigger]), at(created), 1400)
    return [(fire.at, fire.due_at) for fire in found]


def spans(result: Due, instants: list[datetime]) -> Iterator[list[datetime]]:
    for gap in result.missed:
        part = [instant for instant in instants if gap.first.at <= instant <= gap.last]
        assert len(part) == gap.count
        yield part


@given(
    st.integers(0, len(TRIGGERS) - 1),
    st.sampled_from(CATCH_UPS),
    st.sampled_from(["2026-03-27T22:13:05Z", "2026-10-24T03:00Z"]),
    st.lists(st.sampled_from([1, 1, 2, 13, 700, 4000, 20_000, 90_000, -30]), min_size=1, max_size=6),
)
@settings(max_examples=80, deadline=None)
def test_each_instant_is_decided_once_and_caught_up_within_the_window(
    trigger: int, catch_up: Any, created: str, lapses: list[int]
) -> None:
    """Pass come after random delays, some of them outages; a pass may even see a clock that went back."""
    table = timetable("salt", **TRIGGERS[trigger], catch_up=catch_up)
    rule, begin, every = table.schedule.catch_up, at(created), from_creation(trigger, created)
    decided = 0
    last = now = begin
    for pass_days in lapses:
        now += timedelta(seconds=pass_days)
        result = due(table, last, now)
        came_due = [pair for pair in every[decided:] if pair[1] <= now]
        in_time = [instant for instant, due_at in came_due if now - due_at <= rule.within]
        most = rule.limit if rule.runs == "all" else 1

        assert [fire.at for fire in result.fires] == in_time[-most:]
        lost = [instant for part in spans(result, [x for x, _ in every]) for instant in part]
        assert sorted(lost + in_time[-most:]) == [instant for instant, _ in came_due]
        decided += len(came_due)
        last = result.last


def test_the_cost_does_not_grow_with_the_length_of_an_outage() -> None:
    """Ten years of fires each second, a window of one: the latest is started, the others are one uncounted gap."""
    table = timetable(every="1s", catch_up={"within": "365d", "runs": "all", "limit": 2})
    found = due(table, at("2016-01-01T00:00Z"), at("2026-01-01T00:00Z"))

    assert [fire.at for fire in found.fires] == [at("2025-12-31T23:59:59Z"), at("2026-01-01T00:00Z")]
    (gap,) = found.missed
    assert (gap.first.at, gap.last, gap.count) == (at("2016-01-01T00:00:01Z"), at("2025-12-31T23:59:58Z"), None)
    assert found.last == at("2026-01-01T00:00Z")


def test_missed_fires_have_a_reason() -> None:
    table = timetable(every="1h", catch_up="150m")
    found = due(table, at("2026-01-01T00:00Z"), at("2026-01-01T05:00Z"))

    assert [(gap.count, gap.reason) for gap in found.missed] == [
        (2, "later than the catch-up window of 2h30m"),
        (2, "only the latest fire in the catch-up window is started"),
    ]


def test_a_fire_that_is_late_by_exactly_the_window_is_started() -> None:
    table = timetable(every="1d", catch_up="10s")
    assert due(table, at("2026-01-01T12:00Z"), at("2026-01-02T00:00:10Z")).missed == ()
    assert due(table, at("2026-01-01T12:00Z"), at("2026-01-02T00:00:11Z")).fires == ()


def test_all_missed_counts_the_fires() -> None:
    table = timetable(every="1m")
    few = all_missed(table, at("2026-01-01T00:00Z"), at("2026-01-01T00:03:30Z"), "why")
    many = all_missed(table, at("2026-01-01T00:00Z"), at("2026-03-01T00:00:30Z"), "why")

    assert few is not None
    assert (few.count, few.last) == (3, at("2026-01-01T00:03Z"))
    assert many is not None
    assert (many.count, many.last) == (None, at("2026-03-01T00:00Z"))
    assert MAX_COUNTED < 59 * DAY / MINUTE
    assert all_missed(table, at("2026-01-01T00:00Z"), at("2026-01-01T00:00:30Z"), "why") is None
