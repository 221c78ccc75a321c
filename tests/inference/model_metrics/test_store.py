"""Stored figures of models: added, read over a window, made longer and removed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from sqlalchemy import text

from app.inference.model_metrics import store
from app.inference.model_metrics.metric import MetricKey, ModelMetric, Operation, OperationOutcome, OperationSample
from app.kernel.database import Database

NOW = datetime(2026, 5, 20, 12, 3, tzinfo=UTC)
KEY = MetricKey("default", "m:1", Operation.REASONING)


def metric(*seconds: float, key: MetricKey = KEY, failed: int = 0) -> dict[MetricKey, ModelMetric]:
    found = ModelMetric(failed=failed)
    for one in seconds:
        found.add(OperationSample(key, OperationOutcome.SUCCEEDED, one, one / 2, 100, 10, 40))
    return {key: found}


def add(database: Database, at: datetime, metrics: dict[MetricKey, ModelMetric]) -> None:
    with database.work() as work:
        store.add(work, store.interval_of(at), metrics)


def test_what_is_added_twice_is_the_sum(database: Database) -> None:
    add(database, NOW, metric(1.0, 3.0))
    add(database, NOW, metric(2.0, failed=1))

    with database.work() as work:
        found = store.read(work, NOW - timedelta(hours=1), NOW)["m:1", Operation.REASONING]
    assert (found.succeeded, found.failed, found.operations) == (3, 1, 4)
    assert (found.latency.least, found.latency.mean, found.latency.greatest) == (1.0, 2.0, 3.0)
    assert (found.tokens_in, found.tokens_out, found.tokens_cached) == (300, 30, 120)
    assert found.first_token.count == sum(found.latency.buckets) == 3
    assert found.tokens_per_second(Operation.REASONING) == 10.0
    assert found.success_rate == 0.75


def test_a_window_has_the_intervals_that_it_touches(database: Database) -> None:
    for minutes in (0, 10, 70):
        add(database, NOW - timedelta(minutes=minutes), metric(1.0))

    with database.work() as work:
        counts = [
            store.read(work, NOW - timedelta(minutes=minutes), NOW)["m:1", Operation.REASONING].operations
            for minutes in (1, 15, 60, 90)
        ]
        assert store.read(work, NOW - timedelta(minutes=60), NOW - timedelta(minutes=30)) == {}
    assert counts == [1, 2, 2, 3]


def test_namespaces_models_and_kinds_are_kept_apart(database: Database) -> None:
    other = MetricKey("research", "m:2", Operation.EMBEDDING)
    add(database, NOW, metric(1.0) | metric(1.0, key=other))
    since = NOW - timedelta(hours=1)

    with database.work() as work:
        assert set(store.read(work, since, NOW, namespace="research")) == {("m:2", Operation.EMBEDDING)}
        assert set(store.read(work, since, NOW, model="m:1")) == {("m:1", Operation.REASONING)}
        assert set(store.read(work, since, NOW, operation=Operation.EMBEDDING)) == {("m:2", Operation.EMBEDDING)}
        assert len(store.read(work, since, NOW)) == 2


def test_old_intervals_become_hours_without_a_change_of_their_sums(database: Database) -> None:
    old = NOW - store.FINE_FOR - timedelta(days=1)
    for minutes in range(0, 120, 5):
        add(database, old.replace(minute=0) + timedelta(minutes=minutes), metric(1.0, 5.0))
    add(database, NOW, metric(2.0))
    day = (old - timedelta(days=1), NOW)

    with database.work() as work:
        before = store.read(work, *day)["m:1", Operation.REASONING]
    assert store.keep_short(database, NOW, lambda: True) == 24
    with database.work() as work:
        rows = work.rows(text("SELECT span FROM model_metric ORDER BY at"))
        assert store.read(work, *day)["m:1", Operation.REASONING] == before
    assert [row.span for row in rows] == [3600, 3600, 300]
    assert store.keep_short(database, NOW, lambda: True) == 0
    assert store.keep_short(database, NOW + store.KEPT_FOR, lambda: True) == 4, "one is merged, and three are removed"
