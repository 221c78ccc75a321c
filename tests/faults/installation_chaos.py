"""
Chaos test of a whole installation: kills, freezes, large values and hostile inputs, observed from outside.

The suite runs a short one. Long ones by hand:

    python -m tests.faults.installation_chaos --kills 100 --seed 1
    python -m tests.faults.installation_chaos --kills 20 --seed 7 --large 1 --items 300 --hostile none

`arriero up` runs as a process of its own. This process, its servers and its programs are killed, or stopped by SIGSTOP
for longer than the leases. Meanwhile runs of many kinds are submitted over HTTP: with values of many megabytes, maps of
thousands of items, and the attacks of `hostile.py`.

Checked all the time and at the end: every accepted run ends as expected, each step is recorded once, no byte of a
device is used by two pools, no attack causes an answer with status 500, reads a file or opens a connection, and
afterwards no process grows. The availability of the API is measured.
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
from collections import Counter, defaultdict, deque
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
from tests.faults.fleet_chaos import LedgerWatch
from tests.faults.fleets import ALPHA, BETA, GAMMA, assert_consistent, processes
from tests.faults.installation import kill, members, pids, send_signal
from tests.faults.work import Workload, chain, generate_text, large, mapped

MODELS = (ALPHA, BETA, GAMMA)
#: Short times, so that lost work is found soon. No step fails because of many kills.
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
#: Seconds of a freeze: shorter than all leases, longer than that of steps, longer than the heartbeat timeout.
FREEZES = (1.0, 6.0, 12.0)
#: Open runs at a time.
_OPEN = 12
#: Most growth of a process while the same work is repeated, in bytes and in open files.
GROWTH, FILES = 24 * 2**20, 6
#: Rounds of the same work, in one of which no process grows. The first two warm up.
_ROUNDS = 6

COUNTS = text("""
    SELECT count(*) FILTER (WHERE state NOT IN ('succeeded', 'failed', 'cancelled')) AS open, count(*) AS runs FROM run
""")
STEPS = text("""
    SELECT step.run_id::text, step.key, step.kind, step.state,
           count(*) FILTER (WHERE outcome = 'succeeded') AS succeeded,
           count(*) FILTER (WHERE outcome = 'left') AS left_once,
           count(*) FILTER (WHERE attempt.step_id IS NOT NULL AND outcome IS NULL) AS open
    FROM step LEFT JOIN attempt ON attempt.step_id = step.id GROUP BY step.id
""")
RUNS = text("SELECT id::text, state, idempotency_key, error::text AS error FROM run")
LEFT = text("""
    SELECT workflow, key, step.state FROM step JOIN run ON run.id = run_id
    WHERE run.finished_at IS NULL AND step.finished_at IS NULL ORDER BY run.id, position LIMIT 20
""")
#: Kinds whose steps succeed without a successful attempt of a worker.
WITHOUT_ATTEMPT = frozenset({"switch", "map", "workflow", "wait"})


@dataclass(frozen=True)
class ChaosPlan:
    """The extent of a chaos test."""

    kills: int = 100
    seed: int = 1
    large: Sequence[int] = (16, 40, 60)
    items: int = 5000
    hostile: Sequence[str] = tuple(hostile.ATTACKS)
    #: Some of FREEZES.
    freezes: Sequence[float] = FREEZES
    #: Seconds for all runs to end.
    patience: float = 600.0


@dataclass
class ChaosReport:
    """What was observed during a chaos test."""

    faults: Counter[str] = field(default_factory=Counter)
    work: Counter[str] = field(default_factory=Counter)
    hostile: Counter[str] = field(default_factory=Counter)
    #: Seconds of each restart of `arriero up` after a kill.
    starts: list[float] = field(default_factory=list)
    #: By path, the seconds of each answer, and the number of missing answers.
    answered: dict[str, list[float]] = field(default_factory=dict)
    missed: Counter[str] = field(default_factory=Counter)
    #: By path, seconds without an answer, or with 503.
    unavailable: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    probed: float = 0.0
    checks: int = 0
    #: By program, the most bytes of memory.
    most: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    #: Seconds from the last fault until the end of the last run.
    settled: float = 0.0

    def summary(self) -> str:
        lines = [
            f"{sum(self.faults.values())} faults in {self.seconds:.0f} s: {_listed(self.faults)}",
            f"{sum(self.work.values())} runs: {_listed(self.work)}",
            f"the last run ended {self.settled:.0f} s after the last fault",
            f"{sum(self.hostile.values())} hostile inputs of {len(self.hostile)} kinds",
            f"restarts of a killed up: {', '.join(f'{one:.1f} s' for one in self.starts) or 'none'}",
        ]
        for path, times in self.answered.items():
            part = len(times) / max(1, len(times) + self.missed[path])
            p99 = statistics.quantiles(times, n=100)[98] if len(times) > 1 else 0.0
            available = 1 - self.unavailable.get(path, 0.0) / max(1.0, self.probed)
            requests = len(times) + self.missed[path]
            lines.append(
                f"{path}: available {available:.1%} of the time; {part:.1%} of {requests} answered, p99 {p99:.2f} s"
            )
        lines.append(f"{self.checks} checks of the ledger; most memory: {_listed(self.most, 2**20, ' MiB')}")
        return "\n".join(lines) + "\n"


class InstallationChaos:
    """A chaos test of one installation."""

    def __init__(self, directory: Path, plan: ChaosPlan) -> None:
        self.directory, self.plan = directory / "data", plan
        self._output = directory / "output.txt"
        self._chance = random.Random(plan.seed)
        self._port = embedded.endpoint.free_port(directory)
        self._settings = SETTINGS | {"api.port": str(self._port)}
        self.report = ChaosReport()
        self._finished = threading.Event()
        #: The accepted workloads, by idempotency key.
        self._accepted: dict[str, Workload] = {}
        self._frozen: dict[int, threading.Timer] = {}
        self._ups = 0
        self._up: subprocess.Popen[bytes] | None = None
        self._up_stack = ExitStack()

    # ---- the test ----

    def run(self) -> ChaosReport:
        """Run the test. Fails at the first violated check."""
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
            with (
                LedgerWatch(self._as_cluster()) as watch,
                self._in_background(self._submit_runs),
                self._in_background(self._probe),
            ):
                self._cause_faults(watch)
                self._finished.set()
            self._check_end(watch)
            assert bait.connections == 0, "a document caused a connection"
            self.report.checks = watch.checks
            self._check_growth()
            self._stop()
        self.report.seconds = time.monotonic() - began
        return self.report

    def _cause_faults(self, watch: LedgerWatch) -> None:
        remaining: list[tuple[str, str]] = []
        attacks: deque[str] = deque()
        for _ in range(self.plan.kills):
            if not remaining:  # each fault in turn, in a new random order
                programs = ("pool", "agent", "control", "api", "Postgres", "Valkey", "up")
                remaining = [(how, who) for how in ("kill", "freeze") for who in programs]
                self._chance.shuffle(remaining)
            how, who = remaining.pop()
            for _ in range(2 if self.plan.hostile else 0):
                if not attacks:
                    attacks.extend(self._chance.sample(list(self.plan.hostile), len(self.plan.hostile)))
                name = attacks.popleft()
                self.report.hostile[name] += 1
                hostile.attack(self._target, name)
            self._cause_fault(how, who)
            self._wait_for_progress()
            assert watch.problems == []
            assert self._target.problems == []

    def _cause_fault(self, how: str, who: str) -> None:
        if who == "up":
            pid = self._up.pid if self._up is not None else 0
        else:
            found = [pid for name, pid in pids(self.directory).items() if name.partition(" ")[0] == who]
            pid = self._chance.choice(sorted(found)) if found else 0
        self.report.faults[f"{how} {who}" if pid else f"no {who}"] += 1
        if not pid:
            return
        if how == "freeze":
            self._freeze(pid, alone=who in {"up", "agent"})
        elif who == "up":
            self._thaw_all()  # the next start would kill frozen parts, which has its own test
            kill(pid)
            self._start_up()
        else:
            kill(pid)

    def _freeze(self, pid: int, *, alone: bool) -> None:
        """Stop a process by SIGSTOP, and continue it later if it was not killed for that."""
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
            send_signal(pid, number)

    def _thaw_all(self) -> None:
        for pid, timer in self._frozen.items():
            timer.cancel()
            timer.join()
            if pid_file.is_stopped(pid):
                timer.function()
        self._frozen.clear()

    # ---- the installation ----

    def _start_up(self) -> None:
        """Start or restart `arriero up`, and wait until it reports that everything is up."""
        began = time.monotonic()
        if self._up is not None:
            self._up.wait()
        catalog = installation.catalog_of(*MODELS, load="300ms")
        self._up_stack.close()
        self._up = self._up_stack.enter_context(installation.up(self.directory, self._output, self._settings, catalog))
        self._ups += 1
        up = self._up
        until(lambda: installation.is_up(up, self._output, times=self._ups), 180)
        if self._ups > 1:
            self.report.starts.append(time.monotonic() - began)

    def _stop(self) -> None:
        assert self._up is not None
        self._up.send_signal(signal.SIGINT)
        up = self._up
        until(lambda: up.poll() is not None)
        assert up.returncode == 0, self._output.read_text()[-2000:]

    def _new_client(self, timeout: float) -> httpx2.Client:
        return httpx2.Client(base_url=f"http://127.0.0.1:{self._port}", trust_env=False, timeout=timeout)

    def _as_cluster(self) -> Any:
        """The attributes of a cluster that the helpers for fleets use."""
        return SimpleNamespace(directory=self.directory, database=self.database)

    @contextlib.contextmanager
    def _in_background(self, loop: Callable[[], None]) -> Iterator[None]:
        def guarded() -> None:
            try:
                loop()
            except Exception as error:  # noqa: BLE001 the outermost frame of the thread: the main thread fails with the error
                self._target.problems.append(f"{loop.__name__}: {error!r}")

        thread = threading.Thread(target=guarded, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._finished.set()
            thread.join()

    # ---- the workload ----

    def _submit_runs(self) -> None:
        """Submit workloads, each with its own idempotency key, so that a limited number of runs is open."""
        chance = random.Random(self.plan.seed + 1)
        workloads = self._workloads(chance)
        while not self._finished.wait(0.05):
            try:
                with self.database.work() as work:
                    row = work.row(COUNTS)
            except DatabaseUnreachable:
                continue
            if row is not None and row.open < _OPEN:
                self._submit(next(workloads), f"chaos-{len(self._accepted)}")

    def _workloads(self, chance: random.Random) -> Iterator[Workload]:
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
                yield generate_text(chance.choice(MODELS), chance.randint(4, 60))

    def _submit(self, workload: Workload, key: str) -> None:
        """Submit a workload until it is accepted; parts may be unavailable meanwhile."""
        body, pause = {"definition": workload.definition, "inputs": workload.inputs}, threading.Event()
        limit = time.monotonic() + self.plan.patience
        while True:
            assert time.monotonic() < limit, f"{workload.name} was not accepted within {self.plan.patience:g} s"
            with contextlib.suppress(httpx2.TransportError):
                answer = self._client.post("/v1/runs", json=body, headers={"Idempotency-Key": key})
                if answer.status_code in (200, 202):
                    self._accepted[key] = workload
                    self.report.work[workload.name] += 1
                    return
                assert answer.status_code in (500, 503), f"{workload.name}: {answer.status_code} {answer.text[:500]}"
                if answer.status_code == 500:
                    self._target.problems.append(f"{workload.name} was answered with 500: {answer.text[:200]}")
            pause.wait(0.2)

    def _wait_for_progress(self) -> None:
        """Wait until four more runs have ended, or a random time has passed."""
        limit, pause = time.monotonic() + self._chance.uniform(0.5, 3.0), threading.Event()
        before = self._ended()
        while time.monotonic() < limit and self._ended() < before + 4:
            pause.wait(0.1)

    def _ended(self) -> int:
        with contextlib.suppress(DatabaseUnreachable), self.database.work() as work:
            row = work.row(COUNTS)
            return row.runs - row.open if row is not None else 0
        return 0

    # ---- the observations ----

    def _probe(self) -> None:
        """Call the API repeatedly, like a load balancer and like a client, and measure the memory of processes."""
        since = time.monotonic()
        with self._new_client(5.0) as client:
            while not self._finished.wait(0.2):
                for path in ("/healthz", "/v1/runs?limit=1"):
                    began = time.monotonic()
                    try:
                        good = client.get(path).is_success
                    except httpx2.TransportError:
                        good = False
                    if good:
                        self.report.answered.setdefault(path, []).append(time.monotonic() - began)
                    else:
                        self.report.missed[path] += 1
                        self.report.unavailable[path] += time.monotonic() - began
                self.report.probed = time.monotonic() - since
                for name, (size, _) in self._sizes().items():
                    self.report.most[name] = max(self.report.most[name], size)

    def _sizes(self) -> dict[str, tuple[int, int]]:
        """Bytes of memory and open files, by program."""
        found = {}
        for name, pid in members(self.directory).items():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                found[name] = process.memory_info().rss, process.num_fds()
        return found

    def _check_end(self, watch: LedgerWatch) -> None:
        """Check that all runs end as expected, and that the ledger matches the processes."""
        self._thaw_all()
        began = time.monotonic()
        self._until_all_ended()
        self.report.settled = time.monotonic() - began
        with self.database.work() as work:
            runs, steps = work.rows(RUNS), work.rows(STEPS)
        by_key = {row.idempotency_key: row for row in runs if row.idempotency_key}
        for key, workload in self._accepted.items():
            row = by_key[key]
            assert row.state == "succeeded", (workload.name, row.state, (row.error or "")[:500])
            if workload.output is not None:
                assert self._client.get(f"/v1/runs/{row.id}/output").json() == workload.output, workload.name
        assert {row.state for row in runs} <= FINAL_RUNS
        own = {row.id for row in by_key.values()}
        for step in steps:
            described = (step.run_id, step.key, step.kind, step.state)
            assert step.open == 0, described
            assert step.succeeded <= 1, described
            if step.run_id in own and step.state == "succeeded" and step.kind not in WITHOUT_ATTEMPT:
                assert step.succeeded == 1, described
        assert watch.problems == []
        assert self._target.problems == []
        until(self._ledger_matches_processes)
        assert_consistent(self._as_cluster())

    def _until_all_ended(self) -> None:
        try:
            until(lambda: self._open() == 0, self.plan.patience)
        except AssertionError:
            with self.database.work() as work:
                left = [f"{row.workflow}/{row.key} {row.state}" for row in work.rows(LEFT)]
            raise AssertionError(f"{self._open()} runs have not ended: {', '.join(left)}") from None

    def _open(self) -> int:
        with self.database.work() as work:
            row = work.row(COUNTS)
            assert row is not None
            return int(row.open)

    def _ledger_matches_processes(self) -> bool:
        running = {(id_, process.pid) for id_, process in processes(self._as_cluster())}
        return {(pool.id, pool.pid) for pool in fleet_views.pools(self.database)} == running

    def _check_growth(self) -> None:
        """Repeat the same work until no process grows: what leaks grows in each round."""
        grown: list[str] = []
        before: dict[str, tuple[int, int]] = {}
        for round_ in range(_ROUNDS):
            for number in range(40):
                workload = chain(4) if number % 2 else mapped(20)
                self._submit(workload, f"growth-{round_}-{number}")
            self._until_all_ended()
            sizes = self._sizes()
            if round_ > 1:
                assert sizes.keys() == before.keys()
                grown = [
                    f"{name}: {before[name]}, then {size, files}"
                    for name, (size, files) in sizes.items()
                    if size - before[name][0] > GROWTH or files - before[name][1] > FILES
                ]
                if not grown:
                    return
            before = sizes
        raise AssertionError(f"bytes and open files grew in each round: {grown}")


def _listed(counts: Counter[str], unit: int = 1, name: str = "") -> str:
    return ", ".join(f"{what} {count // unit}{name}" for what, count in sorted(counts.items()))


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="kills and freezes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--large", type=int, nargs="*", default=[16, 40, 60], help="megabytes of large values")
    parser.add_argument("--items", type=int, default=5000, help="items of the larger maps; 0 for none")
    parser.add_argument("--hostile", choices=("all", "none"), default="all")
    given = parser.parse_args(arguments)
    inputs = tuple(hostile.ATTACKS) if given.hostile == "all" else ()
    directory = Path(tempfile.mkdtemp(prefix="chaos"))
    directory.chmod(0o711)
    try:
        report = InstallationChaos(
            directory, ChaosPlan(given.kills, given.seed, given.large, given.items, inputs)
        ).run()
        sys.stdout.write(report.summary())
    finally:
        assert_nothing_left(directory)
    shutil.rmtree(directory)


if __name__ == "__main__":
    main(sys.argv[1:])
