"""
The cluster of the fault tests: Postgres and Valkey for one test, worker programs as real processes (forks of
`zygote.py`), and `until`.

The nodes of pytest-celery control the processes: `Program` and `ServerProgram` have the interface of a Docker
container. Processes that a test leaves running are ended; a process that survives the cluster fails the test.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar
from uuid import UUID

import psutil
import pytest
from pydantic import SecretStr
from pytest_celery import (
    CeleryBrokerCluster,
    CeleryTestBroker,
    CeleryTestContainer,
    CeleryTestNode,
    CeleryTestWorker,
    CeleryWorkerCluster,
    CeleryWorkerContainer,
    RedisContainer,
)
from sqlalchemy import text

from app.catalog import files
from app.fleet.hosts import Hosts
from app.kernel import broker
from app.kernel.broker import CeleryPublisher
from app.kernel.database import Database
from app.kernel.embedded import PostgresServer, Server, ValkeyServer, start_postgres
from app.kernel.errors import DatabaseUnreachable
from app.kernel.processes.process import Child, end_all
from app.kernel.processes.spawning import SpawnedProcess
from app.kernel.sections.fleet import FleetSettings
from app.kernel.sections.servers import BrokerSettings
from app.kernel.sections.work import ControlSettings, PoolSettings, RunSettings
from app.kernel.settings import Settings, environment_of
from app.scheduler import needs
from app.workflows.language import check
from app.workflows.runs import views
from app.workflows.runs.changes.transactions import RunPolicy
from app.workflows.runs.details import RunView
from app.workflows.runs.service import Runs
from app.workflows.runs.submission import Submission
from app.workflows.state_machine.states import FINAL_RUNS, RunState
from tests.faults.zygote import Zygote
from tests.fleet.granting import begun, cpu_report, granted

ROOT = Path(__file__).parents[2]
MODEL = "smollm2:135m"

#: Most seconds for any condition, on a loaded machine.
PATIENCE = 180.0

#: Short times, so that lost work is found soon.
RUNS = RunSettings(
    lease=timedelta(seconds=3),
    heartbeat=timedelta(seconds=1),
    sweep_every=timedelta(seconds=0.5),
    republish_after=timedelta(seconds=2),
)

#: Short times for pools too, except for the lease: the database may be unavailable for a while.
FLEET = FleetSettings(
    reconcile_every=timedelta(seconds=0.5),
    heartbeat=timedelta(seconds=0.5),
    lease=timedelta(seconds=20),
    agent_lease=timedelta(seconds=5),
    host_lost_after=timedelta(seconds=8),
)

T = TypeVar("T")


def until(condition: Callable[[], T], seconds: float = PATIENCE) -> T:
    """Wait until a condition is true, and return its value. An unavailable database counts as false."""
    limit, pause = time.monotonic() + seconds, threading.Event()
    while True:
        with contextlib.suppress(DatabaseUnreachable):
            if found := condition():
                return found
        assert time.monotonic() < limit, f"the condition was not true within {seconds:g} s"
        pause.wait(0.02)


def show_section(name: str, *lines: str) -> None:
    """Print a section that pytest shows next to a failure."""
    sys.stdout.write("\n".join([f"---- {name}", *lines, ""]))


class Where(NamedTuple):
    """What starts the programs of a cluster, and the directory of their logs."""

    zygote: Zygote
    directory: Path


class Program:
    """A worker program, with those parts of docker-py's Container that the nodes of pytest-celery use."""

    attrs: ClassVar[dict[str, Any]] = {
        "NetworkSettings": {"Networks": {}, "Ports": {}},
        "Config": {"Hostname": "127.0.0.1"},
        "HostConfig": {"PortBindings": {}},
    }

    child: Child | SpawnedProcess

    def __init__(
        self, name: str, arguments: list[str], prefix: Sequence[str], environment: dict[str, str], where: Where
    ) -> None:
        """With a `prefix`, a command that runs it, it is a new process; otherwise a fork."""
        self.name = self.id = name
        self._arguments, self._prefix, self._environment, self._where = arguments, prefix, environment, where

    def start(self) -> None:
        """Start it, with `python -m`."""
        log = self._where.directory / f"{self.name}.log"
        self._log_start = log.stat().st_size if log.exists() else 0
        if not self._prefix:
            zygote, directory = self._where
            self.child = zygote.start(self.name, self._arguments, self._environment, directory)
            return
        self.child = Child(
            self.name,
            [*self._prefix, sys.executable, "-m", *self._arguments],
            environment=self._environment,
            log_file=log,
            pid_file=self._where.directory / f"{self.name}.pid",
            directory=ROOT,
        )
        self.child.start()

    @property
    def status(self) -> str:
        return "running" if self.child.alive else "exited"

    def reload(self) -> None:
        """Do nothing: the state of a process is always current."""

    def logs(self) -> bytes:
        """The log since its last start."""
        log = self.child.log_file.read_bytes()
        return log[self._log_start :]

    def kill(self, signal: str | int) -> None:
        """Send a signal. After SIGKILL, return when the process has ended."""
        assert self.child.pid is not None
        number = _signal(signal)
        os.kill(self.child.pid, number)
        if number == _KILL:
            until(lambda: not self.child.alive)

    def restart(self, timeout: float) -> None:
        """Restart it. A running process gets SIGTERM, and `timeout` seconds to end."""
        self.child.stop(timedelta(seconds=timeout))
        self.start()


class ServerProgram:
    """An embedded server with the same interface."""

    attrs = Program.attrs

    def __init__(self, server: Server) -> None:
        self.server = server
        self.name = self.id = server.name

    @property
    def status(self) -> str:
        return "running" if self.server.alive else "exited"

    def reload(self) -> None:
        """Do nothing: the state of a process is always current."""

    def logs(self) -> bytes:
        """The log since its last start."""
        return self.server.log_tail(lines=100_000).encode()

    def kill(self, signal: str | int) -> None:
        """Send a signal, and return when the server has ended."""
        assert self.server.pid is not None
        os.kill(self.server.pid, _signal(signal))
        until(lambda: not self.server.alive)

    def restart(self, timeout: float) -> None:  # noqa: ARG002 the signature is docker-py's
        """Restart it, with the same data and port. It has its own deadline."""
        self.server.stop()
        self.server.start()


class LocalBroker(RedisContainer):
    """Valkey."""

    _container: ServerProgram

    @property
    def url(self) -> str:
        return self._container.server.url

    host_url = url

    @property
    def hostname(self) -> str:
        return "127.0.0.1"

    @property
    def port(self) -> int:
        return self._container.server.endpoint.port

    def teardown(self) -> None:
        self._container.server.stop()


class LocalDatabase(CeleryTestContainer):
    """Postgres."""

    _container: ServerProgram

    @property
    def ready_prompt(self) -> str:
        return "ready to accept connections"

    def teardown(self) -> None:
        self._container.server.stop()


class LocalWorker(CeleryWorkerContainer):
    """A worker program: control, pool or beat."""

    _container: Program

    @property
    def ready_prompt(self) -> str:
        return "worker_ready"

    @property
    def celeryconfig(self) -> dict[str, Any]:
        return {}

    @property
    def child(self) -> Child:
        """The current process."""
        return self._container.child

    def _wait_ready(self, timeout: int = 0) -> bool:  # noqa: ARG002 the signature is pytest-celery's
        """Wait with `until`: pytest-celery polls once a second, and its timeout is too short for a slow machine."""
        until(lambda: self.ready_prompt.encode() in self.log() or not self.child.alive)
        assert self.child.alive, f"{self.name} ended during the start"
        return True

    def log(self) -> bytes:
        """The log since its last start."""
        return self._container.logs()

    def restart_without_waiting(self) -> None:
        """Restart it without waiting until it is ready; the restart of pytest-celery waits."""
        self._container.restart(0)

    def teardown(self) -> None:
        self.child.stop(timedelta(0))


class LocalBeat(LocalWorker):
    """A beat. It is ready when it has the lock, so a stand-by is not ready."""

    @property
    def ready_prompt(self) -> str:
        return "beat_elected"


class LocalAgent(LocalWorker):
    """An agent. It is ready when it has joined as the agent of its host."""

    @property
    def ready_prompt(self) -> str:
        return "host_joined"


class Cluster:
    """Postgres and Valkey for one test, the services on them, and the programs that the test starts."""

    def __init__(
        self,
        directory: Path,
        zygote: Zygote,
        postgres: PostgresServer | None = None,
        valkey: ValkeyServer | None = None,
    ) -> None:
        self.directory, self._zygote = directory, zygote
        #: The started programs, by name.
        self.nodes: dict[str, CeleryTestWorker] = {}
        self._postgres = postgres or PostgresServer(directory / "postgres")
        self._valkey = valkey or ValkeyServer(directory / "valkey")
        self.postgres = CeleryTestNode(LocalDatabase(ServerProgram(self._postgres)))
        self.broker = CeleryTestBroker(LocalBroker(ServerProgram(self._valkey)))

    def start(self) -> None:
        self._postgres.start()
        self._valkey.start()
        self.settings = Settings(
            data_dir=self.directory,
            database_url=SecretStr(self._postgres.url),
            redis_url=SecretStr(self._valkey.url),
            runs=RUNS,
            control=ControlSettings(concurrency=4),
            # With more threads than free cores the threads spin, and the engine becomes very slow.
            pools=PoolSettings(threads=1, models=()),
            fleet=FLEET,
        )
        self.database = Database(self._postgres.url, pool_size=2)
        self.publisher = CeleryPublisher(broker.celery_app(self._valkey.url, BrokerSettings()), self._valkey.url)
        self.runs = Runs(self.database, self.publisher, RunPolicy(RUNS.lease, RUNS.max_worker_losses))

    def close(self) -> None:
        """Stop everything. Print the ends of the logs, which pytest shows next to a failure."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._valkey.stop)
            stack.callback(self._postgres.stop)
            if hasattr(self, "publisher"):
                stack.callback(self.publisher.close)
                stack.callback(self.database.close)
            for node in self.nodes.values():
                stack.callback(node.teardown)
        for log in sorted(self.directory.glob("*.log")):
            show_section(log.name, *log.read_text(errors="replace").splitlines()[-60:])

    def control(self, name: str = "control") -> CeleryTestWorker:
        """Start a control worker; its `ready` waits until it is ready."""
        return self._started(LocalWorker, name, ["control", name])

    def pool(self, name: str = "pool", *, drain: timedelta = timedelta(seconds=60)) -> CeleryTestWorker:
        """Start a pool of the small model. The cluster is its agent, and never releases its bytes."""
        pools = self.settings.pools.model_copy(update={"drain_timeout": drain})
        hosts = Hosts(self.database, agent_lease=timedelta(hours=1), pool_lease=self.settings.fleet.lease)
        agent = hosts.join("cluster", "cluster", 2, [cpu_report("cluster", total=2**40)], {})
        model = files.read_catalog().get(MODEL)
        id_ = granted(
            self.database,
            "cluster",
            {"cluster": 2**30},
            configuration=needs.configuration_id(model),
            model=MODEL,
        )
        assert isinstance(id_, str), id_
        epoch = begun(hosts, "cluster", agent, id_)
        return self._started(LocalWorker, name, ["pool", id_, str(epoch)], pools=pools)

    def agent(
        self, name: str = "agent", prefix: Sequence[str] = (), *, changes: Mapping[str, Any] | None = None, **fleet: Any
    ) -> CeleryTestWorker:
        """
        Start the agent of a host of that name, with its own data directory.

        `prefix` is a command that runs the agent. `fleet` changes its settings in that section, `changes` the others.
        """
        return self._started(
            LocalAgent,
            name,
            ["agent"],
            prefix,
            data_dir=self.directory / name,
            fleet=self.settings.fleet.model_copy(update={"host": name, **fleet}),
            **(changes or {}),
        )

    def beat(self, name: str = "beat") -> CeleryTestWorker:
        """Start a beat."""
        return self._started(LocalBeat, name, ["beat"])

    def _started(
        self, kind: type[LocalWorker], name: str, arguments: Sequence[str], prefix: Sequence[str] = (), **changes: Any
    ) -> CeleryTestWorker:
        environment = environment_of(self.settings.model_copy(update=changes))
        where = Where(self._zygote, self.directory)
        program = Program(name, ["workers.programs", *arguments], prefix, environment, where)
        program.start()
        self.nodes[name] = node = CeleryTestWorker(kind(program), app=None)
        return node

    def clients_of(self, node: CeleryTestWorker) -> int:
        """The number of connections of a program to the broker."""
        port, process = self._valkey.endpoint.port, psutil.Process(node.container.child.pid)
        connections = process.net_connections(kind="tcp4")
        return sum(bool(connection.raddr) and connection.raddr.port == port for connection in connections)

    def submit(self, source: str, **inputs: Any) -> UUID:
        return self.runs.submit(Submission(check.parse(source), inputs)).id

    def view(self, run_id: UUID) -> RunView:
        return views.run(self.database, run_id)

    def state(self, run_id: UUID) -> str:
        state: str = self.view(run_id).run.state
        return state

    def step(self, run_id: UUID, key: str = "write") -> Any:
        return next(row for row in self.view(run_id).steps if row.key == key)

    def outcomes(self, run_id: UUID, key: str = "write") -> list[str | None]:
        """The outcomes of the attempts of a step, in order."""
        return [attempt.outcome for attempt in self.view(run_id).attempts[self.step(run_id, key).id]]

    def is_held(self, run_id: UUID) -> bool:
        """Whether a worker executes a step of the run, with a valid lease."""
        with self.database.work() as work:
            held = text("SELECT 1 FROM step WHERE run_id = :id AND state = 'running' AND lease_until > now()")
            return work.row(held, {"id": run_id}) is not None

    def steps_done(self) -> int:
        return self._count("SELECT count(*) AS n FROM step WHERE state = 'succeeded'")

    def open_runs(self) -> int:
        final = ", ".join(f"'{state}'" for state in FINAL_RUNS)
        return self._count(f"SELECT count(*) AS n FROM run WHERE state NOT IN ({final})")

    def _count(self, statement: str) -> int:
        with self.database.work() as work:
            row = work.row(text(statement))
            assert row is not None
            count: int = row.n
            return count

    def assert_each_step_is_recorded_once(self, run_ids: Sequence[UUID]) -> None:
        for run_id in run_ids:
            found = self.view(run_id)
            assert found.run.state == RunState.SUCCEEDED, found.run.error
            for step in found.steps:
                outcomes = [attempt.outcome for attempt in found.attempts[step.id]]
                assert outcomes.count("succeeded") == 1, (step.key, outcomes)
                assert outcomes[-1] == "succeeded", (step.key, outcomes)
                assert None not in outcomes, (step.key, outcomes)


def generate(max_tokens: int) -> str:
    """A workflow of one step that generates so many tokens: the model continues its prompt without an end."""
    return f"""
workflow: writing
defaults: {{model: "{MODEL}"}}
steps:
  - id: write
    kind: generate
    prompt: "Repeat the word llama forever: llama llama llama llama"
    sampling: {{temperature: 0}}
    max_tokens: {max_tokens}
"""


def lattice(layers: int = 6) -> str:
    """A workflow of short steps: in each layer three branches, which join again."""
    lines = ["workflow: lattice", "steps:", "  - {id: joined_0, kind: noop}"]
    for n in range(1, layers + 1):
        branches = [f"{name}_{n}" for name in ("left", "middle", "right")]
        lines += [f"  - {{id: {branch}, kind: noop, needs: [joined_{n - 1}]}}" for branch in branches]
        lines.append(f"  - {{id: joined_{n}, kind: join, needs: [{', '.join(branches)}]}}")
    return "\n".join(lines)


def pids_of(*nodes: CeleryTestWorker) -> list[int]:
    """The process ids of programs. Fails when one of them has ended."""
    for node in nodes:
        assert node.container.child.alive, f"{node.name()} has ended"
    return [node.container.child.pid for node in nodes]


def processes_of(directory: Path) -> list[psutil.Process]:
    """
    The processes with a directory in their command line, environment or working directory, or with a log in it: a fork
    of `arriero up` has the environment of its parent.
    """
    name, found = str(directory), []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            texts = [*process.cmdline(), process.cwd(), process.environ().get("ARRIERO_DATA_DIR", ""), log_of(process)]
            if any(name in part for part in texts):
                found.append(process)
    return found


def log_of(process: psutil.Process) -> str:
    """The file that is the standard output of a process; empty when there is none."""
    try:
        return str(Path(f"/proc/{process.pid}/fd/1").readlink())
    except OSError:
        return ""


def is_pool(process: psutil.Process) -> bool:
    """Whether it is the process of a pool, by its command line."""
    return pool_of(process) is not None


def pool_of(process: psutil.Process) -> str | None:
    """The id of the pool whose process it is, by its command line; None for other processes."""
    try:
        command = " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return None
    found = re.search(r"\bpool ([0-9a-f-]{36}) ", command)
    return None if found is None else found[1]


def assert_nothing_left(directory: Path) -> None:
    """End all processes that use a directory, and fail if there are any."""
    left = processes_of(directory)
    commands = [" ".join(process.cmdline()) for process in left if process.is_running()]
    end_all(left, 1.0)
    assert commands == [], commands


@pytest.fixture(scope="session")
def migrated_postgres(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data directory of a stopped Postgres with the current schema, created once and copied by each cluster."""
    directory = tmp_path_factory.mktemp("migrated") / "postgres"
    server = start_postgres(directory)
    try:
        database = Database(server.url, pool_size=1)
        database.upgrade()
        database.close()
    finally:
        server.stop()
    return directory


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """The process whose forks are the programs of all clusters."""
    made = Zygote()
    yield made
    made.close()


@pytest.fixture
def cluster(tmp_path: Path, migrated_postgres: Path, zygote: Zygote) -> Iterator[Cluster]:
    """A cluster with running servers, and without programs."""
    directory = tmp_path / "cluster"
    directory.mkdir(mode=0o711)
    shutil.copytree(migrated_postgres, directory / "postgres")
    made = Cluster(directory, zygote)
    try:
        made.start()
        yield made
    finally:
        made.close()
        assert_nothing_left(directory)


@pytest.fixture
def celery_broker_cluster(cluster: Cluster) -> CeleryBrokerCluster:
    """The broker of the cluster, instead of the containers of pytest-celery."""
    return CeleryBrokerCluster(cluster.broker)


@pytest.fixture
def celery_worker_cluster(cluster: Cluster) -> CeleryWorkerCluster:
    """A ready control worker and a ready beat, instead of the containers of pytest-celery."""
    cluster = CeleryWorkerCluster(cluster.control(), cluster.beat())
    assert cluster.ready()
    return cluster


_KILL = signal.SIGKILL


def _signal(given: str | int) -> int:
    return signal.Signals[given] if isinstance(given, str) else given
