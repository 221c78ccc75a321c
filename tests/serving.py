"""An API that serves, on the database, the broker and the runs of a test."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from app.api.main import serve
from app.api.services import Services
from app.fleet import files
from app.fleet.devices import Devices
from app.fleet.orders import Orders
from app.kernel.broker import CeleryPublisher
from app.kernel.database import Database
from app.kernel.settings import Settings
from app.workflows.service import Runs


def services_of(settings: Settings, database: Database, publisher: CeleryPublisher, runs: Runs) -> Services:
    """What its endpoints stand on; nobody is nudged by an order."""
    return Services(
        settings,
        database,
        publisher,
        runs,
        files.read_catalog(),
        Devices(settings.fleet),
        Orders(database, lambda: None),
    )


@contextmanager
def served(services: Services) -> Iterator[str]:
    """Its address, while the block runs."""
    # Without its life, whose end would close the database of the session.
    server = uvicorn.Server(uvicorn.Config(serve(services), port=0, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        thread.join(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()
