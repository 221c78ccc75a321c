"""
The Flower program: Flower behind the request guard of the API, which refuses pages of other sites, and behind its keys.

Flower shows and controls workers, so its port needs the same guard and the same keys as the API
(`workers/monitoring/`). Flower's own options (`FLOWER_…` variables, `flowerconfig.py`) work as they do for
`celery flower`, except that keys take the place of `FLOWER_UNAUTHENTICATED_API`.
"""

from __future__ import annotations

import atexit
import json
import signal
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar
from uuid import UUID

from flower import command
from flower.app import Flower
from flower.options import options
from flower.urls import settings as flower_settings
from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPServerRequest
from tornado.ioloop import PeriodicCallback
from tornado.web import RequestHandler

from app.access import keyless
from app.catalog.live import LiveCatalog
from app.kernel import addresses, broker, log
from app.kernel.broker import CeleryPublisher
from app.kernel.database import Database
from app.kernel.errors import Problem, Unavailable
from app.kernel.processes.listening import listen, port_of
from app.kernel.security import request_guard
from app.kernel.security.request_guard import RequestGuard, guard_of
from app.kernel.settings import Settings
from app.workflows.runs.changes.transactions import RunPolicy
from app.workflows.runs.service import Runs
from workers.application import Application
from workers.monitoring.access import FlowerAccess
from workers.monitoring.handlers import with_keys

_log = log.get(__name__)

T = TypeVar("T")

#: Time for an answer of the database.
_ANSWER_TIMEOUT = timedelta(seconds=5)
#: Seconds without a request after which a Flower that is started on demand ends.
_UNUSED_SECONDS = 600.0
#: Arriero configures the logs. The buckets fit steps, which run for 0.1 s up to minutes.
_OPTIONS = ("--logging=none", "--task_runtime_metric_buckets=0.1,1,10,60,600")


class GuardedFlower(Flower):  # type: ignore[misc] # Flower has no type hints
    """Flower behind a request guard."""

    def __init__(self, guard: RequestGuard, settings: Settings, **more: Any) -> None:
        self._guard, self._settings = guard, settings
        servers = addresses.of(settings)
        self.database = Database(servers.database_url, pool_size=2, answer_timeout=_ANSWER_TIMEOUT)
        self.catalogs = LiveCatalog(settings)
        self.access = FlowerAccess(settings, self.database, options.url_prefix or "")
        publisher = CeleryPublisher(broker.celery_app(servers.redis_url, settings.broker), servers.redis_url)
        self._runs = Runs(self.database, publisher, RunPolicy.of(settings.runs))
        self._requested = time.monotonic()
        super().__init__(**more)

    def serve_on(self, listener: socket.socket) -> None:
        """Serve on a listening socket, as `start_http_server` does on an address."""
        server = HTTPServer(self, ssl_options=self.ssl_options, xheaders=self.options.xheaders)
        listener.setblocking(False)
        server.add_socket(listener)

    def get_handler_delegate(
        self, request: HTTPServerRequest, target_class: type[RequestHandler], *arguments: Any, **more: Any
    ) -> Any:
        """As Tornado's, with the handler that checks the caller first."""
        checked = target_class if target_class is _Refusal else with_keys(target_class)
        return super().get_handler_delegate(request, checked, *arguments, **more)

    async def on_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """Return the result of a function that blocks."""
        result: T = await self.io_loop.run_in_executor(None, function, *arguments)
        return result

    def in_background(self, function: Callable[..., object], *arguments: Any) -> None:
        """Call a function that blocks, and log what it raises."""

        async def call() -> None:
            try:
                await self.on_thread(function, *arguments)
            except Unavailable as error:
                _log.warning("flower_change_not_audited", error=str(error))

        self.io_loop.add_callback(call)

    def cancel(self, run: UUID) -> str:
        """Cancel a run, and return its state. Raises NotFound, Unavailable."""
        return str(self._runs.cancel(run, message="cancelled in Flower"))

    def api_url(self, host: str) -> str:
        """Return the address of the API, for who reached Flower under this host name."""
        api = self._settings.api
        if api.url:
            return api.url.rstrip("/")
        name = host if api.host in ("0.0.0.0", "::") or keyless.is_loopback(api.host) else api.host  # noqa: S104 it is compared, nothing listens there
        shown = f"[{name}]" if ":" in name and not name.startswith("[") else name
        return f"{'https' if api.tls_certificate else 'http'}://{shown}:{api.port}"

    def end_when_unused(self) -> None:
        """End when nobody has used it for long; workers then send no more events."""

        def check() -> None:
            if time.monotonic() - self._requested > _UNUSED_SECONDS:
                _log.info("flower_unused", seconds=_UNUSED_SECONDS)
                self.capp.control.disable_events()
                self.io_loop.stop()

        PeriodicCallback(check, _UNUSED_SECONDS * 1000 / 10).start()

    def find_handler(self, request: HTTPServerRequest, **more: Any) -> Any:
        """Return the handler of a request: Flower's own, or the one that refuses."""
        self._requested = time.monotonic()
        refusal = self._guard.refuse(request.method or "", request.headers.get_all(), _local_address(request))
        if refusal is not None:
            return self.get_handler_delegate(request, _Refusal, {"refusal": refusal})
        return super().find_handler(request, **more)


class _Refusal(RequestHandler):
    """A handler that answers every method with the reason of the refusal, before it reads cookies or the body."""

    def initialize(self, refusal: Problem) -> None:
        self._refusal = refusal

    def check_xsrf_cookie(self) -> None:
        """Do nothing: a refusal changes nothing, so it needs no check."""

    def prepare(self) -> None:
        self.set_status(request_guard.STATUS)
        self.set_header("Content-Type", request_guard.MEDIA_TYPE)
        self.finish(json.dumps(request_guard.problem_document(self._refusal)))


def run(settings: Settings, descriptor: int | None = None) -> int:
    """
    Serve Flower until SIGTERM. Returns the exit code.

    With the listening socket of a parent, as a descriptor, it also ends when it was not used for some minutes: the
    parent starts it again for the next client.

    Raises ServerNotStarted when its port is in use.
    """
    host, port = settings.flower.host, settings.flower.port
    command.apply_env_options()
    command.apply_options(sys.argv[0], [f"--address={host}", f"--port={port}", *_OPTIONS])
    command.extract_settings()
    command.setup_logging()
    guard = guard_of(host, settings.trusted_hosts)
    flower = GuardedFlower(guard, settings, capp=Application(settings).celery, options=options, **flower_settings)
    atexit.register(flower.stop)
    signal.signal(signal.SIGTERM, command.sigterm_handler)
    if options.unix_socket:
        flower.start_http_server()
        _log.info("flower_listening", unix_socket=options.unix_socket)
    else:
        listener = (
            listen("flower", host, port, "flower.port") if descriptor is None else socket.socket(fileno=descriptor)
        )
        flower.serve_on(listener)
        if descriptor is not None:
            flower.end_when_unused()
            # At once, and not after five seconds: somebody is looking.
            flower.io_loop.add_callback(flower.events.on_enable_events)
        _log.info("flower_listening", address=host, port=port_of(listener))
    try:
        flower.start()
    except (KeyboardInterrupt, SystemExit):
        return 0
    return 0


def _local_address(request: HTTPServerRequest) -> str | None:
    """Return the local address of the request's connection; None for a Unix socket."""
    stream = getattr(request.connection, "stream", None)
    address = stream.socket.getsockname() if stream is not None and stream.socket is not None else None
    return str(address[0]) if isinstance(address, tuple) else None
