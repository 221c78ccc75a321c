"""
The Celery application of the worker programs: its tasks, and the start and stop of a worker process.

The name of a task is literally its import path: `app` publishes by name and never imports this package.
"""

from __future__ import annotations

import importlib
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from uuid import UUID

from celery import Celery, platforms, signals
from celery.apps.worker import Worker

from app.fleet.pool import PoolPhase
from app.governance.jobs import registry
from app.kernel import addresses, broker, log
from app.kernel.settings import Settings
from app.workflows.runs.messages import RUN_STEP
from workers import runtime, steps
from workers.engine import Engine
from workers.messaging import timetable, transport
from workers.runtime import Resources, Runtime

_log = log.get(__name__)

#: The thread pool of Celery's worker, which wakes the consumer when a thread is free.
THREAD_POOL = "workers.messaging.thread_pool:TaskPool"
#: The consumer of Celery's worker, which survives the loss of the broker.
CONSUMER = "workers.messaging.consumer:Consumer"


#: Seconds between the events with which a worker shows Flower that it lives.
_HEARTBEAT_SECONDS = 5.0


#: Does a pass of a scheduled job. It returns what it did; nothing when there was nothing to do.
JobFunction = Callable[[Runtime], Mapping[str, object] | None]


def job_functions() -> dict[str, JobFunction]:
    """Return the functions of the scheduled jobs by task name, which is their import path."""
    found: dict[str, JobFunction] = {}
    for job in registry.JOBS:
        module, _, name = job.task.rpartition(".")
        found[job.task] = getattr(importlib.import_module(module), name)
    return found


class Application:
    """A worker program: Celery's application, and the runtime of its tasks between `start` and `stop`."""

    def __init__(self, settings: Settings) -> None:
        """Does not connect to anything. Raises Unavailable when no broker is configured."""
        self.settings = settings
        transport.install()
        # Celery would replace the command line, by which operators and tests know a process.
        setattr(platforms, "_setproctitle", None)  # noqa: B010 it is unknown to the stubs
        self.celery: Celery = broker.celery_app(
            addresses.of(settings).redis_url, settings.broker, timetable.schedule(settings)
        )
        self._runtime: Runtime | None = None
        self._on_phase: Callable[[PoolPhase], None] = lambda _: None
        self._stopping = False

        # Celery would also register a shared task in every later application of the process.
        # The events of steps are sent by `StepEvents`; scheduled jobs run several times a second, and send none.
        task = partial(self.celery.task, shared=False, send_events=False)

        @task(name=RUN_STEP)
        def run_step(step_id: str, attempt: int) -> None:
            self.runtime.activity.note()
            steps.run_step(self.runtime, UUID(step_id), attempt)
            self.runtime.activity.note()

        for name, run in job_functions().items():
            self._register(task, name, run)

    def _register(self, task: Any, name: str, run: JobFunction) -> None:
        @task(name=name)
        def run_scheduled() -> None:
            run(self.runtime)

    @property
    def runtime(self) -> Runtime:
        """The dependencies of the tasks, between `start` and `stop`."""
        assert self._runtime is not None, "no task is received before the start"
        return self._runtime

    def start(
        self,
        name: str,
        resources: Resources,
        engine: Engine | None = None,
        incarnation: str | None = None,
    ) -> None:
        """Create the runtime of the worker `name`. `incarnation` is an id that the parent process gave to it alone."""
        self._runtime = runtime.start(
            self.celery, self.settings, resources, name, engine=engine, incarnation=incarnation
        )
        self._drain = threading.Timer(self.settings.pools.drain_timeout.total_seconds(), self._runtime.leases.drain)
        self._drain.daemon = True
        signals.worker_ready.connect(self._on_ready)
        signals.worker_shutting_down.connect(self._on_stopping)

    def stop(self) -> None:
        """Close the runtime."""
        self._drain.cancel()
        self._on_phase(PoolPhase.UNLOADING)
        self.runtime.close()

    def serve(
        self,
        name: str,
        queues: Sequence[str],
        threads: int,
        resources: Resources,
        engine: Engine | None = None,
        incarnation: str | None = None,
        on_start: Callable[[Runtime], None] = lambda _: None,
        on_phase: Callable[[PoolPhase], None] = lambda _: None,
    ) -> int:
        """
        Serve the queues until SIGTERM, then finish the held steps or requeue them. Returns the exit code.

        `on_start` is called with the runtime before the first message, `on_phase` at each change of the phase.
        """
        self._on_phase = on_phase
        self.start(name, resources, engine, incarnation)
        on_start(self.runtime)
        try:
            worker: Worker = self.celery.Worker(
                hostname=f"{name}@{socket.gethostname()}",
                quiet=True,
                pool_cls=THREAD_POOL,
                consumer_cls=CONSUMER,
                concurrency=threads,
                queues=list(queues),
                without_mingle=True,
                without_gossip=True,
                heartbeat_interval=_HEARTBEAT_SECONDS,
                loglevel=self.settings.log.level.upper(),
            )
            worker.start()
        finally:
            self.stop()
        return worker.exitcode or 0

    def _on_ready(self, sender: Any, **_: Any) -> None:
        self.runtime.events.attach(sender)
        _log.info("worker_ready", worker=self.runtime.owner)
        self._on_phase(PoolPhase.SERVING)

    def _on_stopping(self, **_: Any) -> None:
        if self._stopping:
            return  # it is a repeated signal
        self._stopping = True
        self._on_phase(PoolPhase.DRAINING)
        _log.info("worker_draining", worker=self.runtime.owner)
        self._drain.start()
