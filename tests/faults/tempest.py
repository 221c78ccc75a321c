"""
Tempests: a whole installation under kills, freezes, large values and hostile inputs, watched from outside.

By hand, for long ones:

    python -m tests.faults.tempest --kills 100 --seed 1
    python -m tests.faults.tempest --kills 20 --seed 7 --large 1 --items 300 --hostile none

`arriero up` runs as a process of its own. It, its servers and all that it started are killed, or stopped by a signal
for longer than leases last. Runs of many kinds are submitted over HTTP, with values of many megabytes, maps of
thousands of items, and what `hostile.py` lists in between.

What is asked, all the time and in the end: every run that was accepted ends as it should, each step is recorded once,
no byte of a device is in two hands, no input gets an answer of 500, a file or a connection, and afterwards no process
grows. How much of the time the API answered is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import psutil
from sqlalchemy import text

from app.fleet import views as fleet_views
from app.kernel import embedded
from app.kernel.errors import DatabaseUnreachable
from app.kernel.processes import pid_file
from app.workflows.state_machine.states import FINAL_RUNS
from tests.faults import hostile, installation
from tests.faults.conftest import assert_nothing_left, until
from tests.faults.fleets import ALPHA, BETA, GAMMA, assert_sound, processes
from tests.faults.installation import killed, members, pids, signalled
from tests.faults.storm import Watch
from tests.faults.work import Work, ask, chain, large, mapped

MODELS = (ALPHA, BETA, GAMMA)
#: Short, so that what is lost is found soon. A step that meets many kills is not given up.
SETTINGS = {
    "runs.lease": "4s",
    "runs.heartbeat": "1s",
    "runs.sweep_every": "500ms",
    "runs.republish_after": "2s",
    "runs.max_worker_losses": "100000",
    "fleet.heartbeat": "500ms",
    "fleet.heartbeat_timeout": "5s",
    "fleet.lease": "20s",
    "fleet.agent_lease": "5s",
    "fleet.reconcile_every": "500ms",
    "fleet.simulated": '[{"name": "sim-0", "bytes": "1GiB"}, {"name": "sim-1", "bytes": "1GiB"}]',
    "pools.models": "",
    "pools.drain_timeout": "5s",
    "api.max_body_bytes": str(80 * 2**20),
}
#: Seconds for which something is stopped by a signal: within a lease, beyond that of steps, beyond that of silence.
FREEZES = (1.0, 6.0, 12.0)
#: Runs that are open at a time.
_OPEN = 12
#: What a process may grow by while the same is done again, in bytes and in open files.
_GROWTH, _FILES = 24 * 2**20, 6

_COUNTS = text("""
    SELECT count(*) FILTER (WHERE state NOT IN ('succeeded', 'failed', 'cancelled')) AS open, count(*) AS runs FROM run
""")
_STEPS = text("""
    SELECT step.run_id::text, step.key, step.kind, step.state,
           count(*) FILTER (WHERE outcome = 'succeeded') AS succeeded,
           count(*) FILTER (WHERE outcome = 'left') AS left_once,
           count(*) FILTER (WHERE attempt.step_id IS NOT NULL AND outcome IS NULL) AS open
    FROM step LEFT JOIN attempt ON attempt.step_id = step.id GROUP BY step.id
""")
_RUNS = text("SELECT id::text, state, idempotency_key, error::text AS error FROM run")
_LEFT = text("""
    SELECT workflow, key, step.state FROM step JOIN run ON run.id = run_id
    WHERE run.finished_at IS NULL AND step.finished_at IS NULL ORDER BY run.id, position LIMIT 20
""")
#: Kinds whose step succeeds otherwise than by a record of its holder.
_OUTSIDE = frozenset({"switch", "map", "workflow", "wait"})


@dataclass(frozen=True)
class Plan:
    """How hard it blows."""

    kills: int = 100
    seed: int = 1
    large: Sequence[int] = (16, 40, 60)
    items: int = 5000
    hostile: Sequence[str] = tuple(hostile.ATTACKS)
    #: Parts of FREEZES.
    freezes: Sequence[float] = FREEZES
    #: Seconds for all runs to end.
    patience: float = 600.0


@dataclass
class Seen:
    """What was seen of a tempest."""

    faults: Counter[str] = field(default_factory=Counter)
    work: Counter[str] = field(default_factory=Counter)
    hostile: Counter[str] = field(default_factory=Counter)
    #: Seconds of each start of `arriero up` after it was killed.
    starts: list[float] = field(default_factory=list)
    #: By path, how many answers came in time and how many did not, and the seconds of the former.
    answered: dict[str, list[float]] = field(default_factory=dict)
    missed: Counter[str] = field(default_factory=Counter)
    #: Seconds in which nothing, or 503, was answered.
    away: dict[str, float] = field(default_factory=dict)
    probed: float = 0.0
    looks: int = 0
    #: By program, the most bytes that one of them held.
    most: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    #: Seconds from the last fault until the last run had ended.
    settled: float = 0.0

    def shown(self) -> str:
        lines = [
            f"{sum(self.faults.values())} faults in {self.seconds:.0f} s: {_listed(self.faults)}",
            f"{sum(self.work.values())} runs: {_listed(self.work)}",
            f"the last run ended {self.settled:.0f} s after the last fault",
            f"{sum(self.hostile.values())} hostile inputs of {len(self.hostile)} kinds",
            f"starts of a killed up: {', '.join(f'{one:.1f} s' for one in self.starts) or 'none'}",
        ]
        for path, times in self.answered.items():
            part = len(times) / max(1, len(times) + self.missed[path])
            p99 = statistics.quantiles(times, n=100)[98] if len(times) > 1 else 0.0
            there = 1 - self.away.get(path, 0.0) / max(1.0, self.probed)
            asked = len(times) + self.missed[path]
            lines.append(f"{path}: there {there:.1%} of the time; {part:.1%} of {asked} answered, p99 {p99:.2f} s")
        lines.append(f"{self.looks} looks at the ledger; most memory: {_listed(self.most, 2**20, ' MiB')}")
        return "\n".join(lines) + "\n"


class Tempest:
    """One installation, and what befalls it."""

    def __init__(self, directory: Path, plan: Plan) -> None:
        self.directory, self.plan = directory / "data", plan
        self._said = directory / "said.txt"
        self._chance = random.Random(plan.seed)
        self._port = embedded.endpoint.free_port(directory)
        self._settings = SETTINGS | {"api.port": str(self._port)}
        self.seen = Seen()
        self._over = threading.Event()
        #: By idempotency key, what was accepted.
        self._accepted: dict[str, Work] = {}
        self._feeding = 0
        self._frozen: dict[int, threading.Timer] = {}
        self._ups = 0
        self._up: subprocess.Popen[bytes] | None = None
        self._up_stack = ExitStack()

    # ---- the whole ----

    def run(self) -> Seen:
        """Let it blow; fail with what does not hold."""
        began = time.monotonic()
        with ExitStack() as stack:
            stack.callback(lambda: self._up_stack.close())
            stack.callback(self._thaw_all)
            self._start_up()
            bait = hostile.Bait()
            stack.callback(bait.close)
            self._client = stack.enter_context(self._new_client(60.0))
            self.database = installation.database_of(self.directory)
            stack.callback(self.database.close)
            valkey = embedded.find_valkey_url(self.directory)
            assert valkey is not None
            self._target = hostile.Target(stack.enter_context(self._new_client(10.0)), valkey, bait)
            with Watch(self._as_stage()) as watch, self._beside(self._feed), self._beside(self._probe):
                self._blow(watch)
                self._over.set()
            self._calm_down(watch)
            assert bait.reached == 0, "a document made somebody call"
            self.seen.looks = watch.looks
            self._see_that_nothing_grows()
            self._stop()
        self.seen.seconds = time.monotonic() - began
        return self.seen

    def _blow(self, watch: Watch) -> None:
        deck: list[tuple[str, str]] = []
        attacks: deque[str] = deque()
        for _ in range(self.plan.kills):
            if not deck:  # each in turn, in another order each time
                programs = ("pool", "agent", "control", "beat", "api", "Postgres", "Valkey", "up")
                deck = [(how, who) for how in ("kill", "freeze") for who in programs]
                self._chance.shuffle(deck)
            how, who = deck.pop()
            for _ in range(2 if self.plan.hostile else 0):
                if not attacks:
                    attacks.extend(self._chance.sample(list(self.plan.hostile), len(self.plan.hostile)))
                name = attacks.popleft()
                self.seen.hostile[name] += 1
                hostile.attack(self._target, name)
            self._befall(how, who)
            self._wait_for_progress()
            assert watch.wrong == []
            assert self._target.wrong == []

    def _befall(self, how: str, who: str) -> None:
        if who == "up":
            pid = self._up.pid if self._up is not None else 0
        else:
            found = [pid for name, pid in pids(self.directory).items() if name.partition(" ")[0] == who]
            pid = self._chance.choice(sorted(found)) if found else 0
        self.seen.faults[f"{how} {who}" if pid else f"no {who} there"] += 1
        if not pid:
            return
        if how == "freeze":
            self._freeze(pid, alone=who in {"up", "agent"})
        elif who == "up":
            self._thaw_all()  # a frozen part would be found by the next start, which has its own test
            killed(pid)
            self._start_up()
        else:
            killed(pid)

    def _freeze(self, pid: int, *, alone: bool) -> None:
        """Stop it, and let it go on later, if it was not ended for that."""
        born = pid_file.birth(pid)

        def thaw() -> None:
            if pid_file.birth(pid) == born:
                self._signal(pid, signal.SIGCONT, alone)

        self._signal(pid, signal.SIGSTOP, alone)
        timer = threading.Timer(self._chance.choice(list(self.plan.freezes)), thaw)
        self._frozen[pid] = timer
        timer.daemon = True
        timer.start()

    def _signal(self, pid: int, number: signal.Signals, alone: bool) -> None:
        if alone:
            with contextlib.suppress(psutil.Error):
                psutil.Process(pid).send_signal(number)
        else:
            signalled(pid, number)

    def _thaw_all(self) -> None:
        for pid, timer in self._frozen.items():
            timer.cancel()
            timer.join()
            if pid_file.is_stopped(pid):
                timer.function()
        self._frozen.clear()

    # ---- the installation ----

    def _start_up(self) -> None:
        """Start `arriero up`, anew if it was killed, and wait until it says that everything is up."""
        began = time.monotonic()
        if self._up is not None:
            self._up.wait()
        catalog = installation.catalogue(*MODELS, load="300ms")
        self._up_stack.close()
        self._up = self._up_stack.enter_context(installation.up(self.directory, self._said, self._settings, catalog))
        self._ups += 1
        up = self._up
        until(lambda: installation.is_up(up, self._said, times=self._ups), 180)
        if self._ups > 1:
            self.seen.starts.append(time.monotonic() - began)

    def _stop(self) -> None:
        assert self._up is not None
        self._up.send_signal(signal.SIGINT)
        up = self._up
        until(lambda: up.poll() is not None)
        assert up.returncode == 0, self._said.read_text()[-2000:]

    def _new_client(self, timeout: float) -> httpx2.Client:
        return httpx2.Client(base_url=f"http://127.0.0.1:{self._port}", trust_env=False, timeout=timeout)

    def _as_stage(self) -> Any:
        """What the helpers of the fleet's tests look at."""
        return SimpleNamespace(directory=self.directory, database=self.database)

    @contextlib.contextmanager
    def _beside(self, loop: Callable[[], None]) -> Iterator[None]:
        def guarded() -> None:
            try:
                loop()
            except Exception as error:  # noqa: BLE001 a thread's outermost loop: the main thread fails with it
                self._target.wrong.append(f"{loop.__name__}: {error!r}")

        thread = threading.Thread(target=guarded, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    # ---- what is asked of it ----

    def _feed(self) -> None:
        """Submit, each under a key of its own, until it is accepted; never more than some runs at a time."""
        chance = random.Random(self.plan.seed + 1)
        works = self._works(chance)
        while not self._over.wait(0.05):
            try:
                with self.database.work() as work:
                    row = work.row(_COUNTS)
            except DatabaseUnreachable:
                continue
            if row is not None and row.open < _OPEN:
                self._submit(next(works), f"tempest-{len(self._accepted)}")

    def _works(self, chance: random.Random) -> Iterator[Work]:
        sizes: deque[int] = deque(self.plan.large)
        number = 0
        while True:
            number += 1
            if number % 10 == 5 and sizes:
                sizes.rotate(-1)
                yield large(sizes[-1])
            elif number % 20 == 9 and self.plan.items:
                yield mapped(self.plan.items)
            elif number % 3 == 0:
                yield chain(chance.randint(2, 12))
            elif number % 7 == 1:
                yield mapped(40)
            else:
                yield ask(chance.choice(MODELS), chance.randint(4, 60))

    def _submit(self, asked: Work, key: str) -> None:
        """Until it is accepted, whatever is away meanwhile."""
        body, rest = {"definition": asked.definition, "inputs": asked.inputs}, threading.Event()
        limit = time.monotonic() + self.plan.patience
        while True:
            assert time.monotonic() < limit, f"{asked.name} was not accepted in {self.plan.patience:g} s"
            with contextlib.suppress(httpx2.TransportError):
                answer = self._client.post("/v1/runs", json=body, headers={"Idempotency-Key": key})
                if answer.status_code in (200, 202):
                    self._accepted[key] = asked
                    self.seen.work[asked.name] += 1
                    return
                assert answer.status_code in (500, 503), f"{asked.name}: {answer.status_code} {answer.text[:500]}"
                if answer.status_code == 500:
                    self._target.wrong.append(f"{asked.name} was answered with 500: {answer.text[:200]}")
            rest.wait(0.2)

    def _wait_for_progress(self) -> None:
        """Until some runs more have ended, or a moment has passed."""
        limit, rest = time.monotonic() + self._chance.uniform(0.5, 3.0), threading.Event()
        before = self._ended()
        while time.monotonic() < limit and self._ended() < before + 4:
            rest.wait(0.1)

    def _ended(self) -> int:
        with contextlib.suppress(DatabaseUnreachable), self.database.work() as work:
            row = work.row(_COUNTS)
            return row.runs - row.open if row is not None else 0
        return 0

    # ---- what is seen ----

    def _probe(self) -> None:
        """Ask the API again and again, as a load balancer and as a client would; and look at processes."""
        since = time.monotonic()
        with self._new_client(5.0) as client:
            while not self._over.wait(0.2):
                for path in ("/healthz", "/v1/runs?limit=1"):
                    began = time.monotonic()
                    try:
                        good = client.get(path).is_success
                    except httpx2.TransportError:
                        good = False
                    if good:
                        self.seen.answered.setdefault(path, []).append(time.monotonic() - began)
                    else:
                        self.seen.missed[path] += 1
                        self.seen.away[path] = self.seen.away.get(path, 0.0) + time.monotonic() - began
                self.seen.probed = time.monotonic() - since
                for name, (size, _) in self._sizes().items():
                    self.seen.most[name] = max(self.seen.most[name], size)

    def _sizes(self) -> dict[str, tuple[int, int]]:
        """By program, bytes and open files."""
        found = {}
        for name, pid in members(self.directory).items():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                found[name] = process.memory_info().rss, process.num_fds()
        return found

    def _calm_down(self, watch: Watch) -> None:
        """All ends, as it should, and the ledger holds what lives."""
        self._thaw_all()
        began = time.monotonic()
        self._until_all_ended()
        self.seen.settled = time.monotonic() - began
        with self.database.work() as work:
            runs, steps = work.rows(_RUNS), work.rows(_STEPS)
        by_key = {row.idempotency_key: row for row in runs if row.idempotency_key}
        for key, asked in self._accepted.items():
            row = by_key[key]
            assert row.state == "succeeded", (asked.name, row.state, (row.error or "")[:500])
            if asked.output is not None:
                assert self._client.get(f"/v1/runs/{row.id}/output").json() == asked.output, asked.name
        assert {row.state for row in runs} <= FINAL_RUNS
        own = {row.id for row in by_key.values()}
        for step in steps:
            told = (step.run_id, step.key, step.kind, step.state)
            assert step.open == 0, told
            assert step.succeeded <= 1, told
            if step.run_id in own and step.state == "succeeded" and step.kind not in _OUTSIDE:
                assert step.succeeded == 1, told
        assert watch.wrong == []
        assert self._target.wrong == []
        until(self._agree)
        assert_sound(self._as_stage())

    def _until_all_ended(self) -> None:
        try:
            until(lambda: self._open() == 0, self.plan.patience)
        except AssertionError:
            with self.database.work() as work:
                left = [f"{row.workflow}/{row.key} {row.state}" for row in work.rows(_LEFT)]
            raise AssertionError(f"{self._open()} runs have not ended: {', '.join(left)}") from None

    def _open(self) -> int:
        with self.database.work() as work:
            row = work.row(_COUNTS)
            assert row is not None
            return int(row.open)

    def _agree(self) -> bool:
        running = {(id_, process.pid) for id_, process in processes(self._as_stage())}
        return {(pool.id, pool.pid) for pool in fleet_views.pools(self.database)} == running

    def _see_that_nothing_grows(self) -> None:
        """The same work three times: after the first, which warms everything up, the others add nothing."""
        sizes = []
        for turn in range(3):
            for number in range(40):
                asked = chain(4) if number % 2 else mapped(20)
                self._submit(asked, f"calm-{turn}-{number}")
            self._until_all_ended()
            sizes.append(self._sizes())
        assert sizes[1].keys() == sizes[2].keys()
        for name, (size, files) in sizes[2].items():
            before, files_before = sizes[1][name]
            assert size - before < _GROWTH, f"{name} grew from {before} to {size} bytes"
            assert files - files_before <= _FILES, f"{name} had {files_before} open files, then {files}"


def _listed(counts: Counter[str], unit: int = 1, name: str = "") -> str:
    return ", ".join(f"{what} {count // unit}{name}" for what, count in sorted(counts.items()))


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="kills and freezes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--large", type=int, nargs="*", default=[16, 40, 60], help="megabytes of large values")
    parser.add_argument("--items", type=int, default=5000, help="of the larger maps; 0 for none")
    parser.add_argument("--hostile", choices=("all", "none"), default="all")
    given = parser.parse_args(arguments)
    inputs = tuple(hostile.ATTACKS) if given.hostile == "all" else ()
    directory = Path(tempfile.mkdtemp(prefix="tempest"))
    directory.chmod(0o711)
    try:
        seen = Tempest(directory, Plan(given.kills, given.seed, given.large, given.items, inputs)).run()
        sys.stdout.write(seen.shown())
    finally:
        assert_nothing_left(directory)
    shutil.rmtree(directory)


if __name__ == "__main__":
    main(sys.argv[1:])
