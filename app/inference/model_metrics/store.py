"""
Stored figures of models: added by the processes that do the work, read over a window.

A process adds what it did every few seconds; what it had not yet added is lost when it is killed. The cost of a read
grows with the intervals of its window, never with the steps or attempts that are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import text

from app.inference.model_metrics import latency
from app.inference.model_metrics.latency import Latencies
from app.inference.model_metrics.metric import MetricKey, ModelMetric, Operation
from app.kernel.database import Database, UnitOfWork

#: The length of a new interval, and of one that is older than `FINE_FOR`.
SPAN, LONG_SPAN = timedelta(minutes=5), timedelta(hours=1)
#: For how long intervals keep their length, and for how long they are kept at all.
FINE_FOR, KEPT_FOR = timedelta(days=7), timedelta(days=400)
#: Most intervals that one transaction makes longer or removes.
_BATCH = 2_000

_SUMS = (
    *("succeeded", "failed", "cancelled", "tokens_in", "tokens_out", "tokens_cached", "writing_seconds"),
    *("latency_count", "latency_total", "first_count", "first_total"),
)
_KEY = "at, span, namespace, model, operation"
_NAMES = (
    *_SUMS,
    *("latency_least", "latency_greatest", "latency_buckets", "first_least", "first_greatest", "first_buckets"),
)


def _added(name: str) -> str:
    ours, its = f"model_metric.{name}", f"excluded.{name}"
    if name in _SUMS:
        return f"{name} = {ours} + {its}"
    if name.endswith("_buckets"):
        # Buckets of an earlier version, with other bounds, are replaced.
        added = f"ARRAY(SELECT a + b FROM unnest({ours}, {its}) WITH ORDINALITY AS pair (a, b, place) ORDER BY place)"
        return f"{name} = CASE WHEN cardinality({ours}) = cardinality({its}) THEN {added} ELSE {its} END"
    return f"{name} = {'LEAST' if name.endswith('_least') else 'GREATEST'}({ours}, {its})"


_ADD = text(f"""
    INSERT INTO model_metric ({_KEY}, {", ".join(_NAMES)})
    VALUES (:at, :span, :namespace, :model, :operation, {", ".join(f":{name}" for name in _NAMES)})
    ON CONFLICT ({_KEY}) DO UPDATE SET {", ".join(_added(name) for name in _NAMES)}
""")
_READ = text(f"""
    SELECT namespace, model, operation, {", ".join(_NAMES)} FROM model_metric
    WHERE at + span * interval '1 second' > :since AND at < :until AND at > :first
      AND (CAST(:namespace AS text) IS NULL OR namespace = :namespace)
      AND (CAST(:model AS text) IS NULL OR model = :model)
      AND (CAST(:operation AS text) IS NULL OR operation = :operation)
""")
_TAKE = text(f"""
    DELETE FROM model_metric WHERE ({_KEY}) IN (
        SELECT {_KEY} FROM model_metric WHERE at < :before AND span < :span ORDER BY at LIMIT :batch
        FOR UPDATE SKIP LOCKED
    ) RETURNING {_KEY}, {", ".join(_NAMES)}
""")
_EXPIRE = text("""
    DELETE FROM model_metric WHERE ctid IN (
        SELECT ctid FROM model_metric WHERE at < :before ORDER BY at LIMIT :batch
    )
""")


def interval_of(at: datetime, span: timedelta = SPAN) -> datetime:
    """Return the beginning of the interval that has this instant."""
    seconds = round(span.total_seconds())
    return datetime.fromtimestamp(int(at.timestamp()) // seconds * seconds, at.tzinfo)


def add(work: UnitOfWork, at: datetime, metrics: Mapping[MetricKey, ModelMetric], span: timedelta = SPAN) -> None:
    """Add what was done in the interval that begins at this instant."""
    seconds = round(span.total_seconds())
    # In one order, so that processes that write at the same time wait for each other and never in a circle.
    for key in sorted(metrics):
        work.run(_ADD, {"at": at, "span": seconds, **key._asdict(), **_columns(metrics[key])})


def read(
    work: UnitOfWork,
    since: datetime,
    until: datetime,
    *,
    namespace: str | None = None,
    model: str | None = None,
    operation: Operation | None = None,
) -> dict[tuple[str, Operation], ModelMetric]:
    """Return what was done in the intervals that touch a window, by model and kind; None means all."""
    found: dict[tuple[str, Operation], ModelMetric] = {}
    wanted = {"namespace": namespace, "model": model, "operation": operation}
    bounds = {"since": since, "until": until, "first": since - LONG_SPAN}
    for row in work.rows(_READ, {**bounds, **wanted}):
        found.setdefault((row.model, Operation(row.operation)), ModelMetric()).merge(_metric(row))
    return found


def lengthen(work: UnitOfWork, now: datetime) -> int:
    """Merge some old intervals into longer ones. Returns how many there were."""
    before = interval_of(now - FINE_FOR, LONG_SPAN)
    rows = work.rows(_TAKE, {"before": before, "span": round(LONG_SPAN.total_seconds()), "batch": _BATCH})
    merged: dict[datetime, dict[MetricKey, ModelMetric]] = {}
    for row in rows:
        key = MetricKey(row.namespace, row.model, Operation(row.operation))
        merged.setdefault(interval_of(row.at, LONG_SPAN), {}).setdefault(key, ModelMetric()).merge(_metric(row))
    for at in sorted(merged):
        add(work, at, merged[at], LONG_SPAN)
    return len(rows)


def expire(work: UnitOfWork, now: datetime) -> int:
    """Remove some intervals that are kept no longer. Returns how many."""
    return work.run(_EXPIRE, {"before": now - KEPT_FOR, "batch": _BATCH})


def keep_short(database: Database, now: datetime, in_time: Callable[[], bool]) -> int:
    """Merge old intervals and remove those that are kept no longer, while there is time. Returns how many."""
    done = 0
    for step in (lengthen, expire):
        while in_time():
            with database.work() as work:
                found = step(work, now)
            done += found
            if found < _BATCH:
                break
    return done


def _columns(metric: ModelMetric) -> dict[str, Any]:
    found: dict[str, Any] = {name: getattr(metric, name) for name in _SUMS if hasattr(metric, name)}
    for name, latencies in (("latency", metric.latency), ("first", metric.first_token)):
        found |= {
            f"{name}_count": latencies.count,
            f"{name}_total": latencies.total,
            f"{name}_least": latencies.least,
            f"{name}_greatest": latencies.greatest,
            f"{name}_buckets": latencies.buckets,
        }
    return found


def _metric(row: Any) -> ModelMetric:
    return ModelMetric(
        row.succeeded,
        row.failed,
        row.cancelled,
        row.tokens_in,
        row.tokens_out,
        row.tokens_cached,
        row.writing_seconds,
        _latencies(row, "latency"),
        _latencies(row, "first"),
    )


def _latencies(row: Any, name: str) -> Latencies:
    values = (getattr(row, f"{name}_{part}") for part in ("buckets", "count", "total", "least", "greatest"))
    return latency.of_buckets(*values)
