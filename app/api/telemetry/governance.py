"""
What runs by itself as metrics: signals, firings, alerts, notifications, actions and scheduled jobs.

Signals are those of the whole installation over the last five minutes: by model or host there are `GET /v1/signals` and
the metrics of workers. Rules are the only names that users choose, and at most `_MOST` of them are told apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from sqlalchemy import text

from app.governance.signals import store
from app.governance.signals.names import SIGNALS
from app.governance.signals.store import SignalQuery
from app.kernel.database import Database, UnitOfWork

#: The window of the signals.
_WINDOW = timedelta(minutes=5)
#: Most rules that are told apart; the firings of others are those of the rule `other`.
_MOST = 200

_FIRINGS = text("""
    SELECT name, state, count(*)::float AS n FROM rule_firing WHERE state <> 'cleared'
    GROUP BY name, state ORDER BY n DESC, name
""")
_ALERTS = text("SELECT severity, state, count(*)::float AS n FROM alert WHERE state <> 'resolved' GROUP BY 1, 2")
_PENDING = text("""
    SELECT count(*)::float AS waiting, (count(*) FILTER (WHERE error <> ''))::float AS failing FROM alert_notification
    WHERE state = 'pending'
""")
_ACTIONS = text("""
    SELECT kind, state, count(*)::float AS n FROM action_execution
    WHERE state IN ('pending', 'applied', 'undoing') GROUP BY 1, 2
""")
_JOBS = text("""
    SELECT name, passes::float, failures::float, seconds, last_seconds, paused_at IS NOT NULL AS paused,
           extract(epoch FROM last_started_at)::float AS started
    FROM scheduled_job
""")


def read(database: Database) -> Sequence[Metric]:
    """Return the metrics of this instant. Raises DatabaseUnreachable."""
    with database.work() as work:
        return [_signals(work), _firings(work), *_alerts(work), *_jobs(work)]


def _signals(work: UnitOfWork) -> Metric:
    values = {}
    for name, definition in SIGNALS.items():
        found = store.read(work, SignalQuery(name, _WINDOW)).get("")
        usual = definition.statistics[0]
        value = None if found is None else found.statistic(usual)
        if value is not None:
            values[(name, usual.value, definition.unit.value)] = value
    meaning = "Signals over the last five minutes, by their usual statistic."
    return _gauge("arriero_signal", meaning, values, "signal", "statistic", "unit")


def _firings(work: UnitOfWork) -> Metric:
    values: dict[tuple[str, ...], float] = {}
    for number, row in enumerate(work.rows(_FIRINGS)):
        key = (row.name if number < _MOST else "other", row.state)
        values[key] = values.get(key, 0) + row.n
    return _gauge("arriero_rule_firings", "Firings that have not cleared.", values, "rule", "state")


def _alerts(work: UnitOfWork) -> Sequence[Metric]:
    alerts = {(row.severity, row.state): row.n for row in work.rows(_ALERTS)}
    (pending,) = work.rows(_PENDING)
    actions = {(row.kind, row.state): row.n for row in work.rows(_ACTIONS)}
    notifications = {("waiting",): pending.waiting - pending.failing, ("failing",): pending.failing}
    return [
        _gauge("arriero_alerts", "Alerts that are not resolved.", alerts, "severity", "state"),
        _gauge(
            "arriero_alert_notifications",
            "Notifications that are not delivered: not tried yet, and tried without success.",
            notifications,
            "state",
        ),
        _gauge("arriero_actions", "Actions that wait, hold, or are taken back.", actions, "kind", "state"),
    ]


def _jobs(work: UnitOfWork) -> Sequence[Metric]:
    rows = work.rows(_JOBS)
    passes = CounterMetricFamily("arriero_job_passes", "Passes of scheduled jobs.", labels=("job",))
    failures = CounterMetricFamily("arriero_job_failures", "Passes that failed or were postponed.", labels=("job",))
    seconds = CounterMetricFamily("arriero_job_duration_seconds", "Time of all passes.", labels=("job",))
    for row in rows:
        passes.add_metric((row.name,), row.passes)
        failures.add_metric((row.name,), row.failures)
        seconds.add_metric((row.name,), row.seconds)
    paused = {(row.name,): float(row.paused) for row in rows}
    last = {(row.name,): row.last_seconds for row in rows if row.last_seconds is not None}
    started = {(row.name,): row.started for row in rows if row.started is not None}
    return [
        passes,
        failures,
        seconds,
        _gauge("arriero_job_last_duration_seconds", "Time of the last pass.", last, "job"),
        _gauge("arriero_job_last_start_timestamp_seconds", "When the last pass began.", started, "job"),
        _gauge("arriero_job_paused", "1 while an operator has paused it.", paused, "job"),
    ]


def _gauge(name: str, meaning: str, values: Mapping[Any, float], *labels: str) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, meaning, labels=labels)
    for key, value in sorted(values.items()):
        family.add_metric(key, value)
    return family
