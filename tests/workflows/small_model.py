"""A pool of the small model and a control worker in the process of a test."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from app.catalog import files
from app.kernel import settings
from app.kernel.activity import Activity
from app.kernel.security.secrets import Secrets
from app.scheduler.wake_up import AgentCalls
from app.workflows.runs.service import Runs
from tests.workflows.conftest import StepWorker
from workers import steps
from workers.engine.engine import LlamaEngine
from workers.leases import Leases
from workers.pool import pool
from workers.runtime import Runtime


def engine_of(name: str, folder: Path = Path()) -> LlamaEngine:
    """The engine of a model's pool, on one thread. `folder` has the files that were made or downloaded."""
    host = settings.load(environment={}).settings
    model = files.read_catalog().get(name)
    return LlamaEngine(files.locate(model, folder), pool.options_of(model, host, gpus=False, threads=1))


class Pools:
    """A pool for each engine, by the queue of its model."""

    def __init__(self, runs: Runs, engines: Mapping[str, LlamaEngine]) -> None:
        self.worker = StepWorker(runs)
        self._leases = Leases(runs, "pools@here/1/abc", interval=timedelta(seconds=3))
        own, catalog = settings.load(environment={}).settings, files.read_catalog()
        self._runtimes = {
            queue: Runtime(
                own,
                runs,
                self._leases,
                engine,
                Secrets({}),
                catalog,
                Activity("redis://127.0.0.1:1"),
                AgentCalls("redis://127.0.0.1:1"),
            )
            for queue, engine in [("io", None), *engines.items()]
        }
        self._leases.start()

    def close(self) -> None:
        self._leases.close()

    def work(self, run_id: UUID, *, others: bool = False) -> Any:
        """
        Run all ready steps one by one, so that prompts share their prefixes; return the run.

        With `others`, those of other runs too, such as called ones.
        """
        of = None if others else run_id
        while rows := [row for row in self.worker.ready(of) if row.queue in self._runtimes]:
            for row in rows:
                steps.run_step(self._runtimes[row.queue], row.id, row.attempt)
        return self.worker.run(run_id)
