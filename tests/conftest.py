"""Real servers for the whole session, clean for each test."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import redis
from sqlalchemy import text
from sqlmodel import SQLModel

from app.fleet import rows as fleet_rows  # noqa: F401 they enter the metadata
from app.kernel import broker, embedded
from app.kernel.broker import CeleryPublisher
from app.kernel.database import Database
from app.kernel.settings import BrokerSettings
from app.workflows import rows  # noqa: F401 as above
from app.workflows.service import Runs

# A shell's background job begins with SIGINT ignored, and so would every process that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

#: Nothing of the caller's environment may decide how a test ends.
for name in [name for name in os.environ if name.startswith("ARRIERO_")]:
    del os.environ[name]


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[embedded.Servers]:
    """Postgres and Valkey, embedded, for the session."""
    path: Path = tmp_path_factory.mktemp("servers")
    with embedded.DataDirectory(path, now=datetime.now(UTC), command="pytest") as held, embedded.started(held) as made:
        yield made


@pytest.fixture(scope="session")
def database_url(servers: embedded.Servers) -> str:
    assert servers.postgres is not None
    return servers.postgres.url


@pytest.fixture(scope="session")
def redis_url(servers: embedded.Servers) -> str:
    assert servers.valkey is not None
    return servers.valkey.url


@pytest.fixture(scope="session")
def migrated(database_url: str) -> Iterator[Database]:
    made = Database(database_url, pool_size=8)
    made.upgrade()
    yield made
    made.close()


@pytest.fixture
def database(migrated: Database) -> Database:
    """The database, at head and empty."""
    with migrated.work() as work:
        work.run(text(f"TRUNCATE {', '.join(SQLModel.metadata.tables)}"))
    return migrated


@pytest.fixture
def valkey(redis_url: str) -> Iterator[redis.Redis]:
    """The broker, empty."""
    client = redis.Redis.from_url(redis_url, protocol=2, decode_responses=True)
    client.flushdb()
    yield client
    client.close()


@pytest.fixture
def publisher(valkey: redis.Redis, redis_url: str) -> Iterator[CeleryPublisher]:
    made = CeleryPublisher(broker.celery_app(redis_url, BrokerSettings()), redis_url)
    yield made
    made.close()


@pytest.fixture
def runs(database: Database, publisher: CeleryPublisher) -> Runs:
    return Runs(database, publisher, lease=timedelta(seconds=15), max_worker_losses=3, chance=lambda: 0.5)
