"""Growth: how costs depend on the numbers of steps, of waiting rows and of stored rows."""

from __future__ import annotations

import contextlib
import time
import tracemalloc
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.types import NullType

from app.kernel.database import Database, UnitOfWork
from app.workflows import retention
from app.workflows.language.definition import Definition
from app.workflows.language.graph import Graph
from app.workflows.runs.recovery import overdue
from app.workflows.runs.recovery.sweep import sweep
from app.workflows.runs.service import Runs
from app.workflows.schedules import store
from app.workflows.schedules.service import Schedules
from app.workflows.state_machine import transitions as runs
from app.workflows.state_machine.events import (
    Command,
    ComputeOutput,
    DecideStep,
    Event,
    OutputComputed,
    RunSubmitted,
    StepDecided,
)
from app.workflows.state_machine.run import Run, RunStep
from app.workflows.state_machine.states import RunState, StepState
from benchmarks.growth_runs import fill

#: Ten times as many may take so many times as long. A quadratic cost takes a hundred times as long.
LINEAR = 40.0


def chain(count: int, *, backwards: bool = False) -> Definition:
    steps = [{"id": "s0", "kind": "switch", "cases": {"a": "1 == 1"}}]
    steps += [
        {"id": f"s{n}", "kind": "switch", "cases": {"a": "1 == 1"}, "needs": [f"s{n - 1}.a"]} for n in range(1, count)
    ]
    return Definition.model_validate({"workflow": "w", "steps": steps[::-1] if backwards else steps})


def fan(count: int) -> Definition:
    steps = [{"id": "s0", "kind": "switch", "cases": {"a": "1 == 1"}}]
    steps += [{"id": f"s{n}", "kind": "switch", "cases": {"a": "1 == 1"}, "needs": ["s0"]} for n in range(1, count)]
    steps += [{"id": "end", "kind": "join", "needs": [f"s{n}" for n in range(1, count)], "join": "any"}]
    return Definition.model_validate({"workflow": "w", "steps": steps})


def growth(shape: Callable[[int], Definition], taken: str | None) -> float:
    """How many times as long 5,000 steps take as 500: the least of five pairs, as other work slows single ones down."""
    return min(seconds(shape(5_000), taken) / seconds(shape(500), taken) for _ in range(5))


def seconds(definition: Definition, taken: str | None) -> float:
    """The processor time until every step is decided; `taken` is the branch that every switch takes."""
    rules = Graph(definition).rules
    run = Run(
        "r", RunState.QUEUED, {key: RunStep(key, StepState.PENDING, rule) for key, rule in rules.items()}, None, True
    )
    began, run = time.thread_time(), runs.tracked(run)
    waiting: list[Event] = [RunSubmitted()]
    while waiting:
        advanced = runs.proceed(run, waiting.pop())
        run = advanced.run
        waiting += [event for command in advanced.commands if (event := _following(command, taken)) is not None]
    assert all(step.state in ("succeeded", "skipped", "ready") for step in run.steps.values())
    return time.thread_time() - began


def _following(command: Command, taken: str | None) -> Event | None:
    match command:
        case DecideStep(key):
            return StepDecided(key, holds=True, switch=True, branch=taken)
        case ComputeOutput():
            return OutputComputed(made=True)
    return None


def test_the_memory_of_the_graph_of_a_long_chain_is_small() -> None:
    """Ten thousand steps have fifty million pairs of a step and an earlier one."""
    definition = chain(10_000)
    tracemalloc.start()
    try:
        graph = Graph(definition)
        assert "s9998" in graph.ancestors["s9999"]
        assert "s9999" not in graph.ancestors["s9998"]
        assert len(graph.ancestors["s5000"]) == 5_000
        assert graph.decision_reads["s7"].steps == frozenset()
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 100 * 2**20


@pytest.mark.parametrize("taken", ["a", None])
@pytest.mark.parametrize("backwards", [False, True])
def test_a_chain_of_switches_costs_by_its_length(taken: str | None, backwards: bool) -> None:
    """All steps are decided under the lock of the run; where the first takes no branch, all others are skipped."""
    assert growth(partial(chain, backwards=backwards), taken) < LINEAR


def test_a_fan_of_switches_into_one_join_costs_by_its_width() -> None:
    assert growth(fan, "a") < LINEAR


# What the timed jobs read, among rows that wait and rows that are kept.

#: Parts of the plan of a statement that reads without an index.
SCANS = ("Seq Scan on step", "Seq Scan on run", "Seq Scan on schedule_fire")


class _RolledBack(Exception):
    """Rolls back the changes of an explained statement."""


class Recorded:
    """The statements of a job, and the number of rows that each has read from tables and indexes."""

    def __init__(self, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plans: list[tuple[str, dict[str, Any]]] = []
        self._database, self._explaining = database, False
        real = UnitOfWork.execute

        def execute(work: UnitOfWork, statement: Any, parameters: Any = None) -> Any:
            read = str(statement).strip()
            if (
                not self._explaining
                and read.startswith(("SELECT", "WITH", "UPDATE", "DELETE"))
                and "set_config" not in read
            ):
                self._explain(statement, parameters)
            return real(work, statement, parameters)

        monkeypatch.setattr(UnitOfWork, "execute", execute)

    def _explain(self, statement: Any, parameters: Any) -> None:
        self._explaining = True
        try:
            with contextlib.suppress(_RolledBack), self._database.work() as work:
                work.run(text("SET LOCAL lock_timeout = '1s'"))
                asked = text(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}").bindparams(*_bound(statement))
                row = work.row(asked, parameters)
                assert row is not None
                self.plans.append((str(statement), row[0][0]["Plan"]))
                raise _RolledBack
        finally:
            self._explaining = False

    @property
    def rows(self) -> int:
        """The number of rows that were read, including those that a filter removed."""
        return sum(_rows(plan) for _, plan in self.plans)

    @property
    def scans(self) -> list[str]:
        """Statements that read a whole growing table."""
        return [statement for statement, plan in self.plans if any(scan in _nodes(plan) for scan in SCANS)]


def _bound(statement: Any) -> list[Any]:
    return [bind for bind in statement._bindparams.values() if not isinstance(bind.type, NullType)]


def _rows(plan: dict[str, Any]) -> int:
    own = 0
    if "Relation Name" in plan:
        removed = plan.get("Rows Removed by Filter", 0) + plan.get("Rows Removed by Index Recheck", 0)
        own = round((plan["Actual Rows"] + removed) * plan["Actual Loops"])
    return own + sum(map(_rows, plan.get("Plans", ())))


def _nodes(plan: dict[str, Any]) -> set[str]:
    own = {f"{plan['Node Type']} on {plan['Relation Name']}"} if "Relation Name" in plan else set()
    return own.union(*map(_nodes, plan.get("Plans", ())))


JOBS: dict[str, Callable[[Runs], object]] = {
    "sweep": lambda runs: sweep(runs, republish_after=timedelta(minutes=1), batch=50),
    "expiry": lambda runs: retention.remove_runs(runs.database),
    "schedules": lambda runs: Schedules(runs, timedelta(days=1)).advance_all(),
    "what is near": lambda runs: is_near(runs.database),
}


def is_near(database: Database) -> bool:
    with database.work() as work:
        return overdue.is_near(work, timedelta(seconds=10)) or store.is_near(work, timedelta(seconds=10))


@pytest.mark.parametrize("job", JOBS)
def test_a_timed_job_reads_no_more_rows_when_more_wait_and_more_are_stored(
    runs: Runs, database: Database, monkeypatch: pytest.MonkeyPatch, job: str
) -> None:
    read: list[int] = []
    for waiting, kept in ((1_000, 4_000), (10_000, 40_000)):
        fill(database, waiting, kept)
        with monkeypatch.context() as patched:
            recorded = Recorded(database, patched)
            JOBS[job](runs)
        assert recorded.plans
        assert recorded.scans == []
        read.append(recorded.rows)
    assert read[1] <= read[0] * 2 + 50
