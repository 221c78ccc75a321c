"""`arriero control`, `beat`, `flower`: single programs of `arriero up`, for service managers."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from app.cli.output import settings_of
from app.kernel import addresses
from app.kernel.settings import Settings, environment_of

#: The module of the worker programs, by name: `app` never imports `workers`.
WORKERS = "workers.programs"


def control(
    context: typer.Context,
    name: Annotated[str, typer.Option(help="The worker's name; unique on its host.")] = "control",
) -> None:
    """
    Run a control worker: scheduled jobs, and steps that need no model.

    Any number can run, on any hosts. On SIGTERM it finishes its running steps.
    """
    become(settings_of(context), [WORKERS, "control", name])


def beat(context: typer.Context) -> None:
    """
    Run beat, which triggers the scheduled jobs.

    Several can run: a lock in the broker elects one, the others stand by.
    """
    become(settings_of(context), [WORKERS, "beat"])


def flower(
    context: typer.Context,
    fd: Annotated[int, typer.Option(hidden=True, help="The descriptor of a listening socket.")] = -1,
) -> None:
    """
    Run Flower, the web page that shows the Celery workers.

    It listens on flower.host and flower.port. Its data is in memory and is lost when it ends; `arriero runs show`
    prints the durable history of every step.
    """
    become(settings_of(context), [WORKERS, "flower", *([str(fd)] if fd >= 0 else [])])


def become(settings: Settings, module: Sequence[str]) -> NoReturn:
    """Replace this process by `python -m module`, with the settings and the servers' addresses in its environment."""
    servers = addresses.of(settings)
    environment = environment_of(settings) | {
        "ARRIERO_DATABASE_URL": servers.database_url,
        "ARRIERO_REDIS_URL": servers.redis_url,
    }
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-P", "-m", *module], environment)  # noqa: S606 the program is part of this project
