from __future__ import annotations

from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.api.main import serve
from app.api.services import Services
from app.catalog import files
from app.devices.inventory import Devices
from app.kernel.broker import CeleryPublisher
from app.kernel.database import Database
from app.kernel.sections.servers import ApiSettings
from app.kernel.settings import Settings
from app.scheduler.operator_commands import OperatorCommands
from app.workflows.runs.service import Runs


@pytest.fixture
def services(database: Database, publisher: CeleryPublisher, runs: Runs, tmp_path: Path) -> Services:
    settings = Settings(data_dir=tmp_path, api=ApiSettings(max_body_bytes=64 * 1024))
    return Services(
        settings,
        database,
        publisher,
        runs,
        files.read_catalog(),
        Devices(settings.fleet),
        OperatorCommands(database, lambda: None),
    )


@pytest.fixture
def client(services: Services) -> TestClient:
    """A client of the API with a real database and broker. Internal errors are answers and not exceptions."""
    # Not entered: the end of its lifespan would close the database of the session.
    return TestClient(serve(services), base_url="http://localhost", raise_server_exceptions=False)
