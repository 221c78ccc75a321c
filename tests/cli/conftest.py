"""Fixtures for tests of the command: an API on the real database and broker, and the command with its URL."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn
from click.testing import Result
from typer.testing import CliRunner

from app.api.main import serve
from app.api.services import Services
from app.catalog import files
from app.cli import app
from app.devices.inventory import Devices
from app.kernel.broker import CeleryPublisher
from app.kernel.database import Database
from app.kernel.settings import Settings
from app.scheduler.operator_commands import OperatorCommands
from app.workflows.runs.service import Runs

#: Runs the command with these arguments. It raises errors of the command, and checks that the exit code is `exits`.
Arriero = Callable[..., Result]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """The settings of the API."""
    return Settings(data_dir=tmp_path)


@pytest.fixture
def arriero(database: Database, publisher: CeleryPublisher, runs: Runs, settings: Settings) -> Iterator[Arriero]:
    """The command, with the URL of an API."""
    commands = OperatorCommands(database, lambda: None)
    catalog = files.read_catalog(settings.catalog.files)
    services = Services(settings, database, publisher, runs, catalog, Devices(settings.fleet), commands)
    with serving(services) as url:

        def run(*arguments: str | Path, exits: int = 0) -> Result:
            line = ["--set", f"api.url={url}", *(str(argument) for argument in arguments)]
            result = CliRunner().invoke(app, line)
            if result.exception is not None and not isinstance(result.exception, SystemExit):
                raise result.exception
            assert result.exit_code == exits, result.output
            return result

        yield run


@contextmanager
def serving(services: Services) -> Iterator[str]:
    """Yield the URL of a listening API. It runs without its lifespan, whose end would close the session's database."""
    server = uvicorn.Server(uvicorn.Config(serve(services), port=0, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        thread.join(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
