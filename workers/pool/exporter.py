"""
The metrics of a pool for Prometheus: its phase, its engine, and what it did.

They are served from before the load of the model until the end of the pool (`workers/telemetry/exporter.py`). Each
metric is read from the engine at a scrape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from app.fleet.pool import PoolPhase
from workers.engine import Engine
from workers.engine.metrics import QUEUE_BOUNDS, EngineMetrics
from workers.pool.progress import Status
from workers.telemetry import exporter
from workers.telemetry.exporter import ExporterAddress
from workers.telemetry.work import WorkCollector

#: Metric names without prefix, each with its field and description. Units are those of Prometheus.
_COUNTERS: Mapping[str, tuple[str, str]] = {
    "requests_submitted": ("submitted", "Requests that were submitted."),
    "requests_admitted": ("admitted", "Requests that got a slot."),
    "prefix_hits": ("prefix_hits", "Requests that reused a prefix that was computed before."),
    "prefixes_evicted": ("prefixes_evicted", "Kept prefixes that were evicted to free cells."),
    "requests_parked": ("parked", "Requests that were parked for a more urgent one."),
    "requests_resumed": ("resumed", "Parked requests that were resumed."),
    "decodes": ("decodes", "Decodes."),
    "decode_seconds": ("decode_seconds", "Time in decodes."),
    "sampling_seconds": ("sampling_seconds", "Time in sampling."),
    "bookkeeping_seconds": ("bookkeeping_seconds", "Time of the loop in everything else."),
    "grammar_seconds": ("grammar_seconds", "Time in grammars, for requests that have ended."),
    "grammar_masks": ("grammar_masks", "Tokens that needed a grammar mask."),
    "grammars_compiled": ("grammar_compiled", "Grammars that were compiled."),
    "embedded_texts": ("embedded_texts", "Texts that were embedded."),
    "embedded_tokens": ("embedded_tokens", "Tokens that were embedded."),
    "written_tokens": ("tokens_out", "Tokens that were generated."),
    "drafted_tokens": ("tokens_drafted", "Tokens that were predicted and computed in advance."),
    "accepted_tokens": ("tokens_accepted", "Predicted tokens that the model chose, too."),
    "drafted_by_model_tokens": ("tokens_drafted_by_model", "Those of them that a draft model predicted."),
    "accepted_by_model_tokens": ("tokens_accepted_by_model", "Those of a draft model that the model chose, too."),
    "contexts_rebuilt": ("rebuilt", "Contexts that were rebuilt after a failure."),
}
#: The same for the store of prefixes that left the cache.
_STORE_COUNTERS: Mapping[str, tuple[str, str]] = {
    "prefixes_stored": ("stored", "Prefixes that were saved when they left the cache, or before."),
    "prefixes_not_stored": ("not_stored", "Prefixes that were too large, or that there was no time to save."),
    "prefixes_restored": ("restored", "Prefixes that were restored from memory or files."),
    "restored_tokens": ("restored_tokens", "Tokens that were restored instead of computed."),
    "state_files_read": ("files_read", "State files that were read."),
    "state_files_written": ("files_written", "State files that were written."),
    "state_bytes_read": ("bytes_read", "Bytes of states that were read from files."),
    "state_bytes_written": ("bytes_written", "Bytes of state files that were written."),
    "state_files_refused": ("refused", "State files that were damaged, or not of this model, key and configuration."),
    "state_failures": ("failed", "States that could not be read, written or loaded."),
    "state_save_seconds": ("save_seconds", "Time of the loop in saving states."),
    "state_restore_seconds": ("restore_seconds", "Time of the loop in loading states."),
    "state_read_seconds": ("read_seconds", "Time in reading state files, on a thread of its own."),
    "state_write_seconds": ("write_seconds", "Time in writing state files, on a thread of its own."),
}
_STORE_GAUGES: Mapping[str, tuple[str, str]] = {
    "stored_prefixes": ("entries", "Prefixes in the store."),
    "stored_memory_bytes": ("memory_bytes", "Bytes of their states in host memory."),
    "stored_disk_bytes": ("disk_bytes", "Bytes of the state files that this pool knows."),
}
_GAUGES: Mapping[str, tuple[str, str]] = {
    "slots": ("slots", "Requests that can run at the same time."),
    "running": ("running", "Requests in slots."),
    "waiting": ("waiting", "Requests without a slot, including parked ones."),
    "parked": ("parked_now", "Requests whose state is stored in host memory."),
    "parked_bytes": ("parked_bytes", "Bytes of those states."),
    "batch_occupancy_ratio": ("occupancy", "Part of the slots that are in use."),
    "kv_cells": ("cells", "Cells of the KV cache."),
    "kv_cells_used": ("cells_used", "Used cells, including kept prefixes."),
    "prefixes_kept": ("prefixes_kept", "Finished sequences that are kept for later requests."),
    "threads": ("threads", "CPU threads of a decode of texts."),
    "prefill_tokens_per_second": ("prefill_rate", "Recent speed of decodes that contain prompts."),
    "decode_tokens_per_second": ("decode_rate", "Recent speed of decodes that contain no prompts."),
}
_OUTCOMES = ("finished", "failed", "cancelled", "timed_out", "refused")


class Metered(Engine, Protocol):
    """An engine with metrics."""

    def metrics(self) -> EngineMetrics:
        """Return its counters and its current state."""


class PoolCollector(Collector):
    """The collector of a pool, which reads its figures at each scrape."""

    def __init__(self, status: Status, labels: Mapping[str, str]) -> None:
        self._status = status
        self._names, self._values = tuple(labels), tuple(labels.values())
        self.engine: Metered | None = None
        #: What its worker did.
        self.work = WorkCollector(labels)

    def collect(self) -> Iterator[Metric]:
        """Yield all current metrics."""
        phases = GaugeMetricFamily(
            "arriero_pool_phase", "1 for the current phase of the pool.", labels=(*self._names, "phase")
        )
        for phase in PoolPhase:
            phases.add_metric((*self._values, phase), float(phase is self._status.phase))
        yield phases
        yield self._gauge("arriero_pool_loaded_ratio", "The loaded part of the model.", self._status.loaded)
        if self.engine is not None:
            yield from self._of_engine(self.engine)
        yield from self.work.collect()

    def _of_engine(self, engine: Metered) -> Iterator[Metric]:
        now = engine.metrics()
        stalled = engine.stalled_for().total_seconds()
        yield self._gauge("arriero_engine_stalled_seconds", "Time without progress while the engine has work.", stalled)
        for gauges, figures in ((_GAUGES, now), (_STORE_GAUGES, now.store)):
            for name, (field, meaning) in gauges.items():
                yield self._gauge(f"arriero_engine_{name}", meaning, getattr(figures, field))
        for counters, figures in ((_COUNTERS, now), (_STORE_COUNTERS, now.store)):
            for name, (field, meaning) in counters.items():
                counter = CounterMetricFamily(f"arriero_engine_{name}", meaning, labels=self._names)
                counter.add_metric(self._values, getattr(figures, field))
                yield counter
        ended = CounterMetricFamily(
            "arriero_engine_requests_ended", "Requests that ended, by outcome.", labels=(*self._names, "outcome")
        )
        for outcome in _OUTCOMES:
            ended.add_metric((*self._values, outcome), getattr(now, outcome))
        yield ended
        prompts = CounterMetricFamily(
            "arriero_engine_prompt_tokens",
            "Prompt tokens, by source.",
            labels=(*self._names, "source"),
        )
        prompts.add_metric((*self._values, "computed"), now.tokens_computed)
        prompts.add_metric((*self._values, "reused"), now.tokens_reused)
        yield prompts
        yield self._waits(now)

    def _waits(self, now: EngineMetrics) -> Metric:
        waits = HistogramMetricFamily(
            "arriero_engine_queue_wait_seconds", "Time from submission until a slot.", labels=self._names
        )
        counts, buckets = 0, []
        for bound, count in zip((*map(str, QUEUE_BOUNDS), "+Inf"), now.queue_waits, strict=True):
            counts += count
            buckets.append((bound, counts))
        waits.add_metric(self._values, buckets, now.queue_seconds)
        return waits

    def _gauge(self, name: str, meaning: str, value: float) -> Metric:
        gauge = GaugeMetricFamily(name, meaning, labels=self._names)
        gauge.add_metric(self._values, value)
        return gauge


@contextmanager
def serving(
    name: str,
    status: Status,
    labels: Mapping[str, str],
    *,
    host: str,
    port: int,
    data_dir: Path,
    trusted_hosts: tuple[str, ...] = (),
) -> Iterator[PoolCollector]:
    """
    Serve the metrics of a pool at `host` and `port` (0: a free one) until the block ends.

    Raises ServerNotStarted when it cannot listen on the port.
    """
    collector = PoolCollector(status, labels)
    address = ExporterAddress(host, port, "pools.metrics_port", data_dir, trusted_hosts)
    with exporter.serving(name, [collector], address):
        yield collector
