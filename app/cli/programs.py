"""The programs that `arriero up` starts together, one by one: for a service manager, or a second terminal."""

from __future__ import annotations

import os
import platform
import socket
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Annotated, NoReturn

import typer

from app.cli.output import console, print_json, settings_of
from app.kernel import addresses, log
from app.kernel.settings import Settings, environment_of

#: The module that worker programs run. `app` never imports `workers`: it starts them.
WORKERS = "workers.programs"


def api(
    context: typer.Context,
    fd: Annotated[int, typer.Option(hidden=True, help="The descriptor of a socket that listens already.")] = -1,
) -> None:
    """
    Serve the HTTP API, until SIGTERM.

    Any number may run, on any hosts, over one database and one broker. The address is set by api.host and api.port.
    """
    # Loaded here: they take longer than all other commands together.
    import uvicorn

    from app.api.main import create_app

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


def control(
    context: typer.Context,
    name: Annotated[str, typer.Option(help="The worker's name; unique on its host.")] = "control",
) -> None:
    """
    Run a control worker: scheduled jobs, and steps that need no model.

    Any number may run, on any hosts. SIGTERM lets it finish what it holds.
    """
    _become(settings_of(context), [WORKERS, "control", name])


def beat(context: typer.Context) -> None:
    """
    Run the clock of the scheduled jobs.

    A second one stands by: a lock in the broker lets one of them tick.
    """
    _become(settings_of(context), [WORKERS, "beat"])


def agent(context: typer.Context) -> None:
    """
    Run the agent of this host: it offers the host's devices, and starts and stops the pools that are placed there.

    One runs on each host; fleet.host names the host. SIGTERM lets its pools finish what they hold, within
    pools.drain_timeout; what is not finished goes back. When it is killed, its pools go on, and the next one on the
    same data directory takes them over.
    """
    _become(settings_of(context), [WORKERS, "agent"])


def flower(context: typer.Context) -> None:
    """
    Run Flower, the page that watches the Celery workers.

    It listens on flower.host and flower.port. What it knows is kept in memory and begins anew with it;
    the durable story of every step is in `arriero runs show`.
    """
    _become(settings_of(context), [WORKERS, "flower"])


def print_version(version: str, *, as_json: bool) -> None:
    """The versions that a report of a fault needs."""
    parts = {
        "arriero": version,
        "python": platform.python_version(),
        "llama-cpp-python": metadata.version("llama-cpp-python"),
        "celery": metadata.version("celery"),
        "platform": platform.platform(),
    }
    if as_json:
        print_json(parts)
        return
    for name, value in parts.items():
        console().print(f"{name} {value}")


def _become(settings: Settings, module: Sequence[str]) -> NoReturn:
    """Replace this process by `python -m module`, with the settings and the servers' addresses in its environment."""
    servers = addresses.of(settings)
    environment = environment_of(settings) | {
        "ARRIERO_DATABASE_URL": servers.database_url,
        "ARRIERO_REDIS_URL": servers.redis_url,
    }
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", *module], environment)  # noqa: S606 a program of ours
