"""
The exporter: the Prometheus metrics of a worker process, on an HTTP port of its own.

Each metric is read where it is counted, at a scrape; nothing is counted twice, and work does not become slower.
Pages of other sites are refused, as in the API; the connection of a silent client is closed.
The address is written to a file for Prometheus's service discovery (`file_sd_configs`), and removed with the process.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app
from prometheus_client.registry import Collector

from app.fleet.pool import METRICS_FOLDER
from app.kernel import log
from app.kernel.processes.listening import listen
from app.kernel.security import request_guard
from app.kernel.security.request_guard import RequestGuard
from app.kernel.settings import Settings
from workers.telemetry.work import WorkCollector

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication

_log = log.get(__name__)

#: Seconds after which the connection of a silent client is closed.
_TIMEOUT = 10


@dataclass(frozen=True, slots=True)
class ExporterAddress:
    """Where an exporter listens."""

    host: str
    #: 0 chooses a free one.
    port: int
    #: The setting of the port, for errors.
    setting: str
    #: Where the address is written for service discovery.
    data_dir: Path
    trusted_hosts: tuple[str, ...] = ()


@contextmanager
def serving(name: str, collectors: Iterable[Collector], at: ExporterAddress) -> Iterator[None]:
    """
    Serve what the collectors collect until the block ends, and write the address to a file below `data_dir`.

    Requests for other host names than this host's are refused, except for `trusted_hosts`.
    Raises ServerNotStarted when it cannot listen on the port.
    """
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    ProcessCollector(registry=registry)
    server = _Server(listen("the exporter of metrics", at.host, at.port, at.setting))
    guard = request_guard.guard_of(at.host, at.trusted_hosts)
    server.set_app(_guarded(make_wsgi_app(registry), guard))
    thread = threading.Thread(target=server.serve_forever, name="exporter", daemon=True)
    thread.start()
    file = at.data_dir / METRICS_FOLDER / f"{name}.json"
    try:
        address = f"{_reachable(at.host)}:{server.server_port}"
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix(".new")
        fresh.write_text(json.dumps([{"targets": [address], "labels": {"job": "arriero"}}]) + "\n", encoding="utf-8")
        fresh.replace(file)
        _log.info("metrics_served", address=address, file=str(file))
        yield
    finally:
        file.unlink(missing_ok=True)
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def of_control_worker(name: str, settings: Settings) -> Iterator[WorkCollector]:
    """Serve the metrics of a control worker until the block ends. Raises ServerNotStarted."""
    collector = WorkCollector({"worker": f"{name}@{socket.gethostname()}"})
    at = settings.control
    address = ExporterAddress(
        at.metrics_host, at.metrics_port, "control.metrics_port", settings.data_dir, settings.trusted_hosts
    )
    with serving(name, [collector], address):
        yield collector


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
