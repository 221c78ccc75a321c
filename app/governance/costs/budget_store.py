"""Stored budgets, and what was spent of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

from sqlalchemy import text

from app.governance.costs.budget import MAX_BUDGETS, BudgetPeriod, BudgetStanding, SpendingBudget, period_of
from app.governance.costs.store import SOURCE
from app.kernel.database import UnitOfWork
from app.kernel.errors import Conflict, NotFound

_COLUMNS = "namespace, name, amount, period, workflow, model, is_hard, spares_interactive"
_LIST = text(f"""
    SELECT {_COLUMNS} FROM budget WHERE (CAST(:namespace AS text) IS NULL OR namespace = :namespace)
    ORDER BY namespace, name LIMIT :most
""")
_SET = text(f"""
    INSERT INTO budget ({_COLUMNS})
    VALUES (:namespace, :name, :amount, :period, :workflow, :model, :is_hard, :spares_interactive)
    ON CONFLICT (namespace, name) DO UPDATE SET amount = :amount, period = :period, workflow = :workflow,
        model = :model, is_hard = :is_hard, spares_interactive = :spares_interactive, updated_at = now()
""")
_LOCK = text("SELECT pg_advisory_xact_lock(hashtextextended('budgets of ' || :namespace, 0))")
_REMOVE = text("DELETE FROM budget WHERE namespace = :namespace AND name = :name")
_SPENT = text(f"""
    SELECT namespace, workflow, model, sum(cost) FILTER (WHERE at >= :day) AS day_cost,
           sum(attempts - unpriced) FILTER (WHERE at >= :day) AS day_attempts,
           sum(cost) FILTER (WHERE at >= :week) AS week_cost,
           sum(attempts - unpriced) FILTER (WHERE at >= :week) AS week_attempts,
           sum(cost) FILTER (WHERE at >= :month) AS month_cost,
           sum(attempts - unpriced) FILTER (WHERE at >= :month) AS month_attempts
    FROM ({SOURCE}) AS source GROUP BY namespace, workflow, model
""")
#: Most budgets of all namespaces that are read at once.
_MOST = 10_000


@dataclass(slots=True)
class _Sum:
    cost: Decimal = Decimal(0)
    attempts: int = 0


@dataclass(slots=True)
class _Spent:
    """What is spent of the budgets of one namespace, by name."""

    budgets: list[SpendingBudget] = field(default_factory=list)
    sums: dict[str, _Sum] = field(default_factory=dict)


def listed(work: UnitOfWork, namespace: str | None = None) -> list[SpendingBudget]:
    """Return budgets, of one namespace or of all."""
    return [_budget(row) for row in work.rows(_LIST, {"namespace": namespace, "most": _MOST})]


def set_budget(work: UnitOfWork, budget: SpendingBudget) -> None:
    """Store a budget, in the place of an earlier one. Raises Conflict when its namespace has too many."""
    work.rows(_LOCK, {"namespace": budget.namespace})
    others = [one for one in listed(work, budget.namespace) if one.name != budget.name]
    if len(others) >= MAX_BUDGETS:
        raise Conflict(f"the namespace {budget.namespace!r} has {MAX_BUDGETS} budgets, which is the most")
    names = ("namespace", "name", "amount", "workflow", "model", "is_hard", "spares_interactive")
    work.run(_SET, {name: getattr(budget, name) for name in names} | {"period": budget.period.value})


def remove(work: UnitOfWork, namespace: str, name: str) -> None:
    """Remove a budget. Raises NotFound."""
    if work.run(_REMOVE, {"namespace": namespace, "name": name}) == 0:
        raise NotFound("budget", name, [one.name for one in listed(work, namespace)])


def standings(work: UnitOfWork, namespace: str | None, now: datetime, zone: ZoneInfo) -> list[BudgetStanding]:
    """Return what was spent of each budget up to this moment; of one namespace, or of all."""
    budgets = listed(work, namespace)
    if not budgets:
        return []
    periods = {period: period_of(period, now, zone) for period in BudgetPeriod}
    begins = {period.value: begin for period, (begin, _) in periods.items()}
    since = min(begins[budget.period] for budget in budgets)
    known: dict[str, _Spent] = {}
    for budget in budgets:
        of = known.setdefault(budget.namespace, _Spent())
        of.budgets.append(budget)
        of.sums[budget.name] = _Sum()
    span = {"since": since, "until": max(end for _, end in periods.values()), "namespace": namespace}
    for row in work.rows(_SPENT, {**begins, **span}):
        if (found := known.get(row.namespace)) is not None:
            _add(found, row)
    return _standings(budgets, known, periods)


def _add(known: _Spent, row: Any) -> None:
    for budget in known.budgets:
        if budget.covers(row.workflow, (row.model,)):
            total = known.sums[budget.name]
            total.cost += getattr(row, f"{budget.period}_cost") or 0
            total.attempts += int(getattr(row, f"{budget.period}_attempts") or 0)


def _standings(
    budgets: Sequence[SpendingBudget], known: dict[str, _Spent], periods: dict[BudgetPeriod, tuple[datetime, datetime]]
) -> list[BudgetStanding]:
    found = []
    for budget in budgets:
        total = known[budget.namespace].sums[budget.name]
        mean = total.cost / total.attempts if total.attempts else Decimal(0)
        found.append(BudgetStanding(budget, total.cost, mean, *periods[budget.period]))
    return found


def _budget(row: Any) -> SpendingBudget:
    return SpendingBudget(
        row.namespace,
        row.name,
        row.amount,
        BudgetPeriod(row.period),
        row.workflow,
        row.model,
        row.is_hard,
        row.spares_interactive,
    )
