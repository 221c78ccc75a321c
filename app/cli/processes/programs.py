"""The programs that `arriero up` starts together, one by one: for a service manager, or a second terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from app.cli.output import settings_of
from app.kernel import addresses
from app.kernel.settings import Settings, environment_of

#: The module that worker programs run. `app` never imports `workers`: it starts them.
WORKERS = "workers.programs"


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


def _become(settings: Settings, module: Sequence[str]) -> NoReturn:
    """Replace this process by `python -m module`, with the settings and the servers' addresses in its environment."""
    servers = addresses.of(settings)
    environment = environment_of(settings) | {
        "ARRIERO_DATABASE_URL": servers.database_url,
        "ARRIERO_REDIS_URL": servers.redis_url,
    }
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", *module], environment)  # noqa: S606 a program of ours
