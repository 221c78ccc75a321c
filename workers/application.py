"""
The Celery application of worker programs: the tasks, and what happens when a process starts and stops.

Tasks are named by their import path, literally: `app` publishes by name and never imports this package.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any
from uuid import UUID

from celery import Celery, signals
from celery.apps.worker import Worker

from app.fleet.pool import PoolPhase
from app.kernel import addresses, broker, log
from app.kernel.settings import Settings
from app.scheduler.tasks import DEFRAGMENT, RECONCILE
from app.workflows.runs.messages import RUN_STEP
from workers import jobs, runtime, steps, timetable, transport
from workers.engine import Engine
from workers.pool.heartbeat import Heartbeat
from workers.pool.progress import Status
from workers.runtime import Runtime

_log = log.get(__name__)

#: Celery's pool of threads, with the wake-up that a slot needs to be refilled at once.
POOL = "workers.wake:TaskPool"
#: Celery's consumer, which survives every loss of the broker.
CONSUMER = "workers.consumer:Consumer"


class Application:
    """A worker program: Celery's application, and the runtime that its tasks stand on once it has started."""

    def __init__(self, settings: Settings) -> None:
        """Connects to nothing. Raises Unavailable when no broker is known."""
        self.settings = settings
        transport.install()
        self.celery: Celery = broker.celery_app(
            addresses.of(settings).redis_url, settings.broker, timetable.schedule(settings)
        )
        self._runtime: Runtime | None = None
        self._status: Status | None = None
        self._stopping = False

        # Celery would also register a shared task in every later application of the process.
        task = partial(self.celery.task, shared=False)

        @task(name=RUN_STEP)
        def run_step(step_id: str, attempt: int) -> None:
            steps.run_step(self.runtime, UUID(step_id), attempt)

        @task(name=timetable.SWEEP)
        def run_sweep() -> None:
            jobs.run_sweep(self.runtime)

        @task(name=timetable.EXPIRE)
        def run_expire() -> None:
            jobs.run_expire(self.runtime)

        @task(name=timetable.SCHEDULES)
        def run_schedules() -> None:
            jobs.run_schedules(self.runtime)

        @task(name=RECONCILE)
        def run_reconcile() -> None:
            jobs.run_reconcile(self.runtime)

        @task(name=DEFRAGMENT)
        def run_defragment() -> None:
            jobs.run_defragment(self.runtime)

    @property
    def runtime(self) -> Runtime:
        """What the tasks stand on, between `start` and `stop`."""
        assert self._runtime is not None, "no task is taken before the start"
        return self._runtime

    def start(self, name: str, threads: int, engine: Engine | None = None, incarnation: str | None = None) -> None:
        """
        Make the runtime of a worker called `name`; `incarnation` is its parent's name for this process alone.

        Raises DatabaseBehind, DatabaseUnreachable: a worker never runs on a schema that it does not know.
        """
        self._runtime = runtime.start(
            self.celery, self.settings, name, threads=threads, engine=engine, incarnation=incarnation
        )
        self._drain = threading.Timer(self.settings.pools.drain_timeout.total_seconds(), self._runtime.leases.drain)
        self._drain.daemon = True
        signals.worker_ready.connect(self._on_ready)
        signals.worker_shutting_down.connect(self._on_stopping)

    def stop(self) -> None:
        """Let go of everything."""
        self._drain.cancel()
        self._enter(PoolPhase.UNLOADING)
        self.runtime.close()

    def serve(
        self,
        name: str,
        queues: Sequence[str],
        threads: int,
        engine: Engine | None = None,
        status: Status | None = None,
        heart: Heartbeat | None = None,
        incarnation: str | None = None,
    ) -> int:
        """
        Serve the queues until SIGTERM, then finish what is held, or hand it back; gives the exit code.

        `status` gets each phase, `heart` of the leases that it renews with. Raises what `start` raises.
        """
        self._status = status
        self.start(name, threads, engine, incarnation)
        if engine is not None and heart is not None:
            heart.serve(self.runtime.leases, engine.stalled_for)
        try:
            worker: Worker = self.celery.Worker(
                hostname=f"{name}@{socket.gethostname()}",
                quiet=True,
                pool_cls=POOL,
                consumer_cls=CONSUMER,
                concurrency=threads,
                queues=list(queues),
                without_mingle=True,
                without_gossip=True,
                loglevel=self.settings.log.level.upper(),
            )
            worker.start()
        finally:
            self.stop()
        return worker.exitcode or 0

    def _on_ready(self, **_: Any) -> None:
        _log.info("worker_ready", worker=self.runtime.owner)
        self._enter(PoolPhase.SERVING)

    def _enter(self, phase: PoolPhase) -> None:
        if self._status is not None:
            self._status.enter(phase)

    def _on_stopping(self, **_: Any) -> None:
        if self._stopping:
            return  # it was asked once more
        self._stopping = True
        self._enter(PoolPhase.DRAINING)
        _log.info("worker_draining", worker=self.runtime.owner)
        self._drain.start()
