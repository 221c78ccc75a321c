"""
Real servers for the whole session, clean for each test.

With pytest-xdist each worker is a session: it has servers, ports and folders of its own.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import partialmethod
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
import redis
import structlog
from fastapi.testclient import TestClient
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from sqlalchemy import text
from sqlmodel import SQLModel
from xdist.scheduler import LoadFileScheduling

from app.access import key_rows  # noqa: F401 they enter the metadata
from app.access.agents import rows as agent_rows  # noqa: F401 they enter the metadata
from app.access.audit import rows as audit_rows  # noqa: F401 they enter the metadata
from app.access.limits import rows as limit_rows  # noqa: F401 as above
from app.files import rows as file_rows  # noqa: F401 they enter the metadata
from app.fleet import rows as fleet_rows  # noqa: F401 they enter the metadata
from app.governance.actions import rows as action_rows  # noqa: F401 as above
from app.governance.alerts import rows as alert_rows  # noqa: F401 as above
from app.governance.costs import rows as cost_rows  # noqa: F401 as above
from app.governance.jobs import rows as job_rows  # noqa: F401 as above
from app.governance.probes import rows as probe_rows  # noqa: F401 as above
from app.governance.rules import rows as rule_rows  # noqa: F401 as above
from app.governance.signals import rows as signal_rows  # noqa: F401 as above
from app.handoffs import rows as handoff_rows  # noqa: F401 as above
from app.handoffs.mail import rows as mail_rows  # noqa: F401 as above
from app.inference.batches import rows as batch_rows  # noqa: F401 as above
from app.inference.model_metrics import rows as metric_rows  # noqa: F401 as above
from app.inference.prediction import rows as prediction_rows  # noqa: F401 as above
from app.kernel import broker, embedded
from app.kernel.broker import CeleryPublisher
from app.kernel.database import Database
from app.kernel.live import rows as setting_rows  # noqa: F401 as above
from app.kernel.postgres import schema_floor  # noqa: F401 as above
from app.kernel.processes.process import end_leftovers
from app.kernel.sections.servers import BrokerSettings
from app.memory.blocks import rows as block_rows  # noqa: F401 as above
from app.memory.consolidation import rows as consolidation_rows  # noqa: F401 as above
from app.memory.conversations import rows as conversation_rows  # noqa: F401 as above
from app.memory.memories import rows as memory_rows  # noqa: F401 as above
from app.memory.personal import rows as context_rows  # noqa: F401 as above
from app.memory.recall import rows as recall_rows  # noqa: F401 as above
from app.workflows.runs.changes.transactions import RunPolicy
from app.workflows.runs.service import Runs
from app.workflows.runs.storage import rows  # noqa: F401 as above

# Until all is collected there is no garbage, and each look for it takes longer than the one before.
gc.disable()

# A shell's background job begins with SIGINT ignored, one of nohup with SIGHUP, and so would every process of a test.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Requests of tests come from this machine, as those of a user do. The name that Starlette gives is no address.
TestClient.__init__ = partialmethod(TestClient.__init__, client=("127.0.0.1", 50000))  # type: ignore[method-assign] # the client of all tests has this address

# How long an example takes says more about what else the machine does than about the code.
hypothesis_settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
hypothesis_settings.load_profile("suite")

#: Nothing of the caller's environment may decide how a test ends.
for name in [name for name in os.environ if name.startswith("ARRIERO_")]:
    del os.environ[name]

#: Folders whose tests run worker programs, and fixtures that tests of a real model ask for: both take long.
SLOW_FOLDERS = ("live", "faults")
SLOW_FIXTURES = frozenset({"model_path", "gemma_path"})
#: Files of tests/live with an installation of their own.
OWN_TREE = ("tests/live/test_access.py", "tests/live/test_fuzz.py")
#: The file of tests/faults whose tests share an installation.
SHARING = "tests/faults/test_governance_stories.py"
#: The parts of the suite that take longest, the longest first. Workers begin with them, so that none ends alone.
LONGEST = ("live", "faults", "cli", "workers", "kernel", "workflows")
#: Seconds for a slow test, on a machine that does much else. Each of its conditions has a deadline of its own.
SLOW_TIMEOUT = 1200
#: The tables that have pages, and their bytes.
_FILLED = text("""
    SELECT relname, pg_relation_size(oid) AS bytes FROM pg_class
    WHERE relkind = 'r' AND relname = ANY(:tables) AND pg_relation_size(oid) > 0
""")
#: Most bytes of a table that is emptied by DELETE. The planner takes each new table of up to ten pages for one of ten.
_SMALL = 8 * 8192
#: Memory that a worker of pytest-xdist and the processes of its test take, in bytes.
WORKER_BYTES = 2 * 2**30


class Scheduling(LoadFileScheduling):
    """
    A file goes to one worker, because its tests share fixtures; those of faults, but for `SHARING`, go one by one.

    The files that share one `arriero up` go to one worker together: another one would start its own.
    """

    def _split_scope(self, nodeid: str) -> str:
        if nodeid.startswith("tests/faults/") and not nodeid.startswith(SHARING):
            return nodeid
        file = str(super()._split_scope(nodeid))
        return "tests/live" if file.startswith("tests/live/") and file not in OWN_TREE else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    return Scheduling(config, log)


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what is slow, and let workers begin with what takes longest."""
    for item in items:
        if _folder(item) in SLOW_FOLDERS or SLOW_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT))
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: LONGEST.index(folder) if (folder := _folder(item)) in LONGEST else len(LONGEST))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What was imported and collected stays: no look for garbage visits it again."""
    gc.freeze()
    gc.enable()


def _folder(item: pytest.Item) -> str:
    return item.path.relative_to(Path(__file__).parent).parts[0]


def pytest_xdist_auto_num_workers() -> int:
    """One for each core and one more, because tests wait for processes; fewer where memory is short."""
    return max(1, min((psutil.cpu_count() or 1) + 1, psutil.virtual_memory().available // WORKER_BYTES))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """End the processes of a worker that crashed, as one does when a test hangs: nobody else would."""
    config = session.config
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        folder: Path = config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined] # it has no other name
        for place in {file.parent for file in folder.rglob("*.pid")}:
            end_leftovers(place)


@pytest.fixture(autouse=True)
def _logs() -> Iterator[None]:
    """A test that configures logs, as every command does, does so for itself alone."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    if structlog.is_configured():
        structlog.reset_defaults()
        logging.captureWarnings(capture=False)
    root.handlers[:] = handlers
    root.setLevel(level)


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
    with psycopg.connect(database_url.replace("+psycopg", ""), autocommit=True) as connection:
        for name in ("fsync", "full_page_writes", "synchronous_commit"):  # no test cuts the power
            connection.execute(f"ALTER SYSTEM SET {name} = off")
        connection.execute("SELECT pg_reload_conf()")
    made = Database(database_url, pool_size=8)
    made.upgrade()
    yield made
    made.close()


@pytest.fixture
def database(migrated: Database) -> Database:
    """
    The database, at head and empty.

    Only what has pages is emptied: TRUNCATE makes new files for each table and index, which takes ten times as long.
    """
    with migrated.work() as work:
        filled = {row.relname: row.bytes for row in work.rows(_FILLED, {"tables": list(SQLModel.metadata.tables)})}
        if any(bytes_ > _SMALL for bytes_ in filled.values()):
            work.run(text(f"TRUNCATE {', '.join(SQLModel.metadata.tables)}"))
        else:
            for table in reversed(SQLModel.metadata.sorted_tables):
                if table.name in filled:
                    work.execute(text(f"DELETE FROM {table.name}"))
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
    return Runs(database, publisher, RunPolicy(timedelta(seconds=15), max_worker_losses=3, chance=lambda: 0.5))
