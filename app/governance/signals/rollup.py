"""
Roll-ups: minutes are added up to hours, and hours to days; those of series are added up to those of their groups.
What is older than its retention is removed.

Minutes are closed first, two of them after their end: nothing is written to them from then on. Each is rolled up once,
so the cost of a pass grows with the points since the last one. A day has no points of single pools, which live for
hours: they are added to the other points of their labels. A watermark says how far a roll-up has come; one process at a
time rolls up, and a pass that is interrupted goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import TextClause, text

from app.governance.signals.groups import KEPT_LABELS
from app.governance.signals.names import LABELS
from app.governance.signals.rows import DAY, HOUR, MINUTE
from app.governance.signals.store import CLOSED, DAYS_ROLLED, GROUPED, HOURS_ROLLED, KEPT, SERIES_LOCK
from app.kernel.database import Database, UnitOfWork

#: Points that are removed in one transaction.
_BATCH = 10_000
#: For so long after its end, a minute may still be written to.
_GRACE = timedelta(minutes=2)

_BEGIN = text("""
    INSERT INTO signal_watermark (name, at)
    SELECT :name, date_trunc(:unit, COALESCE(min(at), now()), 'UTC') FROM signal_point WHERE resolution = :fine
    ON CONFLICT DO NOTHING
""")
_KNOWN = text("SELECT 1 FROM signal_watermark WHERE name = :name")
_LOCK = text("SELECT at FROM signal_watermark WHERE name = :name FOR UPDATE SKIP LOCKED")
_MOVE = text("UPDATE signal_watermark SET at = :at WHERE name = :name")
_CLOSE = text("""
    INSERT INTO signal_watermark AS closed (name, at) VALUES (:name, :at)
    ON CONFLICT (name) DO UPDATE SET at = GREATEST(closed.at, excluded.at)
""")
# A reader that was never started, or does not run, holds no roll-up for longer than its points are kept.
_UNTIL = text("""
    SELECT date_trunc('minute', GREATEST(
        LEAST(now() - CAST(:grace AS interval), (SELECT min(at) FROM signal_watermark WHERE name LIKE 'read:%'
                                                 AND name NOT IN ('read:cache', 'read:states'))),
        now() - interval '20 hours'
    )) AS at
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
_JOINED_LABELS = ", ".join(LABELS)
_IS_KEPT = ", ".join(f"keeps_{label}" for label in LABELS)
_SETS = ", ".join(
    f"('{signal}', '{kept}', {', '.join(str(label in kept.split(',')) for label in LABELS)})"
    for signal, sets in KEPT_LABELS.items()
    for kept in sets
)


def _members(resolution: int) -> str:
    """Return the expression for the series that have points in `[begin, end)`, once for each group that has them."""
    labels = ", ".join(f"CASE WHEN keeps_{label} THEN series.{label} ELSE '' END AS {label}" for label in LABELS)
    return f"""
        member AS MATERIALIZED (
            SELECT series.id AS series_id, signal, kept, {labels}
            FROM signal_series AS series JOIN (VALUES {_SETS}) AS sets (signal, kept, {_IS_KEPT}) USING (signal)
            WHERE series.id IN (
                SELECT series_id FROM signal_point WHERE resolution = {resolution} AND at >= :begin AND at < :end
            )
        )
    """


def _new_groups(resolution: int) -> TextClause:
    """Return the statement that creates the groups of points in `[begin, end)`."""
    # Without a look first, each row that is there already would use up an id.
    return text(f"""
        WITH {_members(resolution)}
        INSERT INTO signal_group (signal, kept, {_JOINED_LABELS})
        SELECT DISTINCT signal, kept, {_JOINED_LABELS} FROM member
        WHERE (signal, kept, {_JOINED_LABELS}) NOT IN (SELECT signal, kept, {_JOINED_LABELS} FROM signal_group)
        ORDER BY signal, kept, {_JOINED_LABELS}
        ON CONFLICT DO NOTHING
    """)


def _add_up_groups(resolution: int) -> TextClause:
    """Return the statement that adds up the points of groups in `[begin, end)`."""
    # The groups of a signal that keep the same labels are read together: by their ids they share pages.
    return text(f"""
        WITH {_members(resolution)},
        placed AS MATERIALIZED (
            SELECT series_id, signal_group.id AS group_id
            FROM member JOIN signal_group USING (signal, kept, {_JOINED_LABELS})
        ),
        part AS MATERIALIZED (
            SELECT * FROM signal_point WHERE resolution = {resolution} AND at >= :begin AND at < :end
        ),
        bucket AS MATERIALIZED (
            SELECT series_id, at, key, value::bigint AS n FROM part CROSS JOIN jsonb_each_text(histogram)
        ),
        buckets AS (
            SELECT group_id, at, jsonb_object_agg(key, n) AS histogram FROM (
                SELECT group_id, at, key, sum(n) AS n
                FROM bucket JOIN placed USING (series_id) GROUP BY group_id, at, key
            ) AS counted GROUP BY group_id, at
        )
        INSERT INTO signal_group_point
            (group_id, resolution, at, observations, weight, total, least, greatest, histogram)
        SELECT group_id, {resolution}, at, added.observations, added.weight, added.total, added.least, added.greatest,
               buckets.histogram
        FROM (
            SELECT group_id, at, sum(observations) AS observations, sum(weight) AS weight, sum(total) AS total,
                   min(least) AS least, max(greatest) AS greatest
            FROM part JOIN placed USING (series_id) GROUP BY group_id, at
        ) AS added LEFT JOIN buckets USING (group_id, at)
        ORDER BY at, group_id
        ON CONFLICT (group_id, resolution, at) DO UPDATE SET
            observations = excluded.observations, weight = excluded.weight, total = excluded.total,
            least = excluded.least, greatest = excluded.greatest, histogram = excluded.histogram
    """)


def _remove_points(table: str) -> TextClause:
    return text(f"""
        DELETE FROM {table} WHERE ctid = ANY(ARRAY(
            SELECT ctid FROM {table}
            WHERE resolution = :resolution AND at < now() - CAST(:kept AS interval) AND at < :rolled
            ORDER BY at LIMIT :most
        ))
    """)


_REMOVE = tuple(map(_remove_points, ("signal_point", "signal_group_point")))
_REMOVE_SERIES = text("""
    DELETE FROM signal_series WHERE NOT EXISTS (SELECT FROM signal_point WHERE series_id = signal_series.id)
""")
_REMOVE_GROUPS = text("""
    DELETE FROM signal_group WHERE NOT EXISTS (SELECT FROM signal_group_point WHERE group_id = signal_group.id)
""")
_LOCK_SERIES = text("SELECT pg_advisory_xact_lock(:key)")
# How many series a group has is estimated far too low: nested loops would compare each point with each group.
_PREPARE = text(f"""
    SELECT pg_advisory_xact_lock_shared({SERIES_LOCK})::text AS shared,
           set_config('enable_nestloop', 'off', true) AS loops, set_config('work_mem', '32MB', true) AS memory
""")


@dataclass(frozen=True, slots=True)
class _RollUp:
    """Something that is added up, one span of time after the other."""

    #: The watermark that says how far it has come, and the one that it does not pass.
    watermark: str
    until: str
    #: The resolution of the points that are read.
    fine: int
    #: The watermark moves by whole ones.
    length: timedelta
    unit: str
    #: What is done to a span; the last one writes the points.
    statements: Sequence[TextClause]
    #: Most lengths of a span.
    most: int = 1


def _of_groups(resolution: int, until: str, length: timedelta, unit: str) -> _RollUp:
    statements = (_PREPARE, _new_groups(resolution), _add_up_groups(resolution))
    return _RollUp(GROUPED[resolution], until, resolution, length, unit, statements, most=12)


_MINUTE, _HOUR, _DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
_TO_HOURS = _RollUp(HOURS_ROLLED, CLOSED, MINUTE, _HOUR, "hour", (_HOURS,))
_TO_DAYS = _RollUp(DAYS_ROLLED, HOURS_ROLLED, HOUR, _DAY, "day", (_SERIES_OF_DAYS, _DAYS))
_TO_GROUPS = (
    _of_groups(MINUTE, CLOSED, _MINUTE, "minute"),
    _of_groups(HOUR, HOURS_ROLLED, _HOUR, "hour"),
    _of_groups(DAY, DAYS_ROLLED, _DAY, "day"),
)


@dataclass(frozen=True, slots=True)
class RolledUp:
    """What a pass did: points that were written, of series and of groups, and what was removed."""

    hours: int = 0
    days: int = 0
    groups: int = 0
    removed: int = 0
    series_removed: int = 0


def roll_up(database: Database, in_time: Callable[[], bool]) -> RolledUp:
    """Roll up and remove while `in_time()` is true. Raises DatabaseUnreachable."""
    _close(database)
    hours = _roll(database, _TO_HOURS, in_time)
    days = _roll(database, _TO_DAYS, in_time)
    groups = sum(_roll(database, one, in_time) for one in _TO_GROUPS)
    removed = sum(_remove(database, resolution, in_time) for resolution in KEPT)
    series = 0
    if removed:
        with database.work() as work:
            work.run(_LOCK_SERIES, {"key": SERIES_LOCK})
            series = work.run(_REMOVE_SERIES)
            work.run(_REMOVE_GROUPS)
    return RolledUp(hours, days, groups, removed, series)


def _close(database: Database) -> None:
    """Let nothing be written to minutes that are over and that all readers have read."""
    with database.work() as work:
        # Whoever still writes is waited for; whoever writes later finds the watermark.
        work.run(_LOCK_SERIES, {"key": SERIES_LOCK})
        work.run(_CLOSE, {"name": CLOSED, "at": work.rows(_UNTIL, {"grace": _GRACE})[0].at})


def _roll(database: Database, wanted: _RollUp, in_time: Callable[[], bool]) -> int:
    """Add up one span after the other. Returns how many points were written."""
    name, written = wanted.watermark, 0
    while in_time():
        with database.work() as work:
            if work.row(_KNOWN, {"name": name}) is None:
                work.run(_BEGIN, {"name": name, "unit": wanted.unit, "fine": wanted.fine})
            row = work.row(_LOCK, {"name": name})
            reached = work.row(_REACHED, {"name": wanted.until})
            if row is None or reached is None:
                return written
            begin, until = row.at, reached.at
            if begin + wanted.length > until:
                return written
            # Without anything to add up, the watermark goes on at once.
            found = work.rows(_NEXT, {"resolution": wanted.fine, "begin": begin, "until": until})[0]
            if found.at is None:
                steps = (until - begin) // wanted.length
                work.run(_MOVE, {"name": name, "at": begin + steps * wanted.length})
                return written
            begin += (found.at - begin) // wanted.length * wanted.length
            end = begin + wanted.length * min(wanted.most, (until - begin) // wanted.length)
            if end <= begin:
                work.run(_MOVE, {"name": name, "at": begin})
                return written
            written += _add_span(work, wanted, begin, end)
            work.run(_MOVE, {"name": name, "at": end})
    return written


def _add_span(work: UnitOfWork, wanted: _RollUp, begin: datetime, end: datetime) -> int:
    count = 0
    for statement in wanted.statements:
        count = work.run(statement, {} if statement is _PREPARE else {"begin": begin, "end": end})
    return count


_NEXT = text("""
    SELECT min(at) AS at FROM signal_point WHERE resolution = :resolution AND at >= :begin AND at < :until
""")


def _remove(database: Database, resolution: int, in_time: Callable[[], bool]) -> int:
    """Remove points whose retention is over, and which are rolled up. Returns how many."""
    removed = 0
    for statement in _REMOVE:
        while in_time():
            with database.work() as work:
                reached = {MINUTE: HOURS_ROLLED, HOUR: DAYS_ROLLED}.get(resolution)
                row = None if reached is None else work.row(_REACHED, {"name": reached})
                if reached is not None and row is None:
                    return removed
                now: datetime = work.rows(text("SELECT now() AS now"))[0].now
                values = {"resolution": resolution, "kept": KEPT[resolution], "most": _BATCH}
                found = work.run(statement, {**values, "rolled": now if row is None else row.at})
            removed += found
            if found < _BATCH:
                break
    return removed
