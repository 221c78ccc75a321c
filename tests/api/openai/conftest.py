"""An API that listens, and a pool with a simulated engine, in this process. Postgres and Valkey are real."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import redis
import uvicorn

from app.api import connections
from app.api.main import serve
from app.api.services import Services
from app.catalog import catalog as catalogs
from app.catalog import files
from app.catalog.catalog import Catalog
from app.devices.inventory import Devices
from app.fleet.pool import PoolPhase
from app.kernel.activity import Activity
from app.kernel.broker import CeleryPublisher
from app.kernel.database import Database
from app.kernel.security.secrets import Secrets
from app.kernel.settings import Settings
from app.memory.conversations.hot import HotConversations
from app.scheduler.operator_commands import OperatorCommands
from app.scheduler.wake_up import AgentCalls
from app.workflows.runs.service import Runs
from workers.engine import Engine
from workers.engine.simulated import SimulatedEngine
from workers.leases import Leases
from workers.pool.direct import DirectRequests
from workers.runtime import Runtime
from workers.token_writer import TokenWriter

#: The catalogue's model that the pool serves.
MODEL = "smollm2:135m"
StartPool = Callable[..., DirectRequests]


#: Models that fall back to that one, or that it falls back to.
_OTHERS = f"""
[[models]]
name = "server:first"
aliases = ["gpt-4o-mini"]
use_cases = ["chat"]
slots = 2
fallback = ["{MODEL}"]
[models.remote]
url = "http://127.0.0.1:1/v1"
model = "m"
allowed = true
cost_in = 2.0
cost_out = 10.0

[[models]]
name = "late:first"
use_cases = ["chat"]
fallback = {{ models = ["{MODEL}"], max_wait = "1s" }}
source = {{ path = "/nowhere/late.gguf" }}

[[models]]
name = "local:first"
use_cases = ["chat"]
fallback = {{ models = ["server:last"], max_wait = "1s" }}
source = {{ path = "/nowhere/local.gguf" }}

[[models]]
name = "eyes:tiny"
use_cases = ["chat", "vision"]
source = {{ path = "/nowhere/eyes.gguf" }}
[models.mmproj]
source = {{ path = "/nowhere/mmproj-eyes.gguf" }}

[[models]]
name = "server:last"
use_cases = ["chat"]
slots = 2
[models.remote]
url = "http://127.0.0.1:1/v1"
model = "m"
allowed = true
"""


def catalog() -> Catalog:
    """The shipped catalogue, whose first model can do everything, with others: engines are simulated, or servers."""
    shipped = files.read_catalog()
    able = shipped.get(MODEL).model_copy(update={"use_cases": ("chat", "embed", "rerank")})
    models = tuple(able if model.name == MODEL else model for model in shipped)
    return catalogs.merge([Catalog(models), catalogs.parse(_OTHERS, "others")])


@pytest.fixture
def settings(database_url: str, redis_url: str, tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path, database_url=database_url, redis_url=redis_url)


@pytest.fixture
def api(settings: Settings, database: Database, publisher: CeleryPublisher, runs: Runs) -> Iterator[str]:
    """The URL of an API that listens."""
    own = Database(database.url, pool_size=8)
    services = Services(
        settings,
        own,
        publisher,
        Runs(own, publisher, runs.policy),
        catalog(),
        Devices(settings.fleet),
        OperatorCommands(own, lambda: None),
    )
    listening = socket.create_server(("127.0.0.1", 0))
    protocol = connections.bounded(1_000, timedelta(seconds=2))
    config = uvicorn.Config(serve(services), log_config=None, timeout_graceful_shutdown=1, http=protocol)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture
def start_pool(
    runs: Runs, settings: Settings, redis_url: str, valkey: redis.Redis, publisher: CeleryPublisher
) -> Iterator[StartPool]:
    """Starts a pool: `slots` and `tokens_per_second` of its engine, or an engine of a model, may be given."""
    started: list[DirectRequests] = []
    pools = settings.pools.model_copy(update={"drain_timeout": timedelta(0)})
    impatient = settings.model_copy(update={"pools": pools})

    def start(
        slots: int = 2, tokens_per_second: float = 500.0, *, model: str = MODEL, engine: Engine | None = None
    ) -> DirectRequests:
        engine = engine or SimulatedEngine(slots, tokens_per_second, timedelta(0))
        leases = Leases(runs, f"pool{len(started)}@here/1/x", interval=timedelta(seconds=1))
        leases.start()
        tokens = TokenWriter(redis_url)
        runtime = Runtime(
            impatient,
            runs,
            leases,
            engine,
            Secrets(settings.data_dir),
            catalog(),
            Activity("redis://127.0.0.1:1"),
            AgentCalls("redis://127.0.0.1:1"),
            tokens=tokens,
            hot=HotConversations(runs.database, publisher, settings.conversations),
        )
        pool = DirectRequests(runtime, tokens, redis_url, catalog().get(model).slug, f"pool{len(started)}")
        pool.on_phase(PoolPhase.SERVING)
        started.append(pool)
        return pool

    yield start
    for pool in started:
        pool.close()
        pool.runtime.close()
