"""Hard stops: new work of a namespace is refused when its budget is used up, and nothing of others is."""

from __future__ import annotations

import threading
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import text

from app.governance.costs import budget_store, store
from app.governance.costs.budget import MAX_BUDGETS, BudgetPeriod, SpendingBudget
from app.governance.costs.gate import FRESH, BudgetGate
from app.governance.signals.store import SignalQuery, SignalStore
from app.kernel.database import Database
from app.kernel.errors import BudgetUsedUp, Conflict, DatabaseUnreachable, NotFound
from app.kernel.sections.costs import CostSettings
from app.workflows.language import definition as definitions
from app.workflows.runs import forks
from app.workflows.runs.service import Runs
from app.workflows.runs.submission import Submission
from tests.governance.costs.conftest import Spend
from workers.governance.costs import _sample_budgets

FLOW = definitions.from_document({"workflow": "w", "steps": [{"id": "s", "kind": "wait", "for": "1h"}]})


class Ticks:
    def __init__(self) -> None:
        self.at = 0.0

    def __call__(self) -> float:
        return self.at


def budget(database: Database, amount: str, **given: Any) -> None:
    with database.work() as work:
        made = SpendingBudget("a", "all", Decimal(amount), BudgetPeriod.MONTH, is_hard=True)
        budget_store.set_budget(work, replace(made, **given))


@pytest.fixture
def ticks() -> Ticks:
    return Ticks()


@pytest.fixture
def gate(database: Database, ticks: Ticks) -> BudgetGate:
    return BudgetGate(database, CostSettings, ticks=ticks)


@pytest.fixture
def bounded(runs: Runs, gate: BudgetGate) -> Runs:
    return replace(runs, afford=gate.check_run)


def submission(namespace: str = "a", **given: Any) -> Submission:
    return Submission(FLOW, {}, namespace=namespace, **given)


def test_a_run_is_refused_and_nothing_is_stored(database: Database, bounded: Runs, spend: Spend) -> None:
    budget(database, "3")
    first = bounded.submit(submission(idempotency_key="once"))
    spend("2")
    store.add_up(database, lambda: True)
    spend("1")  # not added up yet
    bounded = replace(bounded, afford=BudgetGate(database, CostSettings).check_run)
    before = count(database)
    with pytest.raises(BudgetUsedUp, match=r"3\.000000 of 3 USD in this month"):
        bounded.submit(submission())
    assert count(database) == before
    assert bounded.submit(submission(idempotency_key="once")).id == first.id, "it was accepted before"
    assert bounded.submit(submission("b")).created


def test_a_fork_is_new_work_too(database: Database, bounded: Runs, spend: Spend, ticks: Ticks) -> None:
    run_id = bounded.submit(submission()).id
    bounded.cancel(run_id)
    budget(database, "1")
    spend("1")
    ticks.at += FRESH.total_seconds()
    with pytest.raises(BudgetUsedUp):
        forks.fork(bounded, run_id, "s", {})


def test_a_burst_at_the_edge_passes_it_by_no_more_than_the_work_differs(
    database: Database, bounded: Runs, spend: Spend
) -> None:
    """Fifty submissions at once, with room for five of the average: the sixth and all after it are refused."""
    budget(database, "10")
    for _ in range(5):
        spend("1")
    accepted, refused = list[object](), list[object]()

    def send() -> None:
        for _ in range(5):
            try:
                accepted.append(bounded.submit(submission()).id)
            except BudgetUsedUp as error:
                refused.append(error)

    threads = [threading.Thread(target=send) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert (len(accepted), len(refused)) == (5, 45)


def test_what_was_spent_is_read_again_after_a_second(
    database: Database, gate: BudgetGate, spend: Spend, ticks: Ticks
) -> None:
    budget(database, "1")
    gate.check("a", "w", ["m"], "interactive")
    spend("1")
    gate.check("a", "w", ["m"], "interactive")
    ticks.at += FRESH.total_seconds()
    with pytest.raises(BudgetUsedUp):
        gate.check("a", "w", ["m"], "interactive")
    with database.work() as work:
        budget_store.remove(work, "a", "all")
    ticks.at += FRESH.total_seconds()
    gate.check("a", "w", ["m"], "interactive")


def test_budgets_of_a_workflow_and_a_model_count_their_own(
    database: Database, gate: BudgetGate, spend: Spend, ticks: Ticks
) -> None:
    budget(database, "1", name="w", workflow="w")
    budget(database, "1", name="m", model="m")
    spend("5", workflow="other", model="n")
    spend("5", namespace="b")
    gate.check("a", "w", ["m"], "interactive")
    spend("1", workflow="w", model="n")
    ticks.at += FRESH.total_seconds()
    with pytest.raises(BudgetUsedUp, match="of the workflow w"):
        gate.check("a", "w", ["m"], "interactive")
    gate.check("a", "v", ["m"], "interactive")


def test_what_was_spent_last_month_is_no_more(database: Database, gate: BudgetGate, spend: Spend) -> None:
    budget(database, "1")
    spend("9")
    store.add_up(database, lambda: True)
    with database.work() as work:
        work.run(text("UPDATE cost_interval SET at = at - interval '32 days'"))
    gate.check("a", "w", ["m"], "interactive")


def test_while_the_database_is_away_what_was_read_last_holds(
    database: Database, gate: BudgetGate, spend: Spend, ticks: Ticks, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget(database, "1")
    spend("1")
    with pytest.raises(BudgetUsedUp):
        gate.check("a", "w", ["m"], "interactive")

    def away(_: object) -> None:
        raise DatabaseUnreachable("it is away")

    monkeypatch.setattr(Database, "work", away)
    ticks.at += 60
    with pytest.raises(BudgetUsedUp):
        gate.check("a", "w", ["m"], "interactive")
    gate.check("unknown", "w", ["m"], "interactive")


def test_a_namespace_has_a_bounded_number_of_budgets(database: Database) -> None:
    for place in range(MAX_BUDGETS):
        budget(database, "1", name=f"b{place}")
    budget(database, "2", name="b0")
    with pytest.raises(Conflict, match="which is the most"):
        budget(database, "1", name="more")
    with database.work() as work, pytest.raises(NotFound):
        budget_store.remove(work, "a", "more")


def test_the_signal_is_of_the_fullest_budget(database: Database, spend: Spend) -> None:
    budget(database, "10", name="large")
    budget(database, "4", name="small", is_hard=False)
    budget(database, "8", name="of m", model="m")
    spend("2")
    _sample_budgets(database, CostSettings())
    found = SignalStore(database).read(SignalQuery("budget_used", store.SPAN, by="model"))
    assert {model: value.greatest for model, value in found.items()} == {"": 0.5, "m": 0.25}


def count(database: Database) -> int:
    with database.work() as work:
        return int(work.rows(text("SELECT count(*) AS runs FROM run"))[0].runs)
