"""
The storage of signals: samples are written to the minute in which they were observed, and read over a window.

The number of series is bounded. Beyond it the samples of new series are added to the series of their signal without
labels, so that the totals stay right. The clock is that of the database.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import TextClause, text

from app.governance.signals.groups import group_of
from app.governance.signals.names import LABELS, SIGNALS, SignalKind
from app.governance.signals.rows import DAY, HOUR, MINUTE
from app.governance.signals.sample import MAX_LABEL, Aggregate, Sample, SignalLabels, WindowValue
from app.kernel import log
from app.kernel.database import Database, UnitOfWork
from app.kernel.errors import InvalidInput, Problem

_log = log.get(__name__)

#: Most series of all signals together.
MAX_SERIES = 20_000
#: The longest window that is read, and the longest that is read in minutes and in hours.
MAX_WINDOW = timedelta(days=730)
_IN_MINUTES, _IN_HOURS = timedelta(hours=3), timedelta(days=7)
#: Most points that are read for a chart or the history of a rule.
MAX_POINTS = 100_000
#: How long points of each resolution are kept.
KEPT: Mapping[int, timedelta] = {MINUTE: timedelta(days=1), HOUR: timedelta(days=31), DAY: timedelta(days=730)}

#: The names of the watermarks of roll-ups: all minutes, and all hours, before them are rolled up.
HOURS_ROLLED, DAYS_ROLLED = "rolled_up:hours", "rolled_up:days"
#: Nothing is written to minutes before this watermark.
CLOSED = "rolled_up:closed"
#: By resolution, the watermarks of groups: all points before them are added up to those of groups.
GROUPED: Mapping[int, str] = {MINUTE: "grouped:minutes", HOUR: "grouped:hours", DAY: "grouped:days"}

#: Advisory lock: shared while points are added, alone while minutes are closed or series without points removed.
SERIES_LOCK = 7_205_759_410

#: What is read: the points of series, and those of groups.
SERIES = "signal_series AS series JOIN signal_point AS point ON point.series_id = series.id"
GROUPS = "signal_group AS series JOIN signal_group_point AS point ON point.group_id = series.id"
_LABELS = ", ".join(LABELS)
_KEY = f"signal, {_LABELS}"
_GIVEN = ", ".join(f"{name} text" for name in ("signal", *LABELS))
# In this order: the watermark does not move while the lock is held.
_LOCK = text(f"SELECT pg_advisory_xact_lock_shared({SERIES_LOCK})::text")
_BEGIN = text(f"""
    SELECT now() AS now,
           (SELECT max(at) FROM signal_watermark WHERE name IN ('{CLOSED}', '{HOURS_ROLLED}')) AS closed
""")
_ENSURE = text(f"""
    INSERT INTO signal_series ({_KEY})
    SELECT {_KEY} FROM jsonb_to_recordset(CAST(:given AS jsonb)) AS given ({_GIVEN})
    WHERE (SELECT count(*) FROM signal_series) < :most OR ({_LABELS}) = ({", ".join(["''"] * len(LABELS))})
    ON CONFLICT DO NOTHING
""")
_FIND = text(f"""
    SELECT id, {_KEY} FROM signal_series
    JOIN jsonb_to_recordset(CAST(:given AS jsonb)) AS given ({_GIVEN}) USING ({_KEY})
""")
_MERGED = """
    CASE WHEN excluded.histogram IS NULL THEN point.histogram
         WHEN point.histogram IS NULL THEN excluded.histogram
         ELSE (SELECT jsonb_object_agg(key, n) FROM (
             SELECT key, sum(value::bigint) AS n FROM (
                 SELECT * FROM jsonb_each_text(point.histogram)
                 UNION ALL SELECT * FROM jsonb_each_text(excluded.histogram)
             ) AS parts GROUP BY key) AS merged) END
"""
_ADD = text(f"""
    INSERT INTO signal_point AS point
        (series_id, resolution, at, observations, weight, total, least, greatest, histogram)
    SELECT series_id, {MINUTE}, at, observations, weight, total, least, greatest, histogram
    FROM jsonb_to_recordset(CAST(:given AS jsonb)) AS given (series_id int, at timestamptz, observations bigint,
        weight float, total float, least float, greatest float, histogram jsonb)
    ORDER BY series_id, at
    ON CONFLICT (series_id, resolution, at) DO UPDATE SET
        observations = point.observations + excluded.observations, weight = point.weight + excluded.weight,
        total = point.total + excluded.total, least = LEAST(point.least, excluded.least),
        greatest = GREATEST(point.greatest, excluded.greatest), histogram = {_MERGED}
""")


@dataclass(frozen=True, slots=True)
class SignalQuery:
    """Which observations of a signal are read."""

    signal: str
    window: timedelta
    #: Only observations with these labels.
    where: Mapping[str, str] = field(default_factory=dict)
    #: One result for each value of this label; None: one for all.
    by: str | None = None
    #: How long ago the window ended.
    ended: timedelta = timedelta(0)
    #: Whether quantiles are wanted, and the mean of the latest minute; both cost time.
    quantiles: bool = True
    latest: bool = True


@dataclass(frozen=True, slots=True)
class SeriesPoint:
    """A point of a chart: all that matches, in a minute, an hour or a day."""

    at: datetime
    #: The value of the label by which is grouped; empty without one.
    group: str
    value: WindowValue


@dataclass(frozen=True, slots=True)
class SignalStore:
    """Writes and reads signals."""

    database: Database

    def write(self, samples: Sequence[Sample]) -> None:
        """Write samples in one transaction. Raises InvalidInput, DatabaseUnreachable."""
        if samples:
            with self.database.work() as work:
                write(work, samples)

    def read(self, wanted: SignalQuery) -> dict[str, WindowValue]:
        """
        Return the value of a window that ends now, by the value of the label `by`; under '' without one.

        Raises InvalidInput, DatabaseUnreachable.
        """
        with self.database.work() as work:
            return read(work, wanted)


def write(work: UnitOfWork, samples: Iterable[Sample]) -> None:
    """Write samples in a transaction of the caller. Raises InvalidInput for an unknown signal or label."""
    work.run(_LOCK)
    begin = work.rows(_BEGIN)[0]
    found: dict[tuple[str, SignalLabels], dict[datetime, Aggregate]] = {}
    for sample in samples:
        labels = _bounded(sample)
        at = sample.at or begin.now
        # What is closed is not changed: a late sample counts as one of the first minute that is not.
        minute = max(at, begin.closed or at).replace(second=0, microsecond=0)
        found.setdefault((sample.signal, labels), {}).setdefault(minute, Aggregate()).observe(sample)
    if not found:
        return
    ids = _series(work, found)
    points: dict[tuple[int, datetime], Aggregate] = {}
    for (signal, labels), minutes in found.items():
        series_id = ids.get((signal, labels)) or ids[signal, SignalLabels()]
        for minute, aggregate in minutes.items():
            points.setdefault((series_id, minute), Aggregate()).add(aggregate)
    given = [
        {
            **asdict(aggregate),
            "series_id": series_id,
            "at": minute.isoformat(),
            "histogram": aggregate.histogram or None,
        }
        for (series_id, minute), aggregate in points.items()
        if aggregate.observations
    ]
    work.run(_ADD, {"given": json.dumps(given)})


def _bounded(sample: Sample) -> SignalLabels:
    """Return the labels, as they can be stored. Raises InvalidInput."""
    definition = SIGNALS.get(sample.signal)
    if definition is None:
        raise InvalidInput([Problem("signal", f"there is no signal {sample.signal!r}", ", ".join(SIGNALS))], "sample")
    given = sample.labels.given()
    if wrong := given.keys() - set(definition.labels):
        message = f"the signal {sample.signal!r} has no label {sorted(wrong)[0]!r}"
        raise InvalidInput([Problem("labels", message, ", ".join(definition.labels))], "sample")
    if all(len(value) <= MAX_LABEL and "\x00" not in value for value in given.values()):
        return sample.labels
    return SignalLabels(**{name: value.replace("\x00", "\ufffd")[:MAX_LABEL] for name, value in given.items()})


def _series(work: UnitOfWork, wanted: Iterable[tuple[str, SignalLabels]]) -> dict[tuple[str, SignalLabels], int]:
    """Return the ids of series, which are created if there are not too many; and those of signals without labels."""
    every = {*wanted, *((signal, SignalLabels()) for signal, _ in wanted)}
    listed = sorted(({"signal": signal, **asdict(labels)} for signal, labels in every), key=lambda one: [*one.values()])
    given = {"given": json.dumps(listed)}

    def known() -> dict[tuple[str, SignalLabels], int]:
        rows = work.rows(_FIND, given)
        return {(row.signal, SignalLabels(**{name: getattr(row, name) for name in LABELS})): row.id for row in rows}

    found = known()
    if len(found) == len(every):
        return found
    work.run(_ENSURE, {**given, "most": MAX_SERIES})
    found = known()
    if len(found) < len(every):
        _log.warning("signal_series_limit_reached", limit=MAX_SERIES, left_out=len(every) - len(found))
    return found


def read(work: UnitOfWork, wanted: SignalQuery) -> dict[str, WindowValue]:
    """As `SignalStore.read`, in a transaction of the caller."""
    require(wanted)
    resolution = MINUTE if wanted.window <= _IN_MINUTES else HOUR if wanted.window <= _IN_HOURS else DAY
    parts, given = _parts(wanted, resolution)
    rows = work.rows(_window(wanted, parts), given)
    seconds = wanted.window.total_seconds()
    return {
        row.grp: WindowValue(
            row.observations,
            row.weight,
            row.total,
            row.least,
            row.greatest,
            row.last,
            seconds,
            histogram_of(row.histogram),
        )
        for row in rows
    }


def points(work: UnitOfWork, wanted: SignalQuery, resolution: int) -> list[SeriesPoint]:
    """
    Return the points of a window by minute, hour or day, the oldest first.

    Minutes are kept for a day, hours for a month. Raises InvalidInput.
    """
    require(wanted)
    parts, given = _parts(wanted, resolution)
    unit = {MINUTE: "minute", HOUR: "hour", DAY: "day"}[resolution]
    rows = work.rows(_chart(parts, unit), given)
    return [
        SeriesPoint(
            row.bucket,
            row.grp,
            WindowValue(
                row.observations,
                row.weight,
                row.total,
                row.least,
                row.greatest,
                row.total / max(row.weight, 1),
                resolution * 60.0,
                histogram_of(row.histogram),
            ),
        )
        for row in rows
    ]


def _chart(parts: str, unit: str) -> TextClause:
    return text(f"""
        WITH part AS MATERIALIZED (
            SELECT part.*, date_trunc('{unit}', at, 'UTC') AS bucket FROM ({parts}) AS part
        ),
        histograms AS (
            SELECT grp, bucket, jsonb_object_agg(key, n) AS histogram FROM (
                SELECT grp, bucket, key, sum(value::bigint) AS n FROM part CROSS JOIN jsonb_each_text(histogram)
                GROUP BY grp, bucket, key
            ) AS counted GROUP BY grp, bucket
        )
        SELECT added.*, histograms.histogram FROM (
            SELECT grp, bucket, sum(observations)::bigint AS observations, sum(weight) AS weight, sum(total) AS total,
                   min(least) AS least, max(greatest) AS greatest
            FROM part GROUP BY grp, bucket
        ) AS added LEFT JOIN histograms USING (grp, bucket) ORDER BY bucket, grp LIMIT {MAX_POINTS}
    """)


def _window(wanted: SignalQuery, parts: str) -> TextClause:
    has_quantiles = wanted.quantiles and SIGNALS[wanted.signal].kind is SignalKind.DISTRIBUTION
    histograms = """,
        histograms AS (
            SELECT grp, jsonb_object_agg(key, n) AS histogram FROM (
                SELECT grp, key, sum(value::bigint) AS n FROM part CROSS JOIN jsonb_each_text(histogram)
                GROUP BY grp, key
            ) AS counted GROUP BY grp
        )"""
    latest = """,
        latest AS (
            SELECT grp, sum(total) / GREATEST(sum(weight), 1) AS last
            FROM part JOIN (SELECT grp, max(at) AS at FROM part GROUP BY grp) AS newest USING (grp, at) GROUP BY grp
        )"""
    return text(f"""
        WITH part AS MATERIALIZED ({parts}){histograms if has_quantiles else ""}{latest if wanted.latest else ""}
        SELECT added.*, {"histograms.histogram" if has_quantiles else "NULL::jsonb AS histogram"},
               {"latest.last" if wanted.latest else "NULL::float AS last"}
        FROM (
            SELECT grp, sum(observations)::bigint AS observations, sum(weight) AS weight, sum(total) AS total,
                   min(least) AS least, max(greatest) AS greatest
            FROM part GROUP BY grp
        ) AS added {"LEFT JOIN histograms USING (grp)" if has_quantiles else ""}
        {"LEFT JOIN latest USING (grp)" if wanted.latest else ""}
    """)


def _parts(wanted: SignalQuery, resolution: int) -> tuple[str, dict[str, Any]]:
    """
    Return the query of all points of a window, and its parameters.

    A long window is read from days and hours, and what is not rolled up yet from minutes.
    """
    group = f"series.{wanted.by}" if wanted.by else "''"
    labels = "".join(f" AND series.{name} = :label_{name}" for name in wanted.where)
    given: dict[str, Any] = {"signal": wanted.signal, "window": wanted.window, "ended": wanted.ended}
    given |= {f"label_{name}": value for name, value in wanted.where.items()}
    kept = group_of(wanted.signal, {*wanted.where, *([wanted.by] if wanted.by else [])})
    if kept is not None:
        given["kept"] = kept
    selects = [
        f"""
        SELECT {group} AS grp, point.at, observations, weight, total, least, greatest, histogram
        FROM {GROUPS if is_grouped else SERIES}
        WHERE series.signal = :signal{labels}{" AND kept = :kept" if is_grouped else ""}
          AND resolution = {minutes} AND point.at >= {first} AND point.at < {until}
        """
        for minutes, begin, end in ranges(resolution, has_ended=bool(wanted.ended))
        for is_grouped, first, until in _sources(minutes, begin, end, has_groups=kept is not None)
    ]
    return " UNION ALL ".join(selects), given


def ranges(resolution: int, *, has_ended: bool) -> list[tuple[int, str, str]]:
    """
    Return the ranges of a window: the resolution of points, and SQL for from when and until when they are read.

    Their parameters are `window` and `ended`.
    """
    end = "now() - CAST(:ended AS interval)"

    def begin(unit: str) -> str:
        return f"date_trunc('{unit}', {end} - CAST(:window AS interval), 'UTC')"

    def rolled(name: str, unit: str) -> str:
        return f"LEAST({reached(name)}, date_trunc('{unit}', {end}, 'UTC'))"

    last = f"date_trunc('minute', {end})" if has_ended else "'infinity'"
    hours, days = rolled(HOURS_ROLLED, "hour"), rolled(DAYS_ROLLED, "day")
    if resolution == MINUTE:
        return [(MINUTE, begin("minute"), last)]
    if resolution == HOUR:
        return [(HOUR, begin("hour"), hours), (MINUTE, f"GREATEST({begin('hour')}, {hours})", last)]
    return [
        (DAY, begin("day"), days),
        (HOUR, f"GREATEST({begin('day')}, {days})", hours),
        (MINUTE, f"GREATEST({begin('day')}, {hours})", last),
    ]


def reached(name: str) -> str:
    """Return SQL for where a watermark is."""
    return f"COALESCE((SELECT at FROM signal_watermark WHERE name = '{name}'), '-infinity')"


def _sources(minutes: int, first: str, until: str, *, has_groups: bool) -> list[tuple[bool, str, str]]:
    """Return from when to when a range of points is read from groups, and from series."""
    if not has_groups:
        return [(False, first, until)]
    grouped = reached(GROUPED[minutes])
    return [(True, first, f"LEAST({until}, {grouped})"), (False, f"GREATEST({first}, {grouped})", until)]


def require(wanted: SignalQuery) -> None:
    """Raise InvalidInput unless the query can be answered."""
    definition = SIGNALS.get(wanted.signal)
    if definition is None:
        raise InvalidInput([Problem("signal", f"there is no signal {wanted.signal!r}", ", ".join(SIGNALS))], "query")
    names = {*wanted.where, *([wanted.by] if wanted.by else [])}
    if wrong := names - set(definition.labels):
        message = f"the signal {wanted.signal!r} has no label {sorted(wrong)[0]!r}"
        raise InvalidInput([Problem("labels", message, ", ".join(definition.labels))], "query")
    if not timedelta(minutes=1) <= wanted.window <= MAX_WINDOW:
        raise InvalidInput([Problem("window", f"{wanted.window} is out of range", "from 1m to 730d")], "query")


def histogram_of(stored: Mapping[str, Any] | None) -> dict[int, int]:
    return {int(bucket): int(count) for bucket, count in (stored or {}).items()}
