"""`arriero api`: the HTTP API as a server process."""

from __future__ import annotations

import socket
from typing import Annotated

import typer
import uvicorn

from app.api.connections import TimedProtocol
from app.api.main import create_app
from app.cli.output import settings_of
from app.kernel import log
from app.kernel.processes.listening import listen


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
    host, port = settings.api.host, settings.api.port
    listener = socket.socket(fileno=fd) if fd >= 0 else listen("api", host, port, "api.port")
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(settings, instance or None),
            log_config=None,
            access_log=settings.log.level == "debug",
            timeout_graceful_shutdown=5,
            http=TimedProtocol,
        )
    )
    server.run(sockets=[listener])
    if not server.started:
        raise typer.Exit(5)
