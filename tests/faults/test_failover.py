"""
A platform whose Postgres or Valkey is killed for good, while a replica takes its place: its runs go on.

The replicas are real ones: a standby that streams from the primary and is promoted, a Valkey that follows another one.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import httpx2
import psycopg
import pytest
from sqlalchemy import text

from app.kernel.database import Database, open_at_head
from app.kernel.embedded import PostgresServer, ValkeyServer
from app.kernel.embedded.endpoint import free_port
from app.kernel.embedded.postgres import DATABASE, ROLE
from app.kernel.errors import DatabaseUnreachable, UnfitPooler
from app.kernel.postgres import address, pooler
from tests.faults import installation
from tests.faults.conftest import ROOT, assert_nothing_left, show_section, until
from tests.faults.fleets import ALPHA, BETA
from tests.faults.installation_chaos import SETTINGS
from tests.faults.replicas import Standby, promote_valkey, valkey_replica
from tests.faults.storm.proxy import Proxy

pytestmark = pytest.mark.storm

RUN = {
    "definition": {
        "workflow": "failover",
        "steps": [
            {"id": "first", "kind": "generate", "model": ALPHA, "prompt": "x", "max_tokens": 4},
            {
                "id": "second",
                "needs": ["first"],
                "kind": "generate",
                "model": BETA,
                "prompt": "{{ steps.first.output }}",
                "max_tokens": 4,
            },
        ],
    }
}
PATIENCE = 120.0
_RECORDED = text("""
    SELECT (SELECT count(*) FROM step WHERE run_id = ANY(:runs) AND state = 'succeeded') AS steps,
           (SELECT count(*) FROM attempt JOIN step ON step.id = step_id
            WHERE run_id = ANY(:runs) AND outcome = 'succeeded') AS attempts
""")


@dataclass
class Platform:
    """`arriero up` on a pair of servers each."""

    up: subprocess.Popen[bytes]
    data: Path
    database: Database
    #: The API to ask; by default that of `up`.
    url: str = ""

    def __post_init__(self) -> None:
        self.url = self.url or installation.api_url(self.data)

    def submit(self) -> UUID | None:
        """Submit a run; None when the API cannot take it now."""
        try:
            answer = httpx2.post(f"{self.url}/v1/runs", json=RUN, timeout=10, trust_env=False)
        except httpx2.HTTPError:
            return None
        if answer.status_code >= 500:
            return None
        assert answer.status_code == 202, answer.text
        return UUID(answer.json()["id"])

    def state(self, run_id: UUID) -> str:
        """The state of a run, as the API says; empty when it cannot say."""
        try:
            url = f"{self.url}/v1/runs/{run_id}"
            answer = httpx2.get(url, timeout=10, trust_env=False)
        except httpx2.HTTPError:
            return ""
        assert answer.status_code != 404, "an accepted run is lost"
        return str(answer.json()["state"]) if answer.status_code == 200 else ""

    def await_end(self, run_id: UUID) -> None:
        """Wait until a run has succeeded."""
        until(lambda: self.state(run_id) == "succeeded", PATIENCE)

    def assert_each_step_is_recorded_once(self, runs: list[UUID]) -> None:
        """All steps succeeded, each by one attempt."""
        with self.database.work() as work:
            row = work.rows(_RECORDED, {"runs": runs})[0]
        assert (row.steps, row.attempts) == (2 * len(runs), 2 * len(runs))

    def served_after(self, began: float) -> tuple[float, float]:
        """Seconds from `began` until the API took a run, and until that run had ended."""
        accepted: list[UUID | None] = []

        def is_accepted() -> bool:
            accepted.append(self.submit())
            return accepted[-1] is not None

        until(is_accepted, PATIENCE)
        taken = time.monotonic() - began
        assert accepted[-1] is not None
        self.await_end(accepted[-1])
        return taken, time.monotonic() - began


def url_of_both(first: PostgresServer, second: PostgresServer) -> str:
    """The URL of whichever takes writes."""
    hosts = ",".join(f"127.0.0.1:{one.endpoint.port}" for one in (first, second))
    return f"postgresql://{ROLE}:{first.endpoint.password}@{hosts}/{DATABASE}?target_session_attrs=read-write"


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[PostgresServer]:
    server = PostgresServer(tmp_path / "primary")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[ValkeyServer]:
    server = ValkeyServer(tmp_path / "valkey")
    server.start()
    yield server
    server.stop()


def start(stack: ExitStack, root: Path, database_url: str, redis_url: str) -> Platform:
    """Start the platform on these servers."""
    data, output = root / "data", root / "output.txt"
    database = stack.enter_context(closing(Database(address.normalize(database_url), pool_size=2)))
    database.upgrade()
    settings = SETTINGS | {"database_url": database_url, "redis_url": redis_url}
    up = stack.enter_context(installation.up(data, output, settings, installation.catalog_of(ALPHA, BETA)))
    until(lambda: installation.is_up(up, output), PATIENCE)
    return Platform(up, data, database)


def end(platform: Platform) -> None:
    platform.up.send_signal(signal.SIGTERM)
    assert platform.up.wait(PATIENCE) == 0


@pytest.mark.timeout(600)
def test_a_promoted_standby_has_every_accepted_run(
    tmp_path: Path, postgres: PostgresServer, valkey: ValkeyServer
) -> None:
    """With synchronous replication. Nobody tells the programs: they ask for the server that takes writes."""
    with ExitStack() as stack:
        standby = Standby.of(postgres, tmp_path / "standby")
        stack.callback(standby.stop)
        with psycopg.connect(postgres.url, autocommit=True) as connection:
            connection.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
            connection.execute("SELECT pg_reload_conf()")
            synchronous = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'"
            until(lambda: connection.execute(synchronous).fetchone() == (1,))
        platform = start(stack, tmp_path, url_of_both(postgres, standby), valkey.url)
        accepted = [run for _ in range(12) if (run := platform.submit())]
        assert len(accepted) == 12
        until(lambda: any(platform.state(run) == "succeeded" for run in accepted), PATIENCE)

        assert postgres.pid is not None
        began = time.monotonic()
        os.kill(postgres.pid, signal.SIGKILL)
        standby.promote()
        promoted = time.monotonic() - began
        taken, ended = platform.served_after(began)
        for run in accepted:
            platform.await_end(run)
        show_section(
            "failover", f"promoted after {promoted:.1f} s, a run taken after {taken:.1f} s, ended after {ended:.1f} s"
        )
        platform.assert_each_step_is_recorded_once(accepted)
        end(platform)
    assert_nothing_left(platform.data)


@pytest.mark.timeout(600)
def test_a_promoted_replica_of_valkey_serves(tmp_path: Path, postgres: PostgresServer, valkey: ValkeyServer) -> None:
    """Its address moves, as that of a service or a virtual IP does. Messages that it lacks are sent again."""
    with ExitStack() as stack:
        replica = valkey_replica(valkey, tmp_path / "replica")
        stack.callback(replica.stop)
        serving: list[ValkeyServer] = [valkey]
        proxy = Proxy(lambda: serving[0].endpoint.port)
        stack.callback(proxy.close)
        url = valkey.url.replace(f":{valkey.endpoint.port}", f":{proxy.port}")
        platform = start(stack, tmp_path, postgres.url, url)
        accepted = [run for _ in range(12) if (run := platform.submit())]
        assert len(accepted) == 12
        until(lambda: any(platform.state(run) == "succeeded" for run in accepted), PATIENCE)

        assert valkey.pid is not None
        began = time.monotonic()
        os.kill(valkey.pid, signal.SIGKILL)
        promote_valkey(replica)
        serving[0] = replica
        taken, ended = platform.served_after(began)
        for run in accepted:
            platform.await_end(run)
        show_section("failover", f"a run taken after {taken:.1f} s, ended after {ended:.1f} s")
        platform.assert_each_step_is_recorded_once(accepted)
        end(platform)
    assert_nothing_left(platform.data)


@pytest.mark.timeout(600)
def test_one_of_each_program_is_enough(tmp_path: Path, postgres: PostgresServer, valkey: ValkeyServer) -> None:
    """Two APIs, control workers and beats: those of one machine are killed and stay dead, with runs in flight."""
    with ExitStack() as stack:
        platform = start(stack, tmp_path, postgres.url, valkey.url)
        port = free_port(tmp_path, other_than=postgres.endpoint.port)
        second = {"data_dir": tmp_path / "second", "database_url": postgres.url, "redis_url": valkey.url}
        settings = second | {"api.port": port, "catalog.files": tmp_path / "catalog.toml"}
        options = [f"--set={name}={value}" for name, value in (SETTINGS | settings).items()]
        for program in ("api", "control", "beat"):
            output = stack.enter_context((tmp_path / f"second-{program}.txt").open("wb"))
            command = [sys.executable, "-m", "app", *options, program]
            process = subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT)
            stack.callback(process.wait, 60)
            stack.callback(process.terminate)
        other = f"http://127.0.0.1:{port}"

        def is_ready() -> bool:
            try:
                components = httpx2.get(f"{other}/readyz", timeout=10, trust_env=False)
            except httpx2.HTTPError:
                return False
            return components.status_code == 200

        until(is_ready, PATIENCE)
        accepted = [run for _ in range(12) if (run := platform.submit())]
        os.kill(platform.up.pid, signal.SIGSTOP)  # it would start them again
        first = installation.members(platform.data)
        stack.callback(os.kill, platform.up.pid, signal.SIGCONT)
        began = time.monotonic()
        for name in ("api", "control"):  # the first beat is a part of `control`
            for pid in installation.with_children(first[name]):
                os.kill(pid, signal.SIGKILL)
        platform.url = other
        taken, ended = platform.served_after(began)
        for run in accepted:
            platform.await_end(run)
        show_section("failover", f"a run taken after {taken:.1f} s, ended after {ended:.1f} s")
        platform.assert_each_step_is_recorded_once(accepted)


def bouncer_version() -> tuple[int, int]:
    output = subprocess.run(["pgbouncer", "--version"], check=True, capture_output=True, text=True, timeout=30).stdout
    major, minor = output.split()[1].split(".")[:2]
    return int(major), int(minor)


@pytest.fixture
def bouncer(postgres: PostgresServer, request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of the server through PgBouncer, in the mode of the parameter."""
    port = free_port(postgres.directory, other_than=postgres.endpoint.port)
    prepared = "max_prepared_statements = 500" if bouncer_version() >= (1, 21) else ""
    with tempfile.TemporaryDirectory() as name:  # tmp_path lies below a folder that only its owner may enter
        folder = Path(name)
        (folder / "users.txt").write_text(f'"{ROLE}" "{postgres.endpoint.password}"\n')
        (folder / "pgbouncer.ini").write_text(f"""
[databases]
{DATABASE} = host=127.0.0.1 port={postgres.endpoint.port}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = scram-sha-256
auth_file = {folder}/users.txt
pool_mode = {request.param}
{prepared}
default_pool_size = 40
max_client_conn = 500
ignore_startup_parameters = extra_float_digits,options
""")
        as_user = []
        if os.geteuid() == 0:  # PgBouncer refuses to run as root
            as_user = ["-u", "nobody"]
            for path in (folder, *folder.iterdir()):
                shutil.chown(path, "nobody")
        with (folder / "log").open("wb") as output:
            process = subprocess.Popen(["pgbouncer", *as_user, str(folder / "pgbouncer.ini")], stderr=output)
        url = postgres.url.replace(f":{postgres.endpoint.port}/", f":{port}/")
        try:
            until(lambda: answers(url))
            yield url
        finally:
            process.kill()
            process.wait(30)
            show_section("pgbouncer", (folder / "log").read_text(errors="replace")[-5_000:])


def answers(url: str) -> bool:
    try:
        psycopg.connect(url, connect_timeout=5).close()
    except psycopg.OperationalError:
        return False
    return True


def keep_settings(postgres: PostgresServer) -> None:
    """What docs/high-availability.md says: PgBouncer drops the settings that programs send."""
    with psycopg.connect(postgres.url, autocommit=True) as connection:
        for statement in pooler.statements(DATABASE):
            connection.execute(statement.encode())
        # Those that PgBouncer holds began with other settings.
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'client backend'"
            " AND pid != pg_backend_pid()"
        )


needs_pgbouncer = pytest.mark.skipif(shutil.which("pgbouncer") is None, reason="needs the program pgbouncer")


@needs_pgbouncer
@pytest.mark.timeout(600)
@pytest.mark.parametrize("bouncer", ["session", "transaction"], indirect=True)
def test_the_platform_works_through_pgbouncer(
    tmp_path: Path, postgres: PostgresServer, valkey: ValkeyServer, bouncer: str, request: pytest.FixtureRequest
) -> None:
    if bouncer_version() < (1, 21) and "transaction" in request.node.name:
        pytest.skip("needs PgBouncer 1.21 for prepared statements")
    keep_settings(postgres)
    with ExitStack() as stack:
        platform = start(stack, tmp_path, bouncer, valkey.url)
        accepted = [run for _ in range(12) if (run := platform.submit())]
        for run in accepted:
            platform.await_end(run)
        platform.assert_each_step_is_recorded_once(accepted)
        end(platform)
    assert_nothing_left(platform.data)


@needs_pgbouncer
@pytest.mark.parametrize("bouncer", ["session", "transaction"], indirect=True)
def test_a_pooler_that_drops_the_settings_is_refused(postgres: PostgresServer, bouncer: str) -> None:
    with closing(Database(postgres.url)) as database:
        database.upgrade()
    with pytest.raises(UnfitPooler, match="ALTER DATABASE"):
        open_at_head(bouncer, pool_size=2)
    keep_settings(postgres)
    if bouncer_version() >= (1, 21):
        until(lambda: opens(bouncer))


@needs_pgbouncer
@pytest.mark.parametrize("bouncer", ["transaction"], indirect=True)
def test_a_pooler_that_loses_prepared_statements_is_refused(postgres: PostgresServer, bouncer: str) -> None:
    if bouncer_version() >= (1, 21):
        pytest.skip("this PgBouncer keeps prepared statements")
    with closing(Database(postgres.url)) as database:
        database.upgrade()
    keep_settings(postgres)
    with pytest.raises(UnfitPooler, match="max_prepared_statements"):
        open_at_head(bouncer, pool_size=2)


def opens(url: str) -> bool:
    try:
        open_at_head(url, pool_size=2).close()
    except DatabaseUnreachable:
        return False
    return True
