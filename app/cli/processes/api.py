"""`arriero api`: the HTTP API as a server process."""

from __future__ import annotations

import asyncio
import socket
from typing import Annotated

import typer
import uvicorn

from app.api.connections import TimedProtocol
from app.api.main import create_app
from app.cli.output import settings_of
from app.kernel import log
from app.kernel.processes.listening import listen

#: Seconds between two looks whether the server has to end; the date header has whole seconds.
_TICK_SECONDS = 0.5


class ApiServer(uvicorn.Server):
    """uvicorn's server, which looks less often whether it has to end: an idle API costs a tenth of a percent less."""

    async def main_loop(self) -> None:
        """Renew the date header, and return when the server has to end."""
        while not await self.on_tick(0):
            await asyncio.sleep(_TICK_SECONDS)


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
    server = ApiServer(
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
