"""
The contenders: Arriero and plain Celery, each with its own worker processes, doing the same graphs of noops.

All share one Postgres and one Valkey; each has its own database of the Valkey, so nobody takes another's messages.
A time begins before the first submission and ends when the last end is seen; nothing is subtracted.
"""

from __future__ import annotations

import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psutil
import psycopg
from celery import Celery, chain, chord
from celery.exceptions import TimeoutError  # noqa: A004 what Celery raises
from celery.result import AsyncResult

from app.kernel import broker, embedded
from app.kernel import settings as settings_of
from app.kernel.broker import CeleryPublisher
from app.kernel.database import Database
from app.kernel.processes.process import Child
from app.kernel.settings import Settings
from app.workflows.language import check
from app.workflows.language.definition import Definition
from app.workflows.runs.changes.transactions import RunPolicy
from app.workflows.runs.service import Runs
from app.workflows.runs.submission import Submission
from benchmarks import celery_peer

#: Seconds after which a turn has failed: at all, and for each of its steps.
DEADLINE, PATIENCE = 20.0, 0.05

_REPOSITORY = Path(__file__).parent.parent


class Unheard(RuntimeError):
    """
    Celery did not hear of a result in time.

    Seen now and then with the result stored: it had come between Celery's look at the key and its subscription.
    """


@dataclass(frozen=True, slots=True)
class Site:
    """Where everything runs: the servers, a directory for logs, and how many workers each contender has."""

    servers: embedded.Servers
    directory: Path
    processes: int
    threads: int

    def broker_url(self, database: int) -> str:
        """The Valkey's database of that number."""
        assert self.servers.valkey is not None
        return self.servers.valkey.url.removesuffix("/0") + f"/{database}"

    @property
    def database_url(self) -> str:
        assert self.servers.postgres is not None
        return self.servers.postgres.url


@dataclass(frozen=True, slots=True)
class Burst:
    """Many submissions at once, and their end."""

    #: Seconds until the last submission had been accepted.
    submitting: float
    #: Seconds until the last end was seen.
    total: float


class Contender(ABC):
    """One of those who run the graphs. `start` before use, `stop` after."""

    def __init__(self, site: Site, name: str, database: int, *, stamped: bool) -> None:
        self.site, self.name, self._database = site, name, database
        #: Where its workers write down when each step began and ended.
        self.stamps = site.directory / f"{name}.stamps".replace(" ", "-").replace(",", "") if stamped else None
        self._children: list[Child] = []
        self.url = site.broker_url(database)

    #: What is set, for the reader of the results.
    told: Mapping[str, Any]
    #: What a worker is started with, after `python -m`.
    program: Sequence[str]

    @abstractmethod
    def environment(self) -> Mapping[str, str]:
        """The environment of its workers."""

    @abstractmethod
    def client(self) -> Celery:
        """An application on its broker."""

    def start(self) -> None:
        """Start the workers; `wait` before use."""
        for number in range(self.site.processes):
            name = f"{self.name}-{self.site.processes}-{number}".replace(" ", "-").replace(",", "")
            child = Child(
                name,
                [sys.executable, "-m", *(part.format(name=name) for part in self.program)],
                environment=self.environment(),
                log_file=self.site.directory / f"{name}.log",
                pid_file=self.site.directory / f"{name}.pid",
                directory=_REPOSITORY,
            )
            self._children.append(child)
            child.start()

    def wait(self) -> None:
        """Wait until each worker answers."""
        limit = time.monotonic() + 60
        while len(self.client().control.ping(timeout=0.5)) < self.site.processes:
            for child in self._children:
                if not child.alive or time.monotonic() > limit:
                    raise RuntimeError(f"{child.name} does not answer:\n{child.log_tail()}")

    def stop(self) -> None:
        """Stop the workers."""
        for child in self._children:
            child.request_stop()
        for child in self._children:
            child.stop(timedelta(seconds=15))

    def cpu(self) -> float:
        """Seconds of processor time that its workers have used."""
        return sum(cpu_of(child.pid) for child in self._children if child.pid is not None)

    @abstractmethod
    def chains(self, count: int, length: int) -> Burst:
        """Chains of noops, side by side."""

    @abstractmethod
    def fans(self, count: int, width: int) -> Burst:
        """Fans of one noop, `width` noops that need it, and a join; side by side."""

    @abstractmethod
    def mapped(self, items: int) -> Burst:
        """A noop for each of so many items, and a join of all."""

    @abstractmethod
    def singles(self, count: int) -> list[float]:
        """Noops one after another: seconds of each, from before its submission until its end is seen."""


class Arriero(Contender):
    """Arriero: runs in Postgres, steps by control workers."""

    def __init__(
        self, site: Site, name: str, database: int, *, by_message: bool = False, stamped: bool = False
    ) -> None:
        super().__init__(site, name, database, stamped=stamped)
        self.program = ("workers.programs", "control", "{name}")
        if by_message or stamped:
            self.program = ("benchmarks.control", "{name}")
            self.program += ("--by-message",) if by_message else ()
            self.program += ("--stamps", str(self.stamps)) if stamped else ()
        self.settings = _settings(site, self.url)
        self.told = {
            "worker": "python -m " + " ".join(self.program),
            "processes": site.processes,
            "threads": site.threads,
            "acknowledged": "at once",
            "prefetch": "none",
            "pool": "workers.messaging.thread_pool",
            "events": "while Flower watches",
            "log level": self.settings.log.level,
            "a message for": "every step" if by_message else "every step, but a short one that follows is done at once",
        }
        self._database_of_runs = Database(site.database_url, pool_size=2)
        self._application = broker.celery_app(self.url, self.settings.broker)
        self._publisher = CeleryPublisher(self._application, self.url)
        self._runs = Runs(
            self._database_of_runs, self._publisher, RunPolicy(timedelta(seconds=15), max_worker_losses=3)
        )
        self._watch = psycopg.connect(self._database_of_runs.conninfo(), autocommit=True)

    def environment(self) -> Mapping[str, str]:
        return settings_of.environment_of(self.settings)

    def client(self) -> Celery:
        return self._application

    def stop(self) -> None:
        super().stop()
        self._watch.close()
        self._publisher.close()
        self._database_of_runs.close()

    def chains(self, count: int, length: int) -> Burst:
        return self._burst(_chain(length), count, count * length)

    def fans(self, count: int, width: int) -> Burst:
        return self._burst(_fan(width), count, count * (width + 2))

    def mapped(self, items: int) -> Burst:
        return self._burst(_MAPPED, 1, items, {"list": list(range(items))})

    def singles(self, count: int) -> list[float]:
        definition = _chain(1)
        return [self._single(definition) for _ in range(count)]

    def _single(self, definition: Definition) -> float:
        began = time.perf_counter()
        run_id = self._runs.submit(Submission(definition, {})).id
        self._await([run_id], 1, pause=0.0002)
        return time.perf_counter() - began

    def _burst(self, definition: Definition, count: int, steps: int, inputs: Mapping[str, Any] | None = None) -> Burst:
        began = time.perf_counter()
        run_ids = [self._runs.submit(Submission(definition, inputs or {})).id for _ in range(count)]
        submitted = time.perf_counter()
        self._await(run_ids, steps, pause=0.005)
        return Burst(submitted - began, time.perf_counter() - began)

    def _await(self, run_ids: list[UUID], steps: int, pause: float) -> None:
        statement = "SELECT count(*) FROM run WHERE id = ANY(%s) AND state = 'succeeded'"
        limit = time.monotonic() + DEADLINE + steps * PATIENCE
        while True:
            row = self._watch.execute(statement, (run_ids,)).fetchone()
            assert row is not None
            if row[0] == len(run_ids):
                return
            if time.monotonic() > limit:
                raise RuntimeError(f"{self.name}: {len(run_ids) - row[0]} of {len(run_ids)} runs did not succeed")
            time.sleep(pause)


class PlainCelery(Contender):
    """Plain Celery on the same broker: its own chain and chord."""

    def __init__(
        self, site: Site, name: str, database: int, *, settings: str, pool: str, stamped: bool = False
    ) -> None:
        super().__init__(site, name, database, stamped=stamped)
        same = settings == "same"
        #: Prefork has processes in the place of threads; Celery makes one for each core.
        concurrency = (os.cpu_count() or 1) if pool == "prefork" else site.threads
        self.program = ("celery", "-A", "benchmarks.celery_peer", "worker", "-n", "{name}@%h")
        self.program += ("-P", "custom" if same else pool, "-c", str(concurrency))
        if same:
            self.program += ("-Q", f"{broker.CONTROL_QUEUE},{broker.IO_QUEUE}")
        self.program += ("--without-mingle", "--without-gossip")
        self._settings = settings
        self.told = {
            "worker": "python -m " + " ".join(self.program),
            "processes": site.processes,
            "threads": concurrency,
            "acknowledged": "at once",
            "prefetch": "none" if same else "4 for each thread",
            "pool": "workers.messaging.thread_pool" if same else pool,
            "events": False,
            "log level": "warning",
            "results": "kept where somebody waits for them, in Valkey",
        }
        self._application = celery_peer.application(self.url, settings)
        tasks = self._application.tasks
        self._noop, self._kept, self._join = (tasks[f"peer.{name}"] for name in ("noop", "kept", "join"))

    def environment(self) -> Mapping[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("ARRIERO_")}
        return inherited | {
            celery_peer.URL_VARIABLE: self.url,
            celery_peer.SETTINGS_VARIABLE: self._settings,
            celery_peer.STAMPS_VARIABLE: str(self.stamps or ""),
            "CELERY_CUSTOM_WORKER_POOL": "workers.messaging.thread_pool:TaskPool",
            "PYTHONPATH": str(_REPOSITORY),
        }

    def client(self) -> Celery:
        return self._application

    def stop(self) -> None:
        super().stop()
        self._application.close()

    def chains(self, count: int, length: int) -> Burst:
        def one(run: str) -> Any:
            tasks = [*[self._noop] * (length - 1), self._kept]
            parts = [task.si(*self._labels(run, f"s{n}")) for n, task in enumerate(tasks)]
            return chain(*parts) if length > 1 else parts[0]

        return self._burst([one(uuid4().hex) for _ in range(count)], count * length)

    def fans(self, count: int, width: int) -> Burst:
        header = [self._kept.si()] * width
        fans = [chain(self._noop.si(), chord(header, self._join.s())) for _ in range(count)]
        return self._burst(fans, count * (width + 2))

    def mapped(self, items: int) -> Burst:
        run = uuid4().hex
        header = [self._kept.si(*self._labels(run, f"m[{n}]")) for n in range(items)]
        return self._burst([chord(header, self._join.s(*self._labels(run, "all")))], items)

    def _labels(self, run: str, key: str) -> list[str]:
        return [f"{run}/{key}"] if self.stamps else []

    def singles(self, count: int) -> list[float]:
        return [self._single() for _ in range(count)]

    def _single(self) -> float:
        began = time.perf_counter()
        self._await(self._kept.delay(), 1)
        return time.perf_counter() - began

    def _burst(self, signatures: Sequence[Any], steps: int) -> Burst:
        began = time.perf_counter()
        results = [signature.apply_async() for signature in signatures]
        submitted = time.perf_counter()
        for result in results:
            self._await(result, steps)
        return Burst(submitted - began, time.perf_counter() - began)

    def _await(self, result: AsyncResult[Any], steps: int) -> None:
        limit = DEADLINE + steps * PATIENCE
        try:
            result.get(timeout=limit)
        except TimeoutError:
            state = self._application.backend.get_state(result.id)
            raise Unheard(f"{self.name}: no word of a result in {limit:g} s; its state is {state}") from None


def cpu_of(pid: int) -> float:
    """Seconds of processor time of a process and of those below it that still run or that it has reaped."""
    total = 0.0
    try:
        process = psutil.Process(pid)
        found = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return total
    for one in found:
        try:
            times = one.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def _settings(site: Site, broker_url: str) -> Settings:
    overrides = {
        "data_dir": site.directory / "data",
        "database_url": site.database_url,
        "redis_url": broker_url,
        "log.format": "json",
        "control.concurrency": site.threads,
    }
    return settings_of.load(environment={}, overrides=overrides).settings


def _chain(length: int) -> Definition:
    steps = [f"  - {{id: s{n}, kind: noop{f', needs: [s{n - 1}]' if n else ''}}}" for n in range(length)]
    return check.parse("\n".join([f"workflow: chain-of-{length}", "steps:", *steps]))


def _fan(width: int) -> Definition:
    keys = [f"s{n}" for n in range(width)]
    steps = ["  - {id: source, kind: noop}", *(f"  - {{id: {key}, kind: noop, needs: [source]}}" for key in keys)]
    return check.parse(
        "\n".join([f"workflow: fan-of-{width}", "steps:", *steps, f"  - {{id: all, kind: join, needs: {keys}}}"])
    )


_MAPPED = check.parse("""
workflow: mapped
inputs:
  list: {type: array}
steps:
  - {id: m, kind: map, over: inputs.list, step: {kind: noop}}
  - {id: all, kind: join, needs: [m]}
""")
