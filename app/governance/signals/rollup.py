"""
Roll-ups: minutes are added up to hours, and hours to days; what is older than its retention is removed.

An hour is rolled up once, when no reader can still write to it, so the cost of a pass grows with the points since the
last one. A day has no points of single pools, which live for hours: they are added to the other points of their labels.
A watermark says how far a roll-up has come; one process at a time rolls up, and a pass that is interrupted goes on
where it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import TextClause, text

from app.governance.signals.rows import DAY, HOUR, MINUTE
from app.governance.signals.store import DAYS_ROLLED, HOURS_ROLLED, KEPT, SERIES_LOCK
from app.kernel.database import Database, UnitOfWork

#: Points that are removed in one transaction.
_BATCH = 10_000
#: For so long after its end, an hour may still be written to.
_GRACE = timedelta(minutes=2)

_BEGIN = text("""
    INSERT INTO signal_watermark (name, at)
    SELECT :name, date_trunc(:unit, COALESCE(min(at), now()), 'UTC') FROM signal_point WHERE resolution = :fine
    ON CONFLICT DO NOTHING
""")
_KNOWN = text("SELECT 1 FROM signal_watermark WHERE name = :name")
_LOCK = text("SELECT at FROM signal_watermark WHERE name = :name FOR UPDATE SKIP LOCKED")
_MOVE = text("UPDATE signal_watermark SET at = :at WHERE name = :name")
# A reader that was never started, or does not run, holds no roll-up for longer than its points are kept.
_UNTIL = text("""
    SELECT GREATEST(
        LEAST(now() - CAST(:grace AS interval), (SELECT min(at) FROM signal_watermark WHERE name LIKE 'read:%'
                                                 AND name NOT IN ('read:cache', 'read:states'))),
        now() - interval '20 hours'
    ) AS at
""")
_REACHED = text("SELECT at FROM signal_watermark WHERE name = :name")
#: From the points of a series to the series of the day: without the pool.
_SERIES_OF_DAYS = text(f"""
    INSERT INTO signal_series (signal, model, pool, host, device, namespace, priority)
    SELECT DISTINCT signal, model, '', host, device, namespace, priority FROM signal_series WHERE pool <> '' AND id IN (
        SELECT series_id FROM signal_point WHERE resolution = {HOUR} AND at >= :begin AND at < :end
    )
    ON CONFLICT DO NOTHING
""")


def _add_up(fine: int, coarse: int, unit: str, series: str, joined: str) -> TextClause:
    """Return the statement that adds up points in `[begin, end)`."""
    return text(f"""
        WITH part AS MATERIALIZED (
            SELECT {series} AS series, date_trunc('{unit}', point.at, 'UTC') AS coarse, observations, weight, total,
                   least, greatest, histogram
            FROM signal_point AS point {joined}
            WHERE resolution = {fine} AND point.at >= :begin AND point.at < :end
        ),
        buckets AS (
            SELECT series, coarse, jsonb_object_agg(key, n) AS histogram FROM (
                SELECT series, coarse, key, sum(value::bigint) AS n
                FROM part CROSS JOIN jsonb_each_text(histogram) GROUP BY series, coarse, key
            ) AS counted GROUP BY series, coarse
        )
        INSERT INTO signal_point
            (series_id, resolution, at, observations, weight, total, least, greatest, histogram)
        SELECT series, {coarse}, coarse, added.observations, added.weight, added.total, added.least, added.greatest,
               buckets.histogram
        FROM (
            SELECT series, coarse, sum(observations) AS observations, sum(weight) AS weight, sum(total) AS total,
                   min(least) AS least, max(greatest) AS greatest
            FROM part GROUP BY series, coarse
        ) AS added LEFT JOIN buckets USING (series, coarse)
        ON CONFLICT (series_id, resolution, at) DO UPDATE SET
            observations = excluded.observations, weight = excluded.weight, total = excluded.total,
            least = excluded.least, greatest = excluded.greatest, histogram = excluded.histogram
    """)


_HOURS = _add_up(MINUTE, HOUR, "hour", "series_id", "")
_DAYS = _add_up(
    HOUR,
    DAY,
    "day",
    "whole.id",
    """
    JOIN signal_series AS series ON series.id = point.series_id
    JOIN signal_series AS whole ON whole.pool = '' AND (whole.signal, whole.model, whole.host, whole.device,
        whole.namespace, whole.priority) = (series.signal, series.model, series.host, series.device,
        series.namespace, series.priority)
    """,
)
_REMOVE = text("""
    DELETE FROM signal_point WHERE ctid = ANY(ARRAY(
        SELECT ctid FROM signal_point
        WHERE resolution = :resolution AND at < now() - CAST(:kept AS interval) AND at < :rolled
        ORDER BY at LIMIT :most
    ))
""")
_REMOVE_SERIES = text("""
    DELETE FROM signal_series WHERE NOT EXISTS (SELECT FROM signal_point WHERE series_id = signal_series.id)
""")
_LOCK_SERIES = text("SELECT pg_advisory_xact_lock(:key)")


@dataclass(frozen=True, slots=True)
class RolledUp:
    """What a pass did: points that were written, and what was removed."""

    hours: int = 0
    days: int = 0
    removed: int = 0
    series_removed: int = 0


def roll_up(database: Database, in_time: Callable[[], bool]) -> RolledUp:
    """Roll up and remove while `in_time()` is true. Raises DatabaseUnreachable."""
    hours = _roll(database, HOURS_ROLLED, MINUTE, timedelta(hours=1), _HOURS, in_time)
    days = _roll(database, DAYS_ROLLED, HOUR, timedelta(days=1), _DAYS, in_time)
    removed = sum(_remove(database, resolution, in_time) for resolution in KEPT)
    series = 0
    if removed:
        with database.work() as work:
            work.run(_LOCK_SERIES, {"key": SERIES_LOCK})
            series = work.run(_REMOVE_SERIES)
    return RolledUp(hours, days, removed, series)


def _roll(
    database: Database, name: str, fine: int, length: timedelta, add_up: TextClause, in_time: Callable[[], bool]
) -> int:
    """Add up one hour or day after the other. Returns how many points were written."""
    written = 0
    while in_time():
        with database.work() as work:
            if work.row(_KNOWN, {"name": name}) is None:
                work.run(_BEGIN, {"name": name, "unit": "hour" if fine == MINUTE else "day", "fine": fine})
            row = work.row(_LOCK, {"name": name})
            if row is None:
                return written
            begin, end = row.at, row.at + length
            until = _until(work, fine)
            if until is None or end > until:
                return written
            # Without anything to add up, the watermark goes on at once.
            found = work.rows(_NEXT, {"resolution": fine, "begin": begin, "until": until})[0]
            if found.at is None:
                steps = (until - begin) // length
                work.run(_MOVE, {"name": name, "at": begin + steps * length})
                return written
            begin += (found.at - begin) // length * length
            end = begin + length
            if end <= until:
                span = {"begin": begin, "end": end}
                if fine == HOUR:
                    work.run(_SERIES_OF_DAYS, span)
                written += work.run(add_up, span)
                work.run(_MOVE, {"name": name, "at": end})
            else:
                work.run(_MOVE, {"name": name, "at": begin})
                return written
    return written


_NEXT = text("""
    SELECT min(at) AS at FROM signal_point WHERE resolution = :resolution AND at >= :begin AND at < :until
""")


def _until(work: UnitOfWork, fine: int) -> datetime | None:
    """The instant before which nothing is written any more."""
    if fine == MINUTE:
        at: datetime = work.rows(_UNTIL, {"grace": _GRACE})[0].at
        return at
    row = work.row(_REACHED, {"name": HOURS_ROLLED})
    return None if row is None else row.at


def _remove(database: Database, resolution: int, in_time: Callable[[], bool]) -> int:
    """Remove points whose retention is over, and which are rolled up. Returns how many."""
    removed = 0
    while in_time():
        with database.work() as work:
            reached = {MINUTE: HOURS_ROLLED, HOUR: DAYS_ROLLED}.get(resolution)
            row = None if reached is None else work.row(_REACHED, {"name": reached})
            if reached is not None and row is None:
                return removed
            now: datetime = work.rows(text("SELECT now() AS now"))[0].now
            values = {"resolution": resolution, "kept": KEPT[resolution], "most": _BATCH}
            found = work.run(_REMOVE, {**values, "rolled": now if row is None else row.at})
        removed += found
        if found < _BATCH:
            break
    return removed
