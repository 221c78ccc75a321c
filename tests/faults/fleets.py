"""A fleet in a stage: models of which a device holds one at a time, what is asked of them, what is seen of pools."""

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
from app.kernel.fleet_settings import SimulatedDevice
from app.kernel.processes import pid_file
from app.kernel.settings import CatalogSettings
from tests.faults.conftest import MODEL, PATIENCE, Stage, generate, until

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
#: It never begins to serve.
ENDLESS = "endless:1"


def with_models(stage: Stage, **more: str) -> Stage:
    """A stage that knows the models; what is given by the first word of a name is added to its entry."""
    catalog = stage.directory / "catalog.toml"
    loads = {ALPHA: "500ms", BETA: "500ms", GAMMA: "500ms", ENDLESS: "1h"}
    entries = (
        _ENTRY.format(name=name, load=load, more=more.get(name.partition(":")[0], "")) for name, load in loads.items()
    )
    catalog.write_text("".join(entries))
    stage.settings = stage.settings.model_copy(update={"catalog": CatalogSettings(files=(catalog,))})
    return stage


def ask(stage: Stage, model: str, tokens: int = 4) -> UUID:
    source = f"workflow: ask\nsteps: [{{id: write, kind: generate, model: '{model}', prompt: x, max_tokens: {tokens}}}]"
    return stage.submit(source)


def complete(model: str) -> str:
    """A workflow of one step in which a real model goes on with a text, eight tokens long."""
    return generate(8).replace(MODEL, model).replace("kind: generate", "kind: generate\n    chat: false")


def pools(stage: Stage, model: str | None = None, *, ended: bool = False) -> Sequence[PoolView]:
    return views.pools(stage.database, model=model, ended=ended)


def serving(stage: Stage, model: str) -> PoolView | None:
    return next((pool for pool in pools(stage, model) if pool.state is PoolState.SERVING), None)


def until_ended(stage: Stage, pool: PoolView) -> PoolView:
    """The pool as it is shown once its bytes are back."""
    return until(lambda: next((p for p in pools(stage, ended=True) if p.id == pool.id and p.state is None), None))


def until_done(stage: Stage, run_ids: Sequence[UUID], seconds: float = PATIENCE) -> None:
    until(lambda: stage.open_runs() == 0, seconds)
    stage.assert_each_step_is_recorded_once(run_ids)


def assert_sound(stage: Stage) -> None:
    """The books keep their promises, and charge exactly what lives or may begin."""
    with stage.database.work() as work:
        found = session.open_session(work, to_read=True).ledger
    assert rules.problems(found) == []


def processes(stage: Stage) -> Iterator[tuple[str, psutil.Process]]:
    """The processes of pools that run, each with the id of its pool."""
    name = str(stage.directory)
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
            if command[1:4] != ["-m", "workers.programs", "pool"]:
                continue
            if process.environ().get("ARRIERO_DATA_DIR", "").startswith(name):
                yield command[4], process
        except psutil.Error:
            continue


def agree(stage: Stage) -> bool:
    """Whether every pool that holds bytes has a living process, and every process of a pool holds bytes."""
    running = {(id_, process.pid) for id_, process in processes(stage)}
    return {(pool.id, pool.pid) for pool in pools(stage)} == running


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    os.kill(pid, number)


def lives(pid: int) -> bool:
    """Whether the process is more than a zombie, which nobody may have reaped."""
    return pid_file.birth(pid) is not None
