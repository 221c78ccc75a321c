"""
Charts: many signals over the same time, read by one statement.

A chart has a line for each value of a label: what was observed in the whole window, and for the lines with most
observations also its points. What was observed at all is the sum of the lines.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import TextClause, text

from app.governance.signals import store
from app.governance.signals.groups import group_of
from app.governance.signals.names import LABELS, SIGNALS, SignalKind
from app.governance.signals.rows import DAY, HOUR, MINUTE
from app.governance.signals.sample import Aggregate, WindowValue
from app.governance.signals.store import GROUPED, SignalQuery
from app.kernel.database import UnitOfWork

#: Where points of several minutes begin: at multiples since then.
_ORIGIN = "TIMESTAMPTZ '2000-01-01 00:00:00+00'"


@dataclass(frozen=True, slots=True)
class ChartWanted:
    """A signal, with a line for each value of a label; without a label, one line."""

    signal: str
    by: str | None


@dataclass(frozen=True, slots=True)
class ChartLine:
    """What was observed for one value of the label."""

    #: The value of the label; empty without one.
    group: str
    value: WindowValue
    #: By the beginning of each step (seconds since 1970). Empty for lines with few observations.
    points: Sequence[tuple[float, WindowValue]]


def read(
    work: UnitOfWork,
    wanted: Sequence[ChartWanted],
    window: timedelta,
    step: timedelta,
    namespace: str | None,
    most_lines: int,
) -> list[Sequence[ChartLine]]:
    """
    Return the lines of each chart in a window that ends now, those with most observations first.

    So many lines of each chart have points, one for each `step`: some minutes, an hour or a day. With a namespace, only
    its observations count. Raises InvalidInput.
    """
    where = {} if namespace is None else {"namespace": namespace}
    for one in wanted:
        store.require(SignalQuery(one.signal, window, where, one.by))
    listed = [
        {
            "place": place,
            "signal": one.signal,
            "label": one.by,
            "kept": group_of(one.signal, {*where, *([one.by] if one.by else [])}),
            "quantiles": SIGNALS[one.signal].kind is SignalKind.DISTRIBUTION,
        }
        for place, one in enumerate(wanted)
    ]
    given = {"wanted": json.dumps(listed), "window": window, "ended": timedelta(0), "most": most_lines}
    resolution = MINUTE if step < timedelta(hours=1) else HOUR if step < timedelta(days=1) else DAY
    rows = work.rows(_statement(resolution, scoped=namespace is not None), {**given, "step": step, **where})
    found: list[list[ChartLine]] = [[] for _ in wanted]
    for row in rows:
        found[row.place].append(_line(row, window, step))
    return [sorted(lines, key=lambda line: (-line.value.observations, line.group)) for lines in found]


def together(lines: Iterable[ChartLine], window: timedelta) -> WindowValue:
    """Return what was observed in all lines of a chart, without the mean of the latest minute."""
    every = Aggregate()
    for value in (line.value for line in lines):
        every.add(
            Aggregate(value.observations, value.weight, value.total, value.least, value.greatest, {**value.histogram})
        )
    added = (every.observations, every.weight, every.total, every.least, every.greatest)
    return WindowValue(*added, last=None, seconds=window.total_seconds(), histogram=every.histogram)


def _line(row: Any, window: timedelta, step: timedelta) -> ChartLine:
    value = WindowValue(
        row.observations,
        row.weight,
        row.total,
        row.least,
        row.greatest,
        row.last,
        window.total_seconds(),
        store.histogram_of(row.histogram),
    )
    return ChartLine(row.grp, value, [_point(one, step.total_seconds()) for one in row.points or ()])


def _point(stored: Sequence[Any], seconds: float) -> tuple[float, WindowValue]:
    at, observations, weight, total, least, greatest, histogram = stored
    last = total / max(weight, 1)
    value = WindowValue(observations, weight, total, least, greatest, last, seconds, store.histogram_of(histogram))
    return float(at), value


def _statement(resolution: int, *, scoped: bool) -> TextClause:
    group = "CASE label " + " ".join(f"WHEN '{label}' THEN series.{label}" for label in LABELS) + " ELSE '' END"
    columns = f"""
        place, {group} AS grp, point.at, observations, weight, total, least, greatest,
        CASE WHEN quantiles THEN histogram END AS histogram
    """
    scope = " AND series.namespace = :namespace" if scoped else ""
    selects = []
    for minutes, first, until in store.ranges(resolution, has_ended=False):
        grouped = store.reached(GROUPED[minutes])
        times = (
            ("series.kept = wanted.kept", store.GROUPS, first, f"LEAST({until}, {grouped})"),
            ("wanted.kept IS NOT NULL", store.SERIES, f"GREATEST({first}, {grouped})", until),
            ("wanted.kept IS NULL", store.SERIES, first, until),
        )
        selects += [
            f"""
            SELECT {columns} FROM wanted JOIN {source} ON series.signal = wanted.signal AND {condition}{scope}
            WHERE resolution = {minutes} AND point.at >= {begin} AND point.at < {end}
            """
            for condition, source, begin, end in times
        ]
    return text(f"""
        WITH wanted AS MATERIALIZED (
            SELECT * FROM jsonb_to_recordset(CAST(:wanted AS jsonb))
                AS wanted (place int, signal text, label text, kept text, quantiles bool)
        ),
        part AS MATERIALIZED (
            SELECT *, date_bin(CAST(:step AS interval), at, {_ORIGIN}) AS span
            FROM ({" UNION ALL ".join(selects)}) AS part
        ),
        bucketed AS MATERIALIZED (
            SELECT place, grp, span, sum(observations)::bigint AS observations, sum(weight) AS weight,
                   sum(total) AS total, min(least) AS least, max(greatest) AS greatest
            FROM part GROUP BY place, grp, span
        ),
        counted AS MATERIALIZED (
            SELECT place, grp, span, key, sum(value::bigint)::bigint AS n
            FROM part CROSS JOIN jsonb_each_text(histogram) GROUP BY place, grp, span, key
        ),
        line AS MATERIALIZED (
            SELECT *, row_number() OVER (PARTITION BY place ORDER BY observations DESC, grp) AS rank FROM (
                SELECT place, grp, sum(observations)::bigint AS observations, sum(weight) AS weight,
                       sum(total) AS total, min(least) AS least, max(greatest) AS greatest
                FROM bucketed GROUP BY place, grp
            ) AS added
        ),
        latest AS (
            SELECT place, grp, sum(total) / GREATEST(sum(weight), 1) AS last
            FROM part JOIN (SELECT place, grp, max(at) AS at FROM part GROUP BY place, grp) AS newest
                USING (place, grp, at)
            GROUP BY place, grp
        ),
        whole AS (
            SELECT place, grp, json_object_agg(key, n) AS histogram FROM (
                SELECT place, grp, key, sum(n)::bigint AS n FROM counted GROUP BY place, grp, key
            ) AS added GROUP BY place, grp
        ),
        histograms AS (
            SELECT place, grp, span, json_object_agg(key, n) AS histogram FROM counted GROUP BY place, grp, span
        ),
        shown AS (
            SELECT place, grp, json_agg(
                json_build_array(extract(epoch FROM span), bucketed.observations, bucketed.weight, bucketed.total,
                                 bucketed.least, bucketed.greatest, histogram) ORDER BY span
            ) AS points
            FROM bucketed JOIN line USING (place, grp) LEFT JOIN histograms USING (place, grp, span)
            WHERE rank <= :most GROUP BY place, grp
        )
        SELECT line.*, last, histogram, points
        FROM line JOIN latest USING (place, grp) LEFT JOIN whole USING (place, grp) LEFT JOIN shown USING (place, grp)
    """)
