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


def api(
    context: typer.Context,
    fd: Annotated[int, typer.Option(hidden=True, help="The descriptor of a listening socket.")] = -1,
) -> None:
    """
    Serve the HTTP API, until SIGTERM.

    Any number can run, on any hosts, with the same database and broker. api.host and api.port set the address.
    """
    settings = settings_of(context)
    log.configure(settings.log)
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(settings),
            host=settings.api.host,
            port=settings.api.port,
            log_config=None,
            access_log=settings.log.level == "debug",
            timeout_graceful_shutdown=5,
            http=TimedProtocol,
        )
    )
    server.run(sockets=[socket.socket(fileno=fd)] if fd >= 0 else None)
    if not server.started:
        raise typer.Exit(5)
