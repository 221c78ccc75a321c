"""
Budgets: how much a namespace, or a workflow or model in it, may cost in a day, a week or a month.

Periods are those of the calendar in a time zone; weeks begin on Mondays. A budget never stops work that was accepted.

Nothing here reads a clock or a database.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from zoneinfo import ZoneInfo

from app.inference.requests import PriorityClass
from app.kernel.errors import BudgetUsedUp

#: Most budgets of one namespace.
MAX_BUDGETS = 20


class BudgetPeriod(StrEnum):
    """For how long an amount is."""

    DAY = "day"
    WEEK = "week"
    MONTH = "month"


@dataclass(frozen=True, slots=True)
class SpendingBudget:
    """How much may be spent."""

    namespace: str
    #: Unique in its namespace.
    name: str
    #: In the currency of the settings, more than 0.
    amount: Decimal
    period: BudgetPeriod
    #: Only what this workflow, or this model, costs; None: everything.
    workflow: str | None = None
    model: str | None = None
    #: New work is refused when it is used up; otherwise it only tells.
    is_hard: bool = False
    #: Interactive work is never refused.
    spares_interactive: bool = False

    def covers(self, workflow: str, models: Collection[str]) -> bool:
        """Whether new work of the namespace is paid from it."""
        return self.workflow in (None, workflow) and (self.model is None or self.model in models)


@dataclass(frozen=True, slots=True)
class BudgetStanding:
    """A budget, and what was spent of it."""

    budget: SpendingBudget
    spent: Decimal
    #: What an attempt under it cost in this period on the average; 0 before the first.
    mean: Decimal
    begins_at: datetime
    resets_at: datetime

    @property
    def used(self) -> float:
        """The used part; 1 and more when it is used up."""
        return float(self.spent / self.budget.amount)


def period_of(period: BudgetPeriod, now: datetime, zone: ZoneInfo) -> tuple[datetime, datetime]:
    """Return when the period that has this instant begins, and when the next one does."""
    today = now.astimezone(zone).replace(hour=0, minute=0, second=0, microsecond=0, fold=0)
    match period:
        case BudgetPeriod.DAY:
            begin, end = today, today + timedelta(days=1)
        case BudgetPeriod.WEEK:
            begin = today - timedelta(days=today.weekday())
            end = begin + timedelta(days=7)
        case BudgetPeriod.MONTH:
            begin = today.replace(day=1)
            end = (begin + timedelta(days=32)).replace(day=1)
    return begin, end  # wall-clock arithmetic: both are midnights, whatever the clocks did between them


def refuse(standing: BudgetStanding, reserved: Decimal, priority: str, currency: str) -> None:
    """Raises BudgetUsedUp when a hard budget has nothing left, with what was reserved for accepted work."""
    budget = standing.budget
    if not budget.is_hard or (budget.spares_interactive and priority == PriorityClass.INTERACTIVE.value):
        return
    if standing.spent + reserved < budget.amount:
        return
    of = [f"workflow {budget.workflow}"] if budget.workflow is not None else []
    of += [f"model {budget.model}"] if budget.model is not None else []
    scope = f" of the {' and '.join(of)}" if of else ""
    raise BudgetUsedUp(
        f"the budget {budget.name!r} of the namespace {budget.namespace!r}{scope} is used up: "
        f"{standing.spent:.6f} of {budget.amount.normalize():f} {currency} in this {budget.period}; "
        f"new work is accepted again at {standing.resets_at.isoformat()}",
        budget=budget.name,
        resets_at=standing.resets_at,
    )
