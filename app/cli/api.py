"""`arriero api`: the HTTP API as a program of its own."""

from __future__ import annotations

import socket
from typing import Annotated

import typer
import uvicorn

from app.api.main import create_app
from app.cli.output import settings_of
from app.kernel import log


def api(
    context: typer.Context,
    fd: Annotated[int, typer.Option(hidden=True, help="The descriptor of a socket that listens already.")] = -1,
) -> None:
    """
    Serve the HTTP API, until SIGTERM.

    Any number may run, on any hosts, over one database and one broker. The address is set by api.host and api.port.
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
        )
    )
    server.run(sockets=[socket.socket(fileno=fd)] if fd >= 0 else None)
    if not server.started:
        raise typer.Exit(5)
