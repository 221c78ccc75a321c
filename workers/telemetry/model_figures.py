"""
The figures of models of one process: counted where the work ends, added to the database every few seconds.

Counting takes microseconds and waits for nothing. While the database does not answer, the figures stay here and are
added later; those of a process that is killed in between are lost.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from datetime import datetime

from app.inference.model_metrics import store
from app.inference.model_metrics.metric import MetricKey, ModelMetric, OperationSample
from app.kernel import clock, log
from app.kernel.database import Database
from app.kernel.errors import Unavailable

_log = log.get(__name__)

#: Seconds for which figures are collected before they are added to the database.
_INTERVAL = 5.0
#: Most sums that wait for the database, of all intervals; the oldest are dropped beyond that.
_MOST_WAITING = 5_000

_Interval = dict[MetricKey, ModelMetric]


class ModelFigures:
    """Counts what the models of this process do. Without `start`, nothing is stored."""

    def __init__(self, now: Callable[[], datetime] = clock.now, interval: float = _INTERVAL) -> None:
        self._now, self._interval = now, interval
        self._lock = threading.Lock()
        #: Since the start of the process, for all namespaces.
        self._totals: _Interval = {}
        #: What is not in the database yet, by the beginning of its interval.
        self._waiting: dict[datetime, _Interval] = {}
        self._database: Database | None = None
        self._counted, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._add_for_ever, name="model-figures", daemon=True)

    def start(self, database: Database) -> None:
        """Add what is counted to this database from now on."""
        self._database = database
        self._thread.start()

    def count(self, sample: OperationSample | None) -> None:
        """Count an operation that has ended; None is none."""
        if sample is None:
            return
        at = store.interval_of(self._now())
        with self._lock:
            self._totals.setdefault(sample.key._replace(namespace=""), ModelMetric()).add(sample)
            self._waiting.setdefault(at, {}).setdefault(sample.key, ModelMetric()).add(sample)
        self._counted.set()

    def totals(self) -> Mapping[MetricKey, ModelMetric]:
        """Return the sums since the start of the process, of all namespaces together."""
        found: _Interval = {}
        with self._lock:
            for key, metric in self._totals.items():
                found.setdefault(key, ModelMetric()).merge(metric)
        return found

    def add(self) -> None:
        """Add what waits to the database. Raises Unavailable; nothing is lost then."""
        if self._database is None:
            return
        with self._lock:
            taken, self._waiting = self._waiting, {}
        while taken:
            at = min(taken)
            try:
                with self._database.work() as work:
                    store.add(work, at, taken[at])
            except Unavailable:
                self._return(taken)
                raise
            del taken[at]

    def close(self) -> None:
        """Add the rest, if the database answers, and count for no database any more."""
        if self._database is None:
            return
        self._ended.set()
        self._counted.set()
        self._thread.join(timeout=10)

    def _return(self, taken: dict[datetime, _Interval]) -> None:
        with self._lock:
            for at, metrics in taken.items():
                for key, metric in metrics.items():
                    self._waiting.setdefault(at, {}).setdefault(key, ModelMetric()).merge(metric)
            while sum(map(len, self._waiting.values())) > _MOST_WAITING:
                dropped = self._waiting.pop(min(self._waiting))
                _log.warning("model_figures_dropped", sums=len(dropped))

    def _add_for_ever(self) -> None:
        problem = ""
        while not self._ended.is_set():
            self._counted.wait()
            self._counted.clear()
            self._ended.wait(self._interval)
            try:
                self.add()
                problem = ""
            except Unavailable as error:
                if str(error) != problem:
                    problem = str(error)
                    _log.warning("model_figures_postponed", error=problem)
                if not self._ended.is_set():
                    self._counted.set()
            except Exception:  # noqa: BLE001 the outermost loop of the thread
                _log.exception("model_figures_not_added")
