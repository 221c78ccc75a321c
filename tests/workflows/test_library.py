"""The shipped workflows, on the real model, done by the worker's own code."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml

from app.fleet import files
from app.kernel import settings
from app.workflows import registry, views
from app.workflows.service import Runs
from app.workflows.states import FINAL_RUNS
from app.workflows.submission import Submission
from tests.workflows.conftest import Hands
from workers import pool, steps
from workers.engine.engine import LlamaEngine
from workers.leases import Leases
from workers.runtime import Runtime

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def engine() -> Iterator[LlamaEngine]:
    """The engine that a pool of the small model has, on one thread."""
    host = settings.load(environment={"ARRIERO_POOLS__THREADS": "1"}).settings
    model = files.read_catalog().get("smollm2:135m")
    made = LlamaEngine(files.locate(model, Path()), pool.options_of(model, host, "cpu"))
    yield made
    made.close()


class Workers:
    """A control worker and a pool of the small model, in the test's own process."""

    def __init__(self, runs: Runs, engine: LlamaEngine) -> None:
        self.hands = Hands(runs)
        self._leases = Leases(runs, "library@here/1/abc", interval=timedelta(seconds=3))
        self._runtime = Runtime(settings.load(environment={}).settings, runs, self._leases, engine)
        self._leases.start()

    def close(self) -> None:
        self._leases.close()

    def submit(self, name: str, **inputs: Any) -> UUID:
        return self.hands.runs.submit(Submission(registry.shipped()[name].definition, inputs, registry.SHIPPED)).id

    def work(self, run_id: UUID) -> Any:
        """Do everything that can be done here; gives the run."""
        with ThreadPoolExecutor(4) as threads:
            while rows := [row for row in self.hands.ready(run_id) if row.queue in ("io", "model.smollm2-135m")]:
                list(threads.map(lambda row: steps.run_step(self._runtime, row.id, row.attempt), rows))
        return views.run(self.hands.runs.database, run_id).run


@pytest.fixture
def workers(runs: Runs, engine: LlamaEngine) -> Iterator[Workers]:
    made = Workers(runs, engine)
    yield made
    made.close()


def test_a_digest_quotes(workers: Workers) -> None:
    text = (EXAMPLES / "reports/hut-season.txt").read_text()
    run = workers.work(workers.submit("document-digest", text=text))
    print(run.output, run.error)
    assert 0


def test_x(workers: Workers) -> None:
    for p in sorted((EXAMPLES / "invoices").glob("*.txt")):
        rid=workers.submit("extraction", text=p.read_text())
        run = workers.work(rid)
        v=views.run(workers.hands.runs.database, rid)
        print("RES", p.name, run.state, run.output, run.error, {s.key:(s.state,s.output,s.awaits) for s in v.steps})
    assert 0

def test_y(workers: Workers) -> None:
    rid=workers.submit("nightly-batch", **yaml.safe_load((EXAMPLES / "nightly/2026-11-20.yaml").read_text()))
    run = workers.work(rid)
    print("RES", run.state, run.output, run.error)
    assert 0
