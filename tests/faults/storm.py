"""
Storms: a fleet whose parts are killed at random in the middle of loads, drains and work, and watched meanwhile.

By hand, for long ones:

    python -m tests.faults.storm kills --count 100 --seed 1
    python -m tests.faults.storm turns --count 300 --models smollm2:135m gemma3:270m

`turns` asks models in turn, and counts how often the device changes hands; real models of the catalogue are pulled.
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
from tests.faults.conftest import RUNS, Stage, assert_nothing_left, until
from tests.faults.fleets import (
    ALPHA,
    BETA,
    GAMMA,
    ONE_DEVICE,
    agree,
    ask,
    assert_sound,
    complete,
    kill,
    pools,
    processes,
    until_done,
    with_models,
)

HOSTS = ("west", "east")
#: Seconds for a moment of the kind that is waited for; without one, any will do.
_MOMENT = 3.0

_CLAIMS = text("""
    SELECT reservation.id::text, reservation.state, device.id AS device, bytes, capacity_bytes AS capacity,
           host.lost_at IS NOT NULL AS lost
    FROM reservation JOIN reservation_device ON reservation_id = reservation.id JOIN device ON device.id = device_id
    JOIN host ON host.name = device.host
""")


class Watch:
    """Looks, again and again, whether processes that live are charged, and fit into their devices together."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.looks = 0
        self.wrong: list[str] = []

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._closed.wait(0.2):
            with contextlib.suppress(DatabaseUnreachable):
                self.once()

    def once(self) -> None:
        """Only processes that live before and after the rows are read are held against them."""
        before = {id_: (process.pid, pid_file.birth(process.pid)) for id_, process in processes(self._stage)}
        with self._stage.database.work() as work:
            rows = work.rows(_CLAIMS)
        alive = {id_ for id_, (pid, birth) in before.items() if birth and pid_file.birth(pid) == birth}
        touched: Counter[str] = Counter()
        capacity = {row.device: row.capacity for row in rows}
        for row in rows:
            if row.id in alive:
                touched[row.device] += row.bytes
                if row.state in {"released", "held"} and not row.lost:
                    self.wrong.append(f"pool {row.id} lives and is {row.state}")
        for device, size in touched.items():
            if size > capacity[device]:
                self.wrong.append(f"{size} bytes of {device} are touched, of {capacity[device]}")
        self.looks += 1


@dataclass
class Storm:
    """What a storm did."""

    kills: Counter[str] = field(default_factory=Counter)
    runs: list[UUID] = field(default_factory=list)
    #: Seconds from a kill until ledger and processes agreed again.
    agreed: list[float] = field(default_factory=list)
    looks: int = 0


def kills(stage: Stage, count: int, seed: int, *, freeze: bool = False, every: int = 4) -> Storm:
    """
    Kill so many of pools, agents, control workers and the broker, while runs for three models are on two devices.

    With `freeze`, pools are also stopped by a signal, and have to be ended by their agents.
    """
    chance, done = random.Random(seed), Storm()
    models = (ALPHA, BETA, GAMMA)
    agents = {name: stage.agent(name, simulated=ONE_DEVICE) for name in HOSTS}
    assert all(agent.ready() for agent in agents.values())
    control = stage.nodes["control"]

    def feed() -> None:
        while stage.open_runs() < 10:
            done.runs.append(ask(stage, chance.choice(models), chance.randint(4, 60)))

    def agent_of(pool: PoolView) -> str:
        host: str = pool.host
        return host

    def kill_pool(pool: PoolView) -> None:
        with contextlib.suppress(ProcessLookupError):
            kill(pool.pid)

    def kill_agent(pool: PoolView) -> None:
        agents[agent_of(pool)].kill("SIGKILL")
        agents[agent_of(pool)].container.revive()

    def kill_both(pool: PoolView) -> None:
        agents[agent_of(pool)].kill("SIGKILL")
        kill_pool(pool)
        agents[agent_of(pool)].container.revive()

    def kill_control(_: PoolView) -> None:
        control.kill("SIGKILL")
        control.container.revive()

    def kill_broker(_: PoolView) -> None:
        stage.broker.kill("SIGKILL")
        stage.broker.restart()

    def freeze_pool(pool: PoolView) -> None:
        with contextlib.suppress(ProcessLookupError):
            kill(pool.pid, signal.SIGSTOP)

    ways: Mapping[str, Callable[[PoolView], None]] = {
        "pool": kill_pool,
        "agent": kill_agent,
        "agent and pool": kill_both,
        "control worker": kill_control,
        "broker": kill_broker,
    } | ({"frozen pool": freeze_pool} if freeze else {})
    deck: list[str] = []
    with Watch(stage) as watch:
        for number in range(count):
            feed()
            if not deck:  # each in turn, in another order each time
                deck = chance.sample([*ways, "pool"], len(ways) + 1)
            way, moment = deck.pop(), chance.choice(sorted(_MOMENTS))
            pool = _wait_for(stage, moment)
            ways[way](pool)
            done.kills[f"{way}, {moment}"] += 1
            if number % every == every - 1:
                began = time.monotonic()
                until(lambda: agree(stage))
                done.agreed.append(time.monotonic() - began)
                assert_sound(stage)
            assert watch.wrong == []
        until_done(stage, done.runs, 180)
        until(lambda: agree(stage))
    assert watch.wrong == []
    assert_sound(stage)
    done.looks = watch.looks
    return done


#: In the middle of what a pool is when something is killed.
_MOMENTS: Mapping[str, Callable[[PoolView], bool]] = {
    "loading": lambda pool: pool.phase in {"starting", "loading", "warming"},
    "draining": lambda pool: pool.desired != "run" or pool.phase in {"draining", "unloading"},
    "working": lambda pool: bool(pool.busy),
}


def _wait_for(stage: Stage, moment: str) -> PoolView:
    """A pool with a process, in that moment if one comes about."""
    limit = time.monotonic() + _MOMENT

    def found() -> PoolView | None:
        running = [pool for pool in pools(stage) if pool.pid is not None]
        meant = [pool for pool in running if _MOMENTS[moment](pool)]
        return next(iter(meant or (running if time.monotonic() > limit else ())), None)

    return until(found)


@dataclass
class Turns:
    """What models that take turns did."""

    requests: int
    seconds: float
    #: By model, pools that were started.
    pools: Counter[str]
    failed: int
    #: By model, the most that was reserved and the most that was used.
    bytes: dict[str, tuple[int, int]]

    @property
    def switches(self) -> int:
        return sum(self.pools.values()) - 1


def turns(stage: Stage, models: Sequence[str], count: int, pause: float) -> Turns:
    """Ask the models in turn, one request each `pause` seconds, and wait until all is done."""
    began, runs = time.monotonic(), []
    rest = threading.Event()
    with Watch(stage) as watch:
        for number in range(count):
            model = models[number % len(models)]
            real = model not in {ALPHA, BETA, GAMMA}
            runs.append(stage.submit(complete(model)) if real else ask(stage, model, 8))
            rest.wait(pause)
        until_done(stage, runs, 900)
    assert watch.wrong == []
    assert_sound(stage)
    seen = pools(stage, ended=True)
    sizes: dict[str, tuple[int, int]] = {}
    for pool in seen:
        reserved, used = sizes.get(pool.model, (0, 0))
        now = sum(pool.bytes.values()), sum((pool.peak or {}).values())
        assert now[1] <= now[0], f"{pool.model} used {now[1]} of {now[0]}"
        sizes[pool.model] = max(reserved, now[0]), max(used, now[1])
    return Turns(
        count,
        time.monotonic() - began,
        Counter(pool.model for pool in seen),
        sum(bool(pool.failed) for pool in seen),
        sizes,
    )


def patient(stage: Stage, *, lease: float = 8.0) -> None:
    """Settings under which no step is given up because it met too many kills, and what hangs is found soon."""
    found = timedelta(seconds=lease)
    fleet = stage.settings.fleet.model_copy(update={"lease": found, "heartbeat_timeout": found})
    runs = RUNS.model_copy(update={"max_worker_losses": 1000})
    stage.settings = stage.settings.model_copy(update={"fleet": fleet, "runs": runs})


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kills", "turns"))
    parser.add_argument("--models", nargs="+", default=[ALPHA, BETA])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pause", type=float, default=0.5)
    parser.add_argument("--ram", type=int, default=1500, help="MiB that real models may hold")
    given = parser.parse_args(arguments)
    directory = Path(tempfile.mkdtemp(prefix="storm"))
    directory.chmod(0o711)
    server = start_postgres(directory / "postgres")
    database = Database(server.url, pool_size=1)
    database.upgrade()
    database.close()
    server.stop()
    stage = Stage(directory)
    try:
        stage.start()
        with_models(stage)
        patient(stage)
        stage.control()
        stage.beat()
        if given.what == "kills":
            sys.stdout.write(f"{kills(stage, given.count, given.seed, freeze=True)}\n")
        else:
            real = [model for model in given.models if model not in {ALPHA, BETA, GAMMA}]
            for model in real:
                files.pull(files.read_catalog().get(model), directory / "agent")
            more = {"ram": given.ram * 2**20} if real else {"simulated": ONE_DEVICE}
            assert stage.agent(**more).ready()
            found = turns(stage, given.models, given.count, given.pause)
            sys.stdout.write(f"{found}, {found.switches} switches\n")
    finally:
        stage.close()
        assert_nothing_left(directory)
        shutil.rmtree(directory)


if __name__ == "__main__":
    main(sys.argv[1:])
