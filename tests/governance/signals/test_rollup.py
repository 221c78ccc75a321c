"""Minutes become hours, hours become days, and each observation is counted once at each resolution."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from sqlalchemy import text

from app.governance.signals import store
from app.governance.signals.names import Statistic
from app.governance.signals.rollup import roll_up
from app.governance.signals.rows import DAY, HOUR, MINUTE
from app.governance.signals.sample import Sample, SignalLabels
from app.governance.signals.store import SignalQuery, SignalStore
from app.kernel.database import Database


def now(database: Database) -> datetime:
    """The last full hour whose minutes are closed."""
    with database.work() as work:
        found: datetime = work.rows(text("SELECT date_trunc('hour', now() - interval '3 minutes') AS now"))[0].now
        return found


def counts(database: Database) -> dict[int, tuple[int, int]]:
    """By resolution: points, and their observations."""
    with database.work() as work:
        rows = work.rows(
            text("""
            SELECT resolution, count(*) AS points, sum(observations)::bigint AS observations
            FROM signal_point GROUP BY resolution
        """)
        )
    return {row.resolution: (row.points, row.observations) for row in rows}


def test_each_resolution_has_the_same_sums(database: Database) -> None:
    signals, hour = SignalStore(database), now(database)
    minutes = [hour - timedelta(minutes=n) for n in range(1, 181)]
    signals.write(
        [
            Sample("response_time", n, SignalLabels(model="m", pool=f"p{n % 2}"), at=at)
            for n, at in enumerate(minutes, 1)
        ]
    )
    before = signals.read(SignalQuery("response_time", timedelta(hours=6)))[""]
    first = roll_up(database, lambda: True)
    assert (first.hours, first.days) in {(6, 0), (6, 1)}
    assert roll_up(database, lambda: True).hours == 0
    after = signals.read(SignalQuery("response_time", timedelta(hours=6)))[""]
    for statistic in (Statistic.MEAN, Statistic.P50, Statistic.P95, Statistic.MIN, Statistic.MAX, Statistic.COUNT):
        assert after.statistic(statistic) == before.statistic(statistic)
    assert counts(database)[HOUR] == (6, 180)


def test_what_comes_late_is_counted_in_the_first_open_hour(database: Database) -> None:
    signals, hour = SignalStore(database), now(database)
    signals.write([Sample("tokens", 1, at=hour - timedelta(hours=3))])
    roll_up(database, lambda: True)
    signals.write([Sample("tokens", 1, at=hour - timedelta(hours=3))])
    found = signals.read(SignalQuery("tokens", timedelta(hours=12)))[""]
    assert found.total == 2


def test_hours_wait_for_readers_that_are_behind(database: Database) -> None:
    signals, hour = SignalStore(database), now(database)
    signals.write([Sample("tokens", 1, at=hour - timedelta(hours=n)) for n in (3, 2)])
    with database.work() as work:
        work.run(
            text("INSERT INTO signal_watermark (name, at) VALUES ('read:attempts', :at)"),
            {"at": hour - timedelta(hours=2)},
        )
    assert roll_up(database, lambda: True).hours == 1


def test_old_points_are_removed_and_days_forget_pools(database: Database) -> None:
    signals, hour = SignalStore(database), now(database)
    for days in (40, 39):
        signals.write(
            [Sample("tokens", 1, SignalLabels("m", pool), at=hour - timedelta(days=days)) for pool in ("p", "q")]
        )
    while (done := roll_up(database, lambda: True)).hours or done.days or done.removed:
        pass
    assert counts(database) == {DAY: (2, 4)}
    with database.work() as work:
        assert [row.pool for row in work.rows(text("SELECT pool FROM signal_series"))] == [""]
    assert signals.read(SignalQuery("tokens", timedelta(days=60)))[""].total == 4
    with database.work() as work:
        points = store.points(work, SignalQuery("tokens", timedelta(days=60)), DAY)
    assert [point.value.total for point in points] == [2, 2]


@pytest.mark.parametrize("resolution", [MINUTE, HOUR])
def test_points_of_a_chart_are_those_of_their_time(database: Database, resolution: int) -> None:
    signals, hour = SignalStore(database), now(database)
    ats = [hour - timedelta(minutes=resolution * n) for n in (3, 2, 1)]
    signals.write([Sample("tokens", n, SignalLabels(model="m"), at=at) for n, at in enumerate(ats, 1)])
    roll_up(database, lambda: True)
    with database.work() as work:
        points = store.points(work, SignalQuery("tokens", timedelta(hours=5), by="model"), resolution)
    assert [(point.at, point.group, point.value.total) for point in points] == [
        (at, "m", n) for n, at in enumerate(ats, 1)
    ]


def test_roll_ups_and_windows_use_indexes(database: Database) -> None:
    """Their cost grows with what they read, not with what is kept."""
    signals, hour = SignalStore(database), now(database)
    signals.write(
        [
            Sample("tokens", 1, SignalLabels(model=f"m{model}"), at=hour - timedelta(minutes=n))
            for model in range(20)
            for n in range(300)
        ]
    )
    with database.work() as work:
        work.run(text("ANALYZE signal_point"))
        work.run(text("ANALYZE signal_series"))
        plans = [
            work.rows(text(f"EXPLAIN {statement}"))
            for statement in (
                "SELECT min(at) FROM signal_point WHERE resolution = 1 AND at >= now() AND at < now()",
                """SELECT 1 FROM signal_series s JOIN signal_point p ON p.series_id = s.id
                   WHERE s.signal = 'tokens' AND s.model = 'm1' AND resolution = 1 AND at >= now() - interval '5 min'
                """,
            )
        ]
    for plan in plans:
        assert not any("Seq Scan on signal_point" in row[0] for row in plan), plan
