"""A storm of kills over the whole platform on two software GPUs: no run is lost, and no byte is used twice."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.faults import installation
from tests.faults.fleet_chaos import LedgerWatch
from tests.gpu.platform.conftest import MODELS, assert_nothing_is_overcommitted, platform, pools, submit, why_not
from tests.live.conftest import Live, until

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not())]

#: Lost work is found soon; no step fails because of many kills.
SETTINGS = {
    "runs.lease": "10s",
    "runs.heartbeat": "2s",
    "runs.sweep_every": "500ms",
    "runs.republish_after": "3s",
    "runs.max_worker_losses": 100_000,
    "fleet.heartbeat": "1s",
    "fleet.heartbeat_timeout": "10s",
    "fleet.lease": "30s",
    "fleet.agent_lease": "5s",
}
SEED = 14


def test_a_storm_of_kills_loses_no_run_and_uses_no_byte_twice(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    folder = tmp_path / "data"
    folder.mkdir(mode=0o711)
    with platform(folder, **SETTINGS) as tree:
        database = installation.database_of(folder)
        watched: Any = SimpleNamespace(directory=folder, database=database)
        faults: list[Callable[[], str]] = [
            lambda: strike(tree, chance, "pool", signal.SIGKILL),
            lambda: strike(tree, chance, "agent", signal.SIGKILL),
            lambda: strike(tree, chance, "pool", signal.SIGSTOP),
            lambda: strike(tree, chance, "control", signal.SIGKILL),
            lambda: strike(tree, chance, "pool", signal.SIGKILL),
        ]
        chance.shuffle(faults)
        runs, struck = [submit(tree, model, tokens=4) for model in MODELS], Counter[str]()
        with LedgerWatch(watched) as watch:
            for fault in faults:
                runs += [submit(tree, chance.choice(MODELS), tokens=4) for _ in range(2)]
                until(lambda: any(pool["state"] == "serving" for pool in pools(tree)))
                struck[fault()] += 1
                progress(tree, runs)
                assert_nothing_is_overcommitted(tree)
            ends = [tree.until_ended(run_id) for run_id in runs]
        database.close()
        assert {end["state"] for end in ends} == {"succeeded"}
        assert watch.problems == []
        assert watch.checks > len(faults)
        assert struck["pool"] == 3, struck
        for end in ends:
            (step,) = end["steps"]
            assert sum(attempt["outcome"] == "succeeded" for attempt in step["attempts"]) == 1, "it is recorded once"


def strike(tree: Live, chance: random.Random, program: str, number: signal.Signals) -> str:
    """Send a signal to one of the programs of this name, and return the name."""
    found = until(
        lambda: [pid for name, pid in installation.pids(tree.folder).items() if name.partition(" ")[0] == program]
    )
    pid = chance.choice(sorted(found))
    if number is signal.SIGKILL:
        installation.kill(pid)
    else:
        os.kill(pid, number)
    return program


def progress(tree: Live, runs: list[str]) -> None:
    """Wait until one more run has succeeded."""
    done = succeeded(tree, runs)
    until(lambda: succeeded(tree, runs) > done)


def succeeded(tree: Live, runs: list[str]) -> int:
    return sum(tree.run(run_id)["state"] == "succeeded" for run_id in runs)
