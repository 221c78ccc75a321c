"""Helpers for fleets: models of which a device fits one at a time, their steps, and the observed pools."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from uuid import UUID

import psutil

from app.fleet import views
from app.fleet.ledger import rules, session
from app.fleet.pool import PoolState
from app.fleet.views import PoolView
from app.kernel.processes import pid_file
from app.kernel.sections.catalog import CatalogSettings
from app.kernel.sections.fleet import SimulatedDevice
from tests.faults.conftest import MODEL, PATIENCE, Cluster, generate, log_of, pool_of, until

ALPHA, BETA, GAMMA = "alpha:1", "beta:1", "gamma:1"
ONE_DEVICE = (SimulatedDevice(name="sim-0", bytes=1024 * 2**20),)

_ENTRY = """
[[models]]
name = "{name}"
use_cases = ["chat"]
source = {{ path = "/nowhere/{name}.gguf" }}
simulated = {{ bytes = "600MiB", load = "{load}", tokens_per_second = 40 }}
{more}
"""
#: A model that never begins to serve.
ENDLESS = "endless:1"


def with_models(cluster: Cluster, **more: str) -> Cluster:
    """Add the models to the catalogue of a cluster. `more` has further lines of an entry, by the model's family."""
    catalog = cluster.directory / "catalog.toml"
    loads = {ALPHA: "500ms", BETA: "500ms", GAMMA: "500ms", ENDLESS: "1h"}
    entries = (
        _ENTRY.format(name=name, load=load, more=more.get(name.partition(":")[0], "")) for name, load in loads.items()
    )
    catalog.write_text("".join(entries))
    cluster.settings = cluster.settings.model_copy(update={"catalog": CatalogSettings(files=(catalog,))})
    return cluster


def submit_generate(cluster: Cluster, model: str, tokens: int = 4) -> UUID:
    source = f"workflow: ask\nsteps: [{{id: write, kind: generate, model: '{model}', prompt: x, max_tokens: {tokens}}}]"
    return cluster.submit(source)


def complete(model: str) -> str:
    """A workflow of one step in which a real model continues a text by eight tokens."""
    return generate(8).replace(MODEL, model).replace("kind: generate", "kind: generate\n    chat: false")


def pools(cluster: Cluster, model: str | None = None, *, ended: bool = False) -> Sequence[PoolView]:
    return views.pools(cluster.database, model=model, ended=ended)


def serving(cluster: Cluster, model: str) -> PoolView | None:
    return next((pool for pool in pools(cluster, model) if pool.state is PoolState.SERVING), None)


def until_ended(cluster: Cluster, pool: PoolView) -> PoolView:
    """Wait until a pool has released its bytes, and return its view."""
    return until(lambda: next((p for p in pools(cluster, ended=True) if p.id == pool.id and p.state is None), None))


def until_done(cluster: Cluster, run_ids: Sequence[UUID], seconds: float = PATIENCE) -> None:
    until(lambda: cluster.open_runs() == 0, seconds)
    cluster.assert_each_step_is_recorded_once(run_ids)


def assert_consistent(cluster: Cluster) -> None:
    """Check the invariants of the ledger."""
    with cluster.database.work() as work:
        found = session.open_session(work, to_read=True).ledger
    assert rules.problems(found) == []


def processes(cluster: Cluster) -> Iterator[tuple[str, psutil.Process]]:
    """Yield the running processes of pools, each with the id of its pool."""
    name = str(cluster.directory)
    for process in psutil.process_iter():
        try:
            pool = pool_of(process)
            if pool is not None and log_of(process).startswith(name):
                yield pool, process
        except psutil.Error:
            continue


def ledger_matches_processes(cluster: Cluster) -> bool:
    """Whether each pool with reserved bytes has a running process, and each process of a pool has reserved bytes."""
    running = {(id_, process.pid) for id_, process in processes(cluster)}
    return {(pool.id, pool.pid) for pool in pools(cluster)} == running


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    os.kill(pid, number)


def is_alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    return pid_file.birth(pid) is not None
