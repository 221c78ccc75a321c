from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from fastapi import FastAPI
from mcp.client.client import Client

from app.api.main import serve as serve_api
from app.api.services import Services
from app.catalog import files
from app.devices.inventory import Devices
from app.kernel.broker import CeleryPublisher
from app.kernel.database import Database
from app.kernel.sections.servers import ApiSettings
from app.kernel.settings import Settings
from app.mcp_server.api import Api
from app.mcp_server.server import serve
from app.scheduler.operator_commands import OperatorCommands
from app.workflows.runs.service import Runs

Connect = Callable[[], Client]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def services(database: Database, publisher: CeleryPublisher, runs: Runs, tmp_path: Path) -> Services:
    settings = Settings(data_dir=tmp_path, api=ApiSettings(max_body_bytes=64 * 1024))
    devices, commands = Devices(settings.fleet), OperatorCommands(database, lambda: None)
    return Services(settings, database, publisher, runs, files.read_catalog(), devices, commands)


@pytest.fixture
def app(services: Services) -> FastAPI:
    """The API with a real database and broker, and without workers: what is started waits."""
    return serve_api(services)


@pytest.fixture
def connected(app: FastAPI) -> Connect:
    """A factory of official clients that are connected to a server of their own, as the local caller."""

    def make() -> Client:
        def api() -> Api:
            transport = httpx2.ASGITransport(app=app, client=("127.0.0.1", 1), raise_app_exceptions=False)
            return Api(httpx2.AsyncClient(transport=transport, base_url="http://localhost"))

        return Client(serve(lambda _: api()))

    return make
