"""
A storm: seeded faults of every kind on a whole installation under steady mixed work, then calm work, then the checks.

A fault is over when a run that was submitted after its begin has ended; one in three faults does not wait for that, so
that faults meet. No check ends the storm: all that it finds is in the report.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from app.kernel.errors import ArrieroError
from app.workflows.state_machine.states import FINAL_RUNS
from tests.faults.fleet_chaos import LedgerWatch
from tests.faults.fleets import ALPHA
from tests.faults.storm import checks
from tests.faults.storm.injections import Injected, Injections
from tests.faults.storm.measure import Measurement
from tests.faults.storm.report import StormReport
from tests.faults.storm.site import Site
from tests.faults.storm.work import Work
from tests.faults.work import Workload

#: One in so many faults is not waited for.
_OVERLAPPING = 3
#: Faults that never meet others: nothing can be started on a full disk, and no replica is made of a frozen server.
_ALONE = frozenset({"disk full", "fail-over Postgres", "fail-over Valkey"})
#: Seconds from a fault until a new run must have ended.
_RECOVERY = 240.0
_STATE = text("SELECT state FROM run WHERE id = CAST(:id AS uuid)")


@dataclass(frozen=True)
class StormPlan:
    """The extent of a storm: it ends after so many seconds or faults, whichever comes first."""

    seconds: float
    faults: int = 10**9
    seed: int = 1
    #: Seconds of calm work at the end, over which memory and files are fitted.
    calm: float = 180.0
    #: Seconds for all runs to end.
    patience: float = 300.0
    #: Only faults whose name begins so; empty: all.
    only: tuple[str, ...] = ()


def run(root: Path, plan: StormPlan, progress: Callable[[str], None] = lambda _: None) -> StormReport:
    """Run a storm in a new directory."""
    report, began = StormReport(plan.seed), time.monotonic()
    with ExitStack() as stack:
        site = Site(root)
        site.start()
        stack.callback(site.close)
        injections = Injections(site, plan.seed)
        if plan.only:
            injections.kinds = [kind for kind in injections.kinds if kind.startswith(plan.only)]
        report.not_run = injections.not_run
        measurement = Measurement(site)
        stack.callback(measurement.close)
        work = Work(site, plan.seed)
        work.start()
        with _watched(site) as watch:
            storm = _Storm(site, plan, work, report, injections, progress)
            storm.cause_faults()
            report.stormy = time.monotonic() - began
            report.growth = measurement.growth()
            report.most = measurement.most()
            report.availability = dict(measurement.availability)
            report.problems += [p for kind, one in report.growth.items() for p in one.problems(kind)]
            measurement.forget_samples()
            progress("calm")
            calm = time.monotonic()
            threading.Event().wait(plan.calm)
            report.calm = time.monotonic() - calm
            grown = measurement.growth()
            report.growth |= {f"{kind}, calm": one for kind, one in grown.items()}
            report.most |= {f"{kind}, calm": most for kind, most in measurement.most().items()}
            report.problems += [p for kind, one in grown.items() for p in one.problems(f"{kind} in the calm")]
            work.stop()
            settling = time.monotonic()
            progress("settling")
            report.problems += checks.settle(site, plan.patience)
            report.settled = time.monotonic() - settling
            for check in (lambda: checks.recorded(site, work), lambda: checks.fires(site), work.batch_problems):
                progress("checking")
                report.problems += _guarded(check)
            report.problems += checks.ledger(site)
        report.ledger_checks = watch.checks
        report.problems += watch.problems[:20] + work.problems + site.problems
        report.work, report.effects, report.starts = work.counts, site.effects.counts(), Counter(site.starts)
        report.seconds = time.monotonic() - began
    return report


class _Storm:
    def __init__(
        self,
        site: Site,
        plan: StormPlan,
        work: Work,
        report: StormReport,
        injections: Injections,
        progress: Callable[[str], None],
    ) -> None:
        self._site, self._plan, self._work, self._report = site, plan, work, report
        self._injections, self._progress = injections, progress
        self._chance = random.Random(plan.seed + 9)
        self._client = site.client(15.0)
        self._waiting: list[threading.Thread] = []
        self._shown = 0

    def cause_faults(self) -> None:
        """Cause faults until the time or their number is reached, and end all of them."""
        limit, number = time.monotonic() + self._plan.seconds, 0
        while time.monotonic() < limit and number < self._plan.faults:
            number += 1
            fault, began = self._next()
            waiter = threading.Thread(target=self._await_recovery, args=(fault, number, began), daemon=True)
            waiter.start()
            if fault.name in _ALONE or self._chance.randrange(_OVERLAPPING):
                self._join([waiter, *self._waiting])
            else:
                self._waiting.append(waiter)
                threading.Event().wait(self._chance.uniform(0.2, 3.0))
        self._join(self._waiting)

    def _next(self) -> tuple[Injected, float]:
        """Begin the next fault; returns it with the instant of its begin."""
        upcoming = self._injections.peek()
        if upcoming in _ALONE or upcoming == "kill up":
            # What is frozen could not be ended by the next start.
            self._join(self._waiting)
        began = time.monotonic()
        fault = self._injections.next()
        self._progress(f"{fault.name} {fault.seconds:.0f} s")
        for problem in [*self._work.problems, *self._site.problems][self._shown :]:
            self._shown += 1
            self._progress(f"problem: {problem}")
        return fault, began

    def _join(self, threads: list[threading.Thread]) -> None:
        for thread in threads:
            thread.join()
        self._waiting.clear()

    def _await_recovery(self, fault: Injected, number: int, began: float) -> None:
        """End the fault in time, and measure until a new run has ended."""
        timer = threading.Timer(fault.seconds, fault.end)
        timer.start()
        try:
            self._report.recoveries[fault.name].append(self._recovered(f"canary-{number}", began))
        except AssertionError as error:
            self._work.problems.append(f"no recovery of fault {number}, {fault.name}: {error}")
        finally:
            timer.join()

    def _recovered(self, key: str, began: float) -> float:
        run_id = self._work.submit(self._client, _canary(), key)
        while True:
            with suppress(ArrieroError, SQLAlchemyError), self._site.database.work() as work:
                row = work.row(_STATE, {"id": run_id})
                if row is not None and row.state in FINAL_RUNS:
                    return time.monotonic() - began
            assert time.monotonic() < began + _RECOVERY, f"run {run_id} has not ended after {_RECOVERY:g} s"
            threading.Event().wait(0.05)


def _canary() -> Workload:
    steps = [
        {"id": "begin", "kind": "noop"},
        {"id": "count", "kind": "transform", "needs": ["begin"], "cel": "1 + 1"},
        {"id": "write", "kind": "generate", "needs": ["count"], "model": ALPHA, "prompt": "x", "max_tokens": 2},
    ]
    return Workload("canary", {"workflow": "canary", "steps": steps})


@contextmanager
def _watched(site: Site) -> Iterator[LedgerWatch]:
    """A thread that checks the ledger against the processes; the database may be away."""
    watch, finished = LedgerWatch(site.as_cluster()), threading.Event()

    def look() -> None:
        while not finished.wait(0.3):
            with suppress(ArrieroError, SQLAlchemyError):
                watch.check()

    thread = threading.Thread(target=look, name="ledger", daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        finished.set()
        thread.join()


def _guarded(check: Callable[[], list[str]]) -> list[str]:
    """The problems that a check finds; one that fails is a problem too."""
    try:
        return check()
    except (AssertionError, ArrieroError, SQLAlchemyError, httpx2.HTTPError) as error:
        return [f"a check failed: {error!r}"]
