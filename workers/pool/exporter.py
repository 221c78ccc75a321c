"""
The exporter: what a pool does, as Prometheus reads it, on an HTTP port of the pool's own.

It answers from before the model is loaded until it is gone. Each figure is read from the engine when it is asked for;
nothing is counted twice, and no request pays for it.
Pages of other sites are refused, as by the API; a client that sends nothing is let go of.
The port is written to a file that Prometheus finds targets by (`file_sd_configs`), and is gone with the pool.
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
from app.kernel.errors import ServerNotStarted
from app.kernel.security import request_guard
from app.kernel.security.request_guard import RequestGuard
from workers.engine import Engine
from workers.engine.metrics import QUEUE_BOUNDS, EngineMetrics
from workers.pool.progress import Status

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication

_log = log.get(__name__)

#: Seconds that a client may be silent for.
_SILENCE = 10
#: Folder below the data directory, with a file for each pool that can be asked.
FOLDER = METRICS_FOLDER

#: Name to field and meaning. Names are without the prefix; units are Prometheus's.
_COUNTERS: Mapping[str, tuple[str, str]] = {
    "requests_submitted": ("submitted", "Requests that were taken."),
    "requests_admitted": ("admitted", "Requests that got a slot."),
    "prefix_hits": ("prefix_hits", "Requests that took over a prefix that was computed before."),
    "prefixes_evicted": ("prefixes_evicted", "Kept prefixes that were dropped for room."),
    "requests_parked": ("parked", "Times that a request made way for a more urgent one."),
    "requests_resumed": ("resumed", "Times that one came back."),
    "decodes": ("decodes", "Decodes."),
    "decode_seconds": ("decode_seconds", "Time in decodes."),
    "sampling_seconds": ("sampling_seconds", "Time in choosing tokens."),
    "bookkeeping_seconds": ("bookkeeping_seconds", "Time of the loop in all else."),
    "grammar_seconds": ("grammar_seconds", "Time in grammars, of requests that have ended."),
    "grammar_masks": ("grammar_masks", "Tokens that took a mask."),
    "grammars_compiled": ("grammar_compiled", "Grammars that had to be compiled."),
    "embedded_texts": ("embedded_texts", "Texts that became vectors."),
    "embedded_tokens": ("embedded_tokens", "Their tokens."),
    "written_tokens": ("tokens_out", "Tokens written."),
    "contexts_rebuilt": ("rebuilt", "Contexts that were made again after a fault."),
}
_GAUGES: Mapping[str, tuple[str, str]] = {
    "slots": ("slots", "Requests that can be worked on at the same time."),
    "running": ("running", "Requests in slots."),
    "waiting": ("waiting", "Requests without a slot, parked ones too."),
    "parked": ("parked_now", "Requests whose state lies in host memory."),
    "parked_bytes": ("parked_bytes", "Bytes of those states."),
    "batch_occupancy_ratio": ("occupancy", "Part of the slots that work."),
    "kv_cells": ("cells", "Cells of the KV cache."),
    "kv_cells_used": ("cells_used", "Cells that hold something, kept prefixes too."),
    "prefixes_kept": ("prefixes_kept", "Finished sequences that are kept for later requests."),
    "prefill_tokens_per_second": ("prefill_rate", "Speed of late, in decodes that hold prompts."),
    "decode_tokens_per_second": ("decode_rate", "Speed of late, in decodes that hold none."),
}
_OUTCOMES = ("finished", "failed", "cancelled", "timed_out", "refused")


class Metered(Engine, Protocol):
    """An engine that tells what it does."""

    def metrics(self) -> EngineMetrics:
        """What it did and how it stands."""


class PoolCollector(Collector):
    """Reads a pool when it is asked."""

    def __init__(self, status: Status, labels: Mapping[str, str]) -> None:
        self._status = status
        self._names, self._values = tuple(labels), tuple(labels.values())
        self.engine: Metered | None = None

    def collect(self) -> Iterator[Metric]:
        """Every figure of this instant."""
        phases = GaugeMetricFamily(
            "arriero_pool_phase", "1 for what the pool is about.", labels=(*self._names, "phase")
        )
        for phase in PoolPhase:
            phases.add_metric((*self._values, phase), float(phase is self._status.phase))
        yield phases
        yield self._gauge("arriero_pool_loaded_ratio", "Part of the model that is loaded.", self._status.loaded)
        if self.engine is not None:
            yield from self._of_engine(self.engine)

    def _of_engine(self, engine: Metered) -> Iterator[Metric]:
        now = engine.metrics()
        stalled = engine.stalled_for().total_seconds()
        yield self._gauge("arriero_engine_stalled_seconds", "Time without progress while there is work.", stalled)
        for name, (field, meaning) in _GAUGES.items():
            yield self._gauge(f"arriero_engine_{name}", meaning, getattr(now, field))
        for name, (field, meaning) in _COUNTERS.items():
            counter = CounterMetricFamily(f"arriero_engine_{name}", meaning, labels=self._names)
            counter.add_metric(self._values, getattr(now, field))
            yield counter
        ended = CounterMetricFamily(
            "arriero_engine_requests_ended", "Requests by how they ended.", labels=(*self._names, "outcome")
        )
        for outcome in _OUTCOMES:
            ended.add_metric((*self._values, outcome), getattr(now, outcome))
        yield ended
        prompts = CounterMetricFamily(
            "arriero_engine_prompt_tokens",
            "Tokens of prompts by where they came from.",
            labels=(*self._names, "source"),
        )
        prompts.add_metric((*self._values, "computed"), now.tokens_computed)
        prompts.add_metric((*self._values, "reused"), now.tokens_reused)
        yield prompts
        yield self._waits(now)

    def _waits(self, now: EngineMetrics) -> Metric:
        waits = HistogramMetricFamily(
            "arriero_engine_queue_wait_seconds", "From submission until a slot.", labels=self._names
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
    Answer at `host` and `port` (0: a free one) while the block runs, and say where in a file below `data_dir`.
    Other names than the host's are answered where they are `trusted_hosts`.

    Raises ServerNotStarted when the port cannot be had.
    """
    collector, registry = PoolCollector(status, labels), CollectorRegistry()
    registry.register(collector)
    ProcessCollector(registry=registry)
    try:
        server = _server(host, port)
    except OSError as error:
        hint = "; several pools of one host need pools.metrics_port = 0" if port else ""
        raise ServerNotStarted("the exporter of metrics", f"{host}:{port}: {error.strerror or error}{hint}") from error
    guard = request_guard.guard_of(host, trusted_hosts)
    server.set_app(_guarded(make_wsgi_app(registry), guard))
    thread = threading.Thread(target=server.serve_forever, name="exporter", daemon=True)
    thread.start()
    place = data_dir / FOLDER / f"{name}.json"
    try:
        address = f"{_reachable(host)}:{server.server_port}"
        place.parent.mkdir(parents=True, exist_ok=True)
        fresh = place.with_suffix(".new")
        fresh.write_text(json.dumps([{"targets": [address], "labels": {"job": "arriero"}}]) + "\n", encoding="utf-8")
        fresh.replace(place)
        _log.info("metrics_served", address=address, file=str(place))
        yield collector
    finally:
        place.unlink(missing_ok=True)
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingMixIn, WSGIServer):
    """A thread for each request; none keeps the process from ending."""

    daemon_threads = True

    def server_bind(self) -> None:
        # Without the look-up of the host's full name, which may take a resolver's whole timeout.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002 the signature is the library's
        _log.warning("metrics_not_answered", exc_info=True)


class _Handler(WSGIRequestHandler):
    """Writes no line for each request."""

    timeout = _SILENCE

    def get_environ(self) -> dict[str, Any]:
        arrived = {"arriero.headers": list(self.headers.items()), "arriero.address": self.connection.getsockname()[0]}
        return super().get_environ() | arrived

    def log_message(self, *_: object) -> None:
        pass


def _server(host: str, port: int) -> _Server:
    """A server that listens. Raises OSError."""
    family, *_, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    kind = type("Server", (_Server,), {"address_family": family})
    server: _Server = kind(address[:2], _Handler)
    return server


def _guarded(app: WSGIApplication, guard: RequestGuard) -> WSGIApplication:
    """The application for requests that the guard lets pass."""

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
    """The host as others reach it: one that listens everywhere goes by its name."""
    if host in ("0.0.0.0", "::", ""):  # noqa: S104 it is compared, not listened on
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host
