"""
Chaos test of a fleet: its parts are killed at random during loads, drains and work, and the ledger is watched.

The suite runs a short one. Long ones by hand:

    python -m tests.faults.fleet_chaos kills --count 100 --seed 1
    python -m tests.faults.fleet_chaos turns --count 300 --models smollm2:135m gemma3:270m

`turns` requests models in turn, and counts how often the device gets another model; files of real models are pulled.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from uuid import UUID

from sqlalchemy import text

from app.catalog import files
from app.fleet.views import PoolView
from app.kernel.database import Database
from app.kernel.embedded import start_postgres
from app.kernel.errors import DatabaseUnreachable
from app.kernel.processes import pid_file
from tests.faults.conftest import RUNS, Cluster, assert_nothing_left, until
from tests.faults.fleets import (
    ALPHA,
    BETA,
    GAMMA,
    ONE_DEVICE,
    assert_consistent,
    complete,
    kill,
    ledger_matches_processes,
    pools,
    processes,
    submit_generate,
    until_done,
    with_models,
)
from tests.faults.zygote import Zygote

HOSTS = ("west", "east")
#: Most seconds to wait for a pool in the wanted activity; then any pool is killed.
_WAIT = 3.0

_CLAIMS = text("""
    SELECT reservation.id::text, reservation.state, device.id AS device, bytes, capacity_bytes AS capacity,
           host.lost_at IS NOT NULL AS lost
    FROM reservation JOIN reservation_device ON reservation_id = reservation.id JOIN device ON device.id = device_id
    JOIN host ON host.name = device.host
""")


class LedgerWatch:
    """A thread that checks repeatedly that running pools have reservations, and that these fit into their devices."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.checks = 0
        self.problems: list[str] = []

    def __enter__(self) -> LedgerWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.wait(0.2):
            with contextlib.suppress(DatabaseUnreachable):
                self.check()

    def check(self) -> None:
        """Compare the reservations with the processes that run both before and after the rows are read."""
        before = {id_: (process.pid, pid_file.birth(process.pid)) for id_, process in processes(self._cluster)}
        with self._cluster.database.work() as work:
            rows = work.rows(_CLAIMS)
        alive = {id_ for id_, (pid, birth) in before.items() if birth and pid_file.birth(pid) == birth}
        used: Counter[str] = Counter()
        capacity = {row.device: row.capacity for row in rows}
        for row in rows:
            if row.id in alive:
                used[row.device] += row.bytes
                if row.state in {"released", "held"} and not row.lost:
                    self.problems.append(f"pool {row.id} runs, and its reservation is {row.state}")
        for device, size in used.items():
            if size > capacity[device]:
                self.problems.append(f"{size} of {capacity[device]} bytes of {device} are used")
        self.checks += 1


@dataclass
class ChaosResult:
    """The result of a chaos test."""

    kills: Counter[str] = field(default_factory=Counter)
    runs: list[UUID] = field(default_factory=list)
    #: Seconds from a kill until ledger and processes matched again.
    recovery: list[float] = field(default_factory=list)
    checks: int = 0


def kill_at_random(cluster: Cluster, count: int, seed: int, *, freeze: bool = False, every: int = 4) -> ChaosResult:
    """
    Do so many kills of pools, agents, control workers and the broker, while runs use three models on two devices.

    With `freeze`, pools are also stopped by SIGSTOP, so that their agents must kill them. After each
    `every` kills the ledger and the processes must match again.
    """
    chance, result = random.Random(seed), ChaosResult()
    models = (ALPHA, BETA, GAMMA)
    agents = {name: cluster.agent(name, simulated=ONE_DEVICE) for name in HOSTS}
    assert all(agent.ready() for agent in agents.values())
    control = cluster.nodes["control"]

    def submit_runs() -> None:
        while cluster.open_runs() < 10:
            result.runs.append(submit_generate(cluster, chance.choice(models), chance.randint(4, 60)))

    def agent_of(pool: PoolView) -> str:
        host: str = pool.host
        return host

    def kill_pool(pool: PoolView) -> None:
        with contextlib.suppress(ProcessLookupError):
            kill(pool.pid)

    def kill_agent(pool: PoolView) -> None:
        agents[agent_of(pool)].kill("SIGKILL")
        agents[agent_of(pool)].container.restart_without_waiting()

    def kill_both(pool: PoolView) -> None:
        agents[agent_of(pool)].kill("SIGKILL")
        kill_pool(pool)
        agents[agent_of(pool)].container.restart_without_waiting()

    def kill_control(_: PoolView) -> None:
        control.kill("SIGKILL")
        control.container.restart_without_waiting()

    def kill_broker(_: PoolView) -> None:
        cluster.broker.kill("SIGKILL")
        cluster.broker.restart()

    def freeze_pool(pool: PoolView) -> None:
        with contextlib.suppress(ProcessLookupError):
            kill(pool.pid, signal.SIGSTOP)

    faults: Mapping[str, Callable[[PoolView], None]] = {
        "pool": kill_pool,
        "agent": kill_agent,
        "agent and pool": kill_both,
        "control worker": kill_control,
        "broker": kill_broker,
    } | ({"frozen pool": freeze_pool} if freeze else {})
    remaining: list[str] = []
    with LedgerWatch(cluster) as watch:
        for number in range(count):
            submit_runs()
            if not remaining:  # each fault in turn, in a new random order
                remaining = chance.sample([*faults, "pool"], len(faults) + 1)
            fault, activity = remaining.pop(), chance.choice(sorted(_ACTIVITIES))
            pool = _wait_for(cluster, activity)
            faults[fault](pool)
            result.kills[f"{fault}, {activity}"] += 1
            if number % every == every - 1:
                began = time.monotonic()
                until(lambda: ledger_matches_processes(cluster))
                result.recovery.append(time.monotonic() - began)
                assert_consistent(cluster)
            assert watch.problems == []
        until_done(cluster, result.runs, 180)
        until(lambda: ledger_matches_processes(cluster))
    assert watch.problems == []
    assert_consistent(cluster)
    result.checks = watch.checks
    return result


#: What a pool does at the time of a kill.
_ACTIVITIES: Mapping[str, Callable[[PoolView], bool]] = {
    "loading": lambda pool: pool.phase in {"starting", "loading", "warming"},
    "draining": lambda pool: pool.desired != "run" or pool.phase in {"draining", "unloading"},
    "working": lambda pool: bool(pool.busy),
}


def _wait_for(cluster: Cluster, activity: str) -> PoolView:
    """Wait for a pool with a process, in that activity if one is found in time."""
    limit = time.monotonic() + _WAIT

    def found() -> PoolView | None:
        running = [pool for pool in pools(cluster) if pool.pid is not None]
        wanted = [pool for pool in running if _ACTIVITIES[activity](pool)]
        return next(iter(wanted or (running if time.monotonic() > limit else ())), None)

    return until(found)


@dataclass
class AlternationResult:
    """The result of requests for alternating models."""

    requests: int
    seconds: float
    #: By model, pools that were started.
    pools: Counter[str]
    failed: int
    #: By model, the most reserved and the most used bytes.
    bytes: dict[str, tuple[int, int]]

    @property
    def switches(self) -> int:
        return sum(self.pools.values()) - 1


def alternate(cluster: Cluster, models: Sequence[str], count: int, pause: float) -> AlternationResult:
    """Submit requests for the models in turn, one every `pause` seconds, and wait until all have ended."""
    began, runs = time.monotonic(), []
    pauses = threading.Event()
    with LedgerWatch(cluster) as watch:
        for number in range(count):
            model = models[number % len(models)]
            real = model not in {ALPHA, BETA, GAMMA}
            runs.append(cluster.submit(complete(model)) if real else submit_generate(cluster, model, 8))
            pauses.wait(pause)
        until_done(cluster, runs, 900)
    assert watch.problems == []
    assert_consistent(cluster)
    found = pools(cluster, ended=True)
    sizes: dict[str, tuple[int, int]] = {}
    for pool in found:
        reserved, used = sizes.get(pool.model, (0, 0))
        now = sum(pool.bytes.values()), sum((pool.peak or {}).values())
        assert now[1] <= now[0], f"{pool.model} used {now[1]} of {now[0]}"
        sizes[pool.model] = max(reserved, now[0]), max(used, now[1])
    return AlternationResult(
        count,
        time.monotonic() - began,
        Counter(pool.model for pool in found),
        sum(bool(pool.failed) for pool in found),
        sizes,
    )


def tolerate_kills(cluster: Cluster, *, lease: float = 8.0) -> None:
    """Change the settings so that no step fails because of too many kills, and hanging pools are found soon."""
    timeout = timedelta(seconds=lease)
    fleet = cluster.settings.fleet.model_copy(update={"lease": timeout, "heartbeat_timeout": timeout})
    runs = RUNS.model_copy(update={"max_worker_losses": 1000})
    cluster.settings = cluster.settings.model_copy(update={"fleet": fleet, "runs": runs})


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kills", "turns"))
    parser.add_argument("--models", nargs="+", default=[ALPHA, BETA])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pause", type=float, default=0.5)
    parser.add_argument("--ram", type=int, default=1500, help="MiB of RAM for real models")
    given = parser.parse_args(arguments)
    directory = Path(tempfile.mkdtemp(prefix="fleet-chaos"))
    directory.chmod(0o711)
    server = start_postgres(directory / "postgres")
    database = Database(server.url, pool_size=1)
    database.upgrade()
    database.close()
    server.stop()
    zygote = Zygote()
    cluster = Cluster(directory, zygote)
    try:
        cluster.start()
        with_models(cluster)
        tolerate_kills(cluster)
        cluster.control()
        cluster.beat()
        if given.what == "kills":
            sys.stdout.write(f"{kill_at_random(cluster, given.count, given.seed, freeze=True)}\n")
        else:
            real = [model for model in given.models if model not in {ALPHA, BETA, GAMMA}]
            for model in real:
                files.pull(files.read_catalog().get(model), directory / "agent")
            more = {"ram": given.ram * 2**20} if real else {"simulated": ONE_DEVICE}
            assert cluster.agent(**more).ready()
            found = alternate(cluster, given.models, given.count, given.pause)
            sys.stdout.write(f"{found}, {found.switches} switches\n")
    finally:
        cluster.close()
        zygote.close()
        assert_nothing_left(directory)
        shutil.rmtree(directory)


if __name__ == "__main__":
    main(sys.argv[1:])
