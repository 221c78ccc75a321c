"""
The exporter: the Prometheus metrics of a pool, on an HTTP port of its own.

It serves from before the load of the model until the end of the pool. Each metric is read from the engine at a scrape;
nothing is counted twice, and requests do not become slower.
Pages of other sites are refused, as in the API; the connection of a silent client is closed.
The address is written to a file for Prometheus's service discovery (`file_sd_configs`), and removed with the pool.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING, Any, Protocol
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from app.fleet.pool import METRICS_FOLDER, PoolPhase
from app.kernel import log
from app.kernel.processes.listening import listen
from app.kernel.security import request_guard
from app.kernel.security.request_guard import RequestGuard
from workers.engine import Engine
from workers.engine.metrics import QUEUE_BOUNDS, EngineMetrics
from workers.pool.progress import Status

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication

_log = log.get(__name__)

#: Seconds after which the connection of a silent client is closed.
_TIMEOUT = 10

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
    "contexts_rebuilt": ("rebuilt", "Contexts that were rebuilt after a failure."),
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

    def _of_engine(self, engine: Metered) -> Iterator[Metric]:
        now = engine.metrics()
        stalled = engine.stalled_for().total_seconds()
        yield self._gauge("arriero_engine_stalled_seconds", "Time without progress while the engine has work.", stalled)
        for name, (field, meaning) in _GAUGES.items():
            yield self._gauge(f"arriero_engine_{name}", meaning, getattr(now, field))
        for name, (field, meaning) in _COUNTERS.items():
            counter = CounterMetricFamily(f"arriero_engine_{name}", meaning, labels=self._names)
            counter.add_metric(self._values, getattr(now, field))
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
    Serve at `host` and `port` (0: a free one) until the block ends, and write the address to a file below `data_dir`.

    Requests for other host names than this host's are refused, except for `trusted_hosts`.
    Raises ServerNotStarted when it cannot listen on the port.
    """
    collector, registry = PoolCollector(status, labels), CollectorRegistry()
    registry.register(collector)
    ProcessCollector(registry=registry)
    server = _Server(listen("the exporter of metrics", host, port, "pools.metrics_port"))
    guard = request_guard.guard_of(host, trusted_hosts)
    server.set_app(_guarded(make_wsgi_app(registry), guard))
    thread = threading.Thread(target=server.serve_forever, name="exporter", daemon=True)
    thread.start()
    file = data_dir / METRICS_FOLDER / f"{name}.json"
    try:
        address = f"{_reachable(host)}:{server.server_port}"
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix(".new")
        fresh.write_text(json.dumps([{"targets": [address], "labels": {"job": "arriero"}}]) + "\n", encoding="utf-8")
        fresh.replace(file)
        _log.info("metrics_served", address=address, file=str(file))
        yield collector
    finally:
        file.unlink(missing_ok=True)
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingMixIn, WSGIServer):
    """A server with a thread per request; these threads do not prevent the end of the process."""

    daemon_threads = True

    def __init__(self, listener: socket.socket) -> None:
        """Serve on a socket that listens. The full name of the host is not looked up: that can take long."""
        TCPServer.__init__(self, listener.getsockname()[:2], _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket, self.server_address = listener, listener.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002 the signature is the library's
        _log.warning("metrics_not_answered", exc_info=True)


class _Handler(WSGIRequestHandler):
    """A request handler that logs no requests."""

    timeout = _TIMEOUT

    def get_environ(self) -> dict[str, Any]:
        extra = {"arriero.headers": list(self.headers.items()), "arriero.address": self.connection.getsockname()[0]}
        return super().get_environ() | extra

    def log_message(self, *_: object) -> None:
        pass


def _guarded(app: WSGIApplication, guard: RequestGuard) -> WSGIApplication:
    """Return an application that refuses the requests that the guard refuses."""

    def answer(environ: dict[str, Any], start: StartResponse) -> Iterable[bytes]:
        refusal = guard.refuse(environ["REQUEST_METHOD"], environ["arriero.headers"], environ["arriero.address"])
        if refusal is None:
            return app(environ, start)
        body = json.dumps(request_guard.problem_document(refusal)).encode()
        start(
            f"{request_guard.STATUS} Forbidden",
            [("Content-Type", request_guard.MEDIA_TYPE), ("Content-Length", str(len(body)))],
        )
        return [body]

    return answer


def _reachable(host: str) -> str:
    """Return the host for targets: a server on all interfaces is reached by the name of its host."""
    if host in ("0.0.0.0", "::", ""):  # noqa: S104 it is compared, not listened on
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host
