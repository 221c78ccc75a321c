"""
Stored sums of costs: added up from attempts once they have ended, read over a window.

Attempts are added to quarters of an hour by a scheduled job, from a watermark on, each once. A read adds what has ended
since: it is exact at any moment, and grows with the intervals of its window and not with the attempts that are kept.
Attempts whose runs were removed stay in the sums for `KEPT_FOR`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import text

from app.governance.costs.spending import CostGroup, Spending
from app.governance.signals.horizon import horizon
from app.kernel.database import Database, UnitOfWork

#: The length of an interval, and for how long intervals are kept.
SPAN, KEPT_FOR = timedelta(minutes=15), timedelta(days=800)
#: The longest time whose attempts are added up in one transaction.
_STRETCH = timedelta(hours=1)
#: Most intervals that one transaction removes.
_BATCH = 5_000
#: Most lines of an answer.
MOST_LINES = 1_000
#: The name of the watermark.
WATERMARK = "read:costs"

_COUNTS = ("attempts", "unpriced", "untold", "tokens_in", "tokens_cached", "tokens_out", "device_us", "cost")
_SUMS = """
    count(*) AS attempts, count(*) FILTER (WHERE attempt.cost IS NULL) AS unpriced,
    count(*) FILTER (WHERE COALESCE(attempt.tokens_in, 0) + COALESCE(attempt.tokens_out, 0) = 0) AS untold,
    COALESCE(sum(attempt.tokens_in), 0) AS tokens_in, COALESCE(sum(tokens_cached), 0) AS tokens_cached,
    COALESCE(sum(attempt.tokens_out), 0) AS tokens_out,
    COALESCE(sum(CAST(cost_basis ->> 'device_us' AS bigint)), 0) AS device_us,
    COALESCE(sum(attempt.cost), 0) AS cost
"""
_OF_ATTEMPTS = """
    FROM attempt JOIN step ON step.id = attempt.step_id JOIN run ON run.id = step.run_id
    WHERE attempt.model IS NOT NULL AND attempt.outcome <> 'left'
"""
_AT = f"date_bin(interval '{SPAN.total_seconds():.0f} seconds', attempt.finished_at, TIMESTAMPTZ 'epoch')"
_KEY = "at, namespace, workflow, model"
_BEGIN = text("INSERT INTO signal_watermark (name) VALUES (:name) ON CONFLICT DO NOTHING")
_LOCK = text("SELECT at FROM signal_watermark WHERE name = :name FOR UPDATE SKIP LOCKED")
_MOVE = text("UPDATE signal_watermark SET at = :at WHERE name = :name")
_ADD = text(f"""
    INSERT INTO cost_interval ({_KEY}, {", ".join(_COUNTS)})
    SELECT {_AT}, run.namespace, run.workflow, attempt.model, {_SUMS} {_OF_ATTEMPTS}
      AND attempt.finished_at > :begin AND attempt.finished_at <= :end
    GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4
    ON CONFLICT ({_KEY}) DO UPDATE SET {", ".join(f"{one} = cost_interval.{one} + excluded.{one}" for one in _COUNTS)}
""")
_EXPIRE = text("""
    DELETE FROM cost_interval WHERE ctid IN (
        SELECT ctid FROM cost_interval WHERE at < :before ORDER BY at LIMIT :batch
    )
""")
#: What was added up, and what was not yet.
SOURCE = f"""
    SELECT {_KEY}, {", ".join(_COUNTS)} FROM cost_interval
    WHERE at >= :since AND at < :until AND (CAST(:namespace AS text) IS NULL OR namespace = :namespace)
    UNION ALL
    SELECT {_AT}, run.namespace, run.workflow, attempt.model, {_SUMS} {_OF_ATTEMPTS}
      AND attempt.finished_at > GREATEST(:since, (SELECT at FROM signal_watermark WHERE name = '{WATERMARK}'))
      AND attempt.finished_at < :until AND EXISTS (SELECT FROM signal_watermark WHERE name = '{WATERMARK}')
      AND (CAST(:namespace AS text) IS NULL OR run.namespace = :namespace)
    GROUP BY 1, 2, 3, 4
"""
_LINES = """
    SELECT {key} AS key, GROUPING({key}) AS is_total, {sums}
    FROM ({source}) AS source
    WHERE (CAST(:workflow AS text) IS NULL OR workflow = :workflow)
      AND (CAST(:model AS text) IS NULL OR model = :model)
    GROUP BY GROUPING SETS (({key}), ()) ORDER BY is_total DESC, {order} LIMIT :limit
"""
_DAY = "to_char(at AT TIME ZONE CAST(:zone AS text), 'YYYY-MM-DD')"
_ADDED = ", ".join(f"COALESCE(sum({one}), 0) AS {one}" for one in _COUNTS)
_BY = {
    name: text(
        _LINES.format(key=key, sums=_ADDED, source=SOURCE, order="key DESC" if name == "day" else "cost DESC, key")
    )
    for name, key in (("model", "model"), ("namespace", "namespace"), ("workflow", "workflow"), ("day", _DAY))
}
#: A label is of a run, so that these sums are of the runs that are kept.
_BY_LABEL = text(f"""
    SELECT key, is_total, {", ".join(_COUNTS)} FROM (
        SELECT COALESCE(run.labels ->> :label, '') AS key, GROUPING(COALESCE(run.labels ->> :label, '')) AS is_total,
               {_SUMS} {_OF_ATTEMPTS}
          AND attempt.finished_at >= :since AND attempt.finished_at < :until
          AND (CAST(:namespace AS text) IS NULL OR run.namespace = :namespace)
          AND (CAST(:workflow AS text) IS NULL OR run.workflow = :workflow)
          AND (CAST(:model AS text) IS NULL OR attempt.model = :model)
        GROUP BY GROUPING SETS ((COALESCE(run.labels ->> :label, '')), ())
    ) AS sums ORDER BY is_total DESC, cost DESC, key LIMIT :limit
""")


class CostWindow(NamedTuple):
    """Which attempts are added up; None means all."""

    since: datetime
    until: datetime
    namespace: str | None = None
    workflow: str | None = None
    model: str | None = None


def interval_of(at: datetime) -> datetime:
    """Return the beginning of the interval that has this instant."""
    seconds = round(SPAN.total_seconds())
    return datetime.fromtimestamp(int(at.timestamp()) // seconds * seconds, at.tzinfo)


def add_up(database: Database, in_time: Callable[[], bool]) -> int:
    """Add the attempts that have ended to their intervals, while there is time. Returns how many sums changed."""
    changed = 0
    while True:
        with database.work() as work:
            work.run(_BEGIN, {"name": WATERMARK})
            row = work.row(_LOCK, {"name": WATERMARK})
            if row is None:  # another process adds up
                return changed
            last = horizon(work)
            end = min(last, row.at + _STRETCH)
            if end <= row.at:
                return changed
            changed += work.run(_ADD, {"begin": row.at, "end": end})
            work.run(_MOVE, {"name": WATERMARK, "at": end})
        if end == last or not in_time():
            return changed


def expire(database: Database, now: datetime, in_time: Callable[[], bool]) -> int:
    """Remove intervals that are kept no longer, while there is time. Returns how many."""
    done = 0
    while in_time():
        with database.work() as work:
            found = work.run(_EXPIRE, {"before": now - KEPT_FOR, "batch": _BATCH})
        done += found
        if found < _BATCH:
            break
    return done


def read(
    work: UnitOfWork, window: CostWindow, by: CostGroup, zone: str, limit: int = MOST_LINES
) -> tuple[Spending, list[tuple[str, Spending]]]:
    """
    Return the sum of a window, and what it is made of: the dearest first, or the latest days.

    The window begins with a whole interval, but by label: those sums are of single attempts.
    """
    values: dict[str, Any] = {**window._asdict(), "limit": min(limit, MOST_LINES) + 2}
    if by.label is None:
        rows = work.rows(_BY[by.name], {**values, "since": interval_of(window.since), "zone": zone})
    else:
        rows = work.rows(_BY_LABEL, {**values, "label": by.label})
    return _divided(rows)


def _divided(rows: Sequence[Any]) -> tuple[Spending, list[tuple[str, Spending]]]:
    total = next((_spending(row) for row in rows if row.is_total), Spending())
    return total, [(row.key, _spending(row)) for row in rows if not row.is_total]


def _spending(row: Any) -> Spending:
    counts = {name: int(getattr(row, name)) for name in _COUNTS[:-1]}
    return Spending(**counts, cost=row.cost)
