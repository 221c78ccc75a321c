"""`arriero api`: the HTTP API as a server process."""

from __future__ import annotations

import asyncio
import gc
import math
import socket
from typing import Annotated

import typer
import uvicorn
from fastapi import FastAPI

from app.api import connections
from app.api.main import create_app
from app.cli.output import settings_of
from app.kernel import log, tracing
from app.kernel.processes.listening import listen
from app.kernel.security import tls
from app.kernel.security.tls import ServerCertificate
from app.kernel.settings import Settings

#: Seconds between two looks whether the server has to end; the date header has whole seconds.
_TICK_SECONDS = 0.5


#: Ticks between two looks whether the files of the certificate have changed.
_CERTIFICATE_TICKS = 10


class ApiServer(uvicorn.Server):
    """uvicorn's server, which looks less often whether it has to end: an idle API costs a tenth of a percent less."""

    def __init__(self, config: uvicorn.Config, certificate: ServerCertificate | None = None) -> None:
        super().__init__(config)
        self._certificate = certificate

    async def main_loop(self) -> None:
        """Renew the date header and a replaced certificate, and return when the server has to end."""
        ticks = 0
        while not await self.on_tick(0):
            await asyncio.sleep(_TICK_SECONDS)
            ticks += 1
            if self._certificate is not None and ticks % _CERTIFICATE_TICKS == 0:
                self._certificate.refresh()


def server_of(app: FastAPI, settings: Settings) -> ApiServer:
    """Return the server of the application, with the bounds on its connections. Raises InvalidSettings."""
    certificate = tls.certificate_of(settings.api)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=settings.log.level == "debug",
        timeout_graceful_shutdown=5,
        timeout_keep_alive=math.ceil(settings.api.keep_alive.total_seconds()),
        http=connections.bounded(settings.api.max_connections, settings.api.write_timeout),
        h11_max_incomplete_event_size=connections.MAX_HEAD,
        proxy_headers=False,  # uvicorn believes every program of this machine: app/api/proxies.py decides
        server_header=False,
        ssl_context_factory=None if certificate is None else lambda *_: certificate.context,
    )
    return ApiServer(config, certificate)


def api(
    context: typer.Context,
    fd: Annotated[int, typer.Option(hidden=True, help="The descriptor of a listening socket.")] = -1,
    instance: Annotated[str, typer.Option(hidden=True, help="The id of this start, for its health checks.")] = "",
) -> None:
    """
    Serve the HTTP API, until SIGTERM.

    Any number can run, on any hosts, with the same database and broker. api.host and api.port set the address.
    """
    settings = settings_of(context)
    log.configure(settings.log)
    tracing.start(settings, "api")
    host, port = settings.api.host, settings.api.port
    listener = socket.socket(fileno=fd) if fd >= 0 else listen("api", host, port, "api.port")
    server = server_of(create_app(settings, instance or None), settings)
    # What lives as long as the process is not looked at again: a full pass of the garbage collector took 180 ms.
    gc.collect()
    gc.freeze()
    server.run(sockets=[listener])
    if not server.started:
        raise typer.Exit(5)
