"""Charts read groups of series where they can, and show what the samples add up to."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import text

from app.governance.signals import charts, store
from app.governance.signals.charts import ChartWanted
from app.governance.signals.names import SIGNALS, SignalKind, Statistic
from app.governance.signals.rollup import roll_up
from app.governance.signals.sample import Aggregate, Sample, SignalLabels
from app.governance.signals.store import CLOSED, GROUPED, SignalQuery, SignalStore
from app.kernel.database import Database

HOUR = timedelta(hours=1)
NAMES = ("response_time", "tokens", "error_rate", "memory_reserved")
LABELS = ("model", "pool", "namespace", "device")
WINDOWS = [
    (timedelta(hours=1), timedelta(minutes=1)),
    (timedelta(hours=6), timedelta(minutes=5)),
    (timedelta(hours=24), HOUR),
    (timedelta(days=7), HOUR),
    (timedelta(days=31), timedelta(days=1)),
]


def database_now(database: Database) -> datetime:
    with database.work() as work:
        found: datetime = work.rows(text("SELECT now() AS now"))[0].now
        return found


def samples(now: datetime) -> Iterator[Sample]:
    """Values that add up without rounding, over a time that has groups of minutes, hours and days."""
    chance = random.Random(7)
    ages = [chance.randrange(60) for _ in range(40)] + [chance.randrange(24 * 60) for _ in range(60)]
    ages += [chance.randrange(24 * 60, 20 * 24 * 60) for _ in range(60)]
    for age in sorted(ages, reverse=True):
        at = now - timedelta(minutes=age)
        work = SignalLabels(f"m{age % 3}", f"p{age % 5}", "h", "", f"ns{age % 2}", "standard")
        yield Sample("response_time", chance.randrange(1, 64) / 4, work, at=at)
        yield Sample("tokens", chance.randrange(1000), work, at=at)
        yield Sample("error_rate", age % 4 == 0, work, at=at)
        yield Sample("memory_reserved", age % 7, SignalLabels(host="h", device=f"gpu{age % 2}"), 8.0, at=at)


def begin_of(now: datetime, window: timedelta, step: timedelta) -> datetime:
    begin = (now - window).replace(second=0, microsecond=0)
    if step >= HOUR:
        begin = begin.replace(minute=0)
    return begin.replace(hour=0) if step > HOUR else begin


def added(written: list[Sample], signal: str, by: str | None, begin: datetime) -> Mapping[str, Aggregate]:
    """Add up samples by the promise, not by the database."""
    found: dict[str, Aggregate] = {}
    for one in written:
        if one.signal == signal and one.at is not None and one.at >= begin:
            found.setdefault(getattr(one.labels, by) if by else "", Aggregate()).observe(one)
    return found


def comparable(value: Any) -> tuple[object, ...]:
    return (value.observations, value.weight, value.total, value.least, value.greatest, dict(value.histogram))


def test_a_chart_is_the_sum_of_its_samples(database: Database) -> None:
    now = database_now(database)
    written = list(samples(now))
    SignalStore(database).write(written)
    assert roll_up(database, lambda: True).groups > 0
    late = [replace(one, at=now) for one in written[:9]]
    SignalStore(database).write(late)
    written += late

    for window, step in WINDOWS:
        wanted = [
            ChartWanted(name, by) for name in NAMES for by in (None, *LABELS) if by in (None, *SIGNALS[name].labels)
        ]
        wanted = [one for one in wanted if step < timedelta(days=1) or one.by != "pool"]  # days have no pools
        with database.work() as work:
            begin = begin_of(work.rows(text("SELECT now() AS now"))[0].now, window, step)
            found = charts.read(work, wanted, window, step, None, 50)
            of_one = charts.read(work, [ChartWanted("tokens", "model")], window, step, "ns1", 50)[0]
            read = [store.read(work, SignalQuery(one.signal, window, by=one.by)) for one in wanted]
        for one, lines, values in zip(wanted, found, read, strict=True):
            expected = added(written, one.signal, one.by, begin)
            got = {line.group: comparable(line.value) for line in lines}
            assert got == {group: comparable(value) for group, value in expected.items()}, (one, window)
            every = added(written, one.signal, None, begin)[""]
            assert comparable(charts.together(lines, window)) == comparable(every)
            for line in lines:
                points = [value for _, value in line.points]
                assert sum(point.total for point in points) == line.value.total
                assert sum(point.observations for point in points) == line.value.observations
                if SIGNALS[one.signal].kind is SignalKind.DISTRIBUTION:
                    assert sum(sum(point.histogram.values()) for point in points) == line.value.observations
                if window != timedelta(hours=6):  # which other readers have by the hour
                    assert values[line.group].last == line.value.last
        theirs = added([one for one in written if one.labels.namespace == "ns1"], "tokens", "model", begin)
        assert {line.group: line.value.total for line in of_one} == {name: one.total for name, one in theirs.items()}


def test_groups_change_no_window_and_no_quantile(database: Database) -> None:
    """Each query gives the same with groups as without."""
    signals, now = SignalStore(database), database_now(database)
    signals.write(list(samples(now)))
    roll_up(database, lambda: True)
    queries = [
        SignalQuery("response_time", window, where, by, ended)
        for window in (HOUR, timedelta(hours=24), timedelta(days=7))
        for where in ({}, {"namespace": "ns1"}, {"model": "m1"})
        for by in (None, "model", "namespace")
        for ended in (timedelta(0), window)
    ]
    with database.work() as work:
        grouped = [store.read(work, one) for one in queries]
        work.run(text("DELETE FROM signal_watermark WHERE name LIKE 'grouped:%'"))
        ungrouped = [store.read(work, one) for one in queries]
    assert any(grouped)
    assert grouped == ungrouped
    for found in grouped:
        for value in found.values():
            assert value.statistic(Statistic.P95) is not None


def test_what_is_written_while_minutes_are_closed_is_in_the_groups(database: Database) -> None:
    """A late sample is never added to a minute that was added up already."""
    signals, now = SignalStore(database), database_now(database)
    signals.write([Sample("tokens", 1, SignalLabels("m"), at=now - timedelta(minutes=30))])
    roll_up(database, lambda: True)
    signals.write([Sample("tokens", 1, SignalLabels("m"), at=now - timedelta(minutes=30))])
    with database.work() as work:
        closed = work.rows(text("SELECT at FROM signal_watermark WHERE name = :name"), {"name": CLOSED})[0].at
        assert work.rows(text("SELECT max(at) AS at FROM signal_point WHERE resolution = 1"))[0].at >= closed
        names = {"minutes": GROUPED[1]}
        grouped = work.rows(text("SELECT at FROM signal_watermark WHERE name = :minutes"), names)[0].at
    assert grouped == closed
    assert signals.read(SignalQuery("tokens", HOUR))[""].total == 2


def test_groups_use_up_no_ids_when_nothing_is_new(database: Database) -> None:
    signals, now = SignalStore(database), database_now(database)
    for minutes in (40, 20):
        signals.write([Sample("tokens", 1, SignalLabels("m", "p"), at=now - timedelta(minutes=minutes))])
        with database.work() as work:
            work.run(text("DELETE FROM signal_watermark"))
        roll_up(database, lambda: True)
    with database.work() as work:
        row = work.rows(text("SELECT max(id) - min(id) + 1 AS ids, count(*) AS n FROM signal_group"))[0]
    assert row.ids == row.n
