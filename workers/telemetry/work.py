"""
What a worker process did: attempts of steps, and operations of models, counted for Prometheus and the database.

Labels are bounded: kinds of steps, outcomes, and models of the catalogue. Namespaces, workflows and runs are no labels.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from typing import Any

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from app.inference.model_metrics.latency import Latencies
from app.inference.model_metrics.metric import OperationOutcome, OperationSample
from app.kernel.database import Database
from app.workflows.language.agent import AgentTurn
from app.workflows.runs.claims import Claim
from app.workflows.state_machine.outcomes import Failure, Outcome, Success
from workers.hooks.figures import HookFigures
from workers.telemetry import operations
from workers.telemetry.model_figures import ModelFigures


class WorkFigures:
    """The figures of one process."""

    def __init__(self) -> None:
        """Nothing is stored before `start`."""
        self.models = ModelFigures()
        self.hooks = HookFigures()
        self._is_known: Callable[[str], bool] = lambda _: True
        self._lock = threading.Lock()
        #: Attempts by kind of step and outcome, and their durations by kind.
        self._attempts: dict[tuple[str, str], int] = {}
        self._durations: dict[str, Latencies] = {}
        #: Known costs of attempts by model, and how many attempts have none.
        self._costs: dict[str, tuple[Decimal, int]] = {}

    def start(self, database: Database, is_known: Callable[[str], bool]) -> None:
        """Store the figures of models from now on; `is_known` says whether the catalogue has a model."""
        self._is_known = is_known
        self.models.start(database)

    def count_step(self, claim: Claim, outcome: Outcome, seconds: float) -> None:
        """Count an attempt whose outcome was recorded."""
        match outcome:
            case Success():
                ended = "succeeded"
            case Failure(reason=reason):
                ended = str(reason)
            case _:
                ended = "suspended"
        kind = _kind_of(claim.work)
        with self._lock:
            self._attempts[kind, ended] = self._attempts.get((kind, ended), 0) + 1
            self._durations.setdefault(kind, Latencies()).add(seconds)
        self._count(operations.of_step(claim, outcome, seconds))

    def count_request(self, body: Any, namespace: str, model: str, outcome: Success | Failure, seconds: float) -> None:
        """Count a direct request that has ended."""
        self._count(operations.of_request(body, namespace, model, outcome, seconds))

    def count_cost(self, model: str, cost: Decimal | None) -> None:
        """Count what an attempt with a model cost; None: nobody knows."""
        if self._is_known(model):
            with self._lock:
                total, unknown = self._costs.get(model, (Decimal(0), 0))
                self._costs[model] = (total, unknown + 1) if cost is None else (total + cost, unknown)

    def costs(self) -> dict[str, tuple[Decimal, int]]:
        """Return the known costs by model, and how many attempts have none."""
        with self._lock:
            return dict(self._costs)

    def close(self) -> None:
        """Store the rest."""
        self.models.close()

    def _count(self, sample: OperationSample | None) -> None:
        if sample is not None and self._is_known(sample.key.model):
            self.models.count(sample)

    def attempts(self) -> tuple[dict[tuple[str, str], int], dict[str, Latencies]]:
        """Return the attempts by kind and outcome, and their durations by kind."""
        with self._lock:
            durations = {kind: Latencies() for kind in self._durations}
            for kind, found in self._durations.items():
                durations[kind].merge(found)
            return dict(self._attempts), durations


def _kind_of(work: object) -> str:
    """Return the kind of a step; the turns and the calls of agents have none of their own."""
    of_agents = "agent_turn" if isinstance(work, AgentTurn) else "agent_call"
    return str(getattr(work, "kind", of_agents))


class WorkCollector(Collector):
    """The metrics of the figures, with the labels of their process."""

    def __init__(self, labels: Mapping[str, str], figures: WorkFigures | None = None) -> None:
        #: None before the worker has started.
        self.figures = figures
        # Operations name their model themselves.
        self._names = tuple(name for name in labels if name != "model")
        self._values = tuple(labels[name] for name in self._names)

    def collect(self) -> Iterator[Metric]:
        """Yield all current metrics."""
        if self.figures is None:
            return
        attempts, durations = self.figures.attempts()
        ended = self._counter("arriero_step_attempts", "Attempts of steps, by kind and outcome.", "kind", "outcome")
        for labels, count in sorted(attempts.items()):
            ended.add_metric((*self._values, *labels), count)
        yield ended
        took = self._histogram("arriero_step_attempt_duration_seconds", "Time of an attempt in the worker.", "kind")
        for kind, latencies in sorted(durations.items()):
            took.add_metric((*self._values, kind), list(latencies.exported()), latencies.total)
        yield took
        yield from self._of_models(self.figures.models)
        yield from self._of_hooks(self.figures.hooks)
        cost = self._counter("arriero_model_cost", "Known costs of attempts, in the currency of the settings.", "model")
        unknown = self._counter("arriero_model_unpriced_attempts", "Attempts whose cost is not known.", "model")
        for model, (amount, attempts_without) in sorted(self.figures.costs().items()):
            cost.add_metric((*self._values, model), float(amount))
            unknown.add_metric((*self._values, model), attempts_without)
        yield from (cost, unknown)

    def _of_models(self, figures: ModelFigures) -> Iterator[Metric]:
        of = ("model", "operation")
        done = self._counter("arriero_model_operations", "Operations of models, by outcome.", *of, "outcome")
        took = self._histogram(
            "arriero_model_operation_duration_seconds", "Time of an operation that succeeded, in the worker.", *of
        )
        first = self._histogram("arriero_model_first_token_seconds", "Time to the first token of a text.", *of)
        tokens = self._counter(
            "arriero_model_tokens", "Tokens: read (in), written (out), not computed again (saved).", *of, "direction"
        )
        for key, metric in sorted(figures.totals().items(), key=lambda found: found[0]):
            labels = (*self._values, key.model, key.operation)
            for outcome in OperationOutcome:
                done.add_metric((*labels, outcome), getattr(metric, outcome))
            took.add_metric(labels, list(metric.latency.exported()), metric.latency.total)
            if metric.first_token.count:
                first.add_metric(labels, list(metric.first_token.exported()), metric.first_token.total)
            saved = max(0, metric.tokens_saved(key.operation))
            for direction, count in (("in", metric.tokens_in), ("out", metric.tokens_out), ("saved", saved)):
                tokens.add_metric((*labels, direction), count)
        yield from (done, took, first, tokens)

    def _of_hooks(self, figures: HookFigures) -> Iterator[Metric]:
        calls, durations = figures.totals()
        done = self._counter("arriero_hook_calls", "Calls of hooks, by result.", "hook", "at", "result")
        for labels, count in sorted(calls.items()):
            done.add_metric((*self._values, *labels), count)
        took = self._histogram("arriero_hook_duration_seconds", "Time of a call of a hook.", "hook", "at")
        for of, latencies in sorted(durations.items()):
            took.add_metric((*self._values, *of), list(latencies.exported()), latencies.total)
        yield from (done, took)

    def _counter(self, name: str, meaning: str, *labels: str) -> CounterMetricFamily:
        return CounterMetricFamily(name, meaning, labels=(*self._names, *labels))

    def _histogram(self, name: str, meaning: str, *labels: str) -> HistogramMetricFamily:
        return HistogramMetricFamily(name, meaning, labels=(*self._names, *labels))
