"""The resource `budgets`: how much a namespace may cost in a day, a week or a month."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from typing import Annotated
from zoneinfo import ZoneInfo

from fastapi import Path
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from app.access import namespaces
from app.access.callers import KeyScope
from app.api import bodies, problems
from app.api.callers import ListedNamespace, NamedNamespace, requires
from app.api.routers import ApiRouter
from app.api.services import InjectedServices, Services
from app.governance.costs import budget_store
from app.governance.costs.budget import BudgetPeriod, BudgetStanding, SpendingBudget
from app.kernel import clock
from app.kernel.errors import NotFound

router = ApiRouter(prefix="/v1/budgets", tags=["costs"])

_Name = Annotated[str, Path(min_length=1, max_length=63, pattern=namespaces.PATTERN)]
_Of = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00]*$")]


class BudgetIn(BaseModel):
    """A budget."""

    model_config = ConfigDict(extra="forbid")

    amount: Decimal = Field(
        gt=0, le=1_000_000_000, decimal_places=6, description="in the currency of the settings (`costs.currency`)"
    )
    period: BudgetPeriod = Field(
        default=BudgetPeriod.MONTH,
        description="`day`, `week` (from Monday) or `month`, by `costs.timezone`",
    )
    workflow: _Of | None = Field(default=None, description="only what this workflow costs")
    model: _Of | None = Field(default=None, description="only what this model costs")
    hard: bool = Field(default=False, description="new work is refused when it is used up; accepted work goes on")
    spares_interactive: bool = Field(default=False, description="interactive work is never refused")


class BudgetOut(BaseModel):
    """A budget, and what was spent of it."""

    namespace: str
    name: str
    amount: float
    period: BudgetPeriod
    workflow: str | None
    model: str | None
    hard: bool
    spares_interactive: bool
    currency: str
    spent: float = Field(description="known costs of attempts that have ended in this period")
    used: float = Field(description="the part that is used, 1 for all of it")
    begins_at: datetime
    resets_at: datetime


class BudgetList(BaseModel):
    """Budgets by namespace and name."""

    budgets: list[BudgetOut]


@router.get("", summary="List budgets", responses=problems.documented(422), dependencies=[requires(KeyScope.READ)])
def page(services: InjectedServices, namespace: ListedNamespace) -> BudgetList:
    """Budgets with what was spent of each; a key of a namespace sees its own."""
    return BudgetList(budgets=_read(services, namespace))


@router.get(
    "/{name}", summary="One budget", responses=problems.documented(404, 422), dependencies=[requires(KeyScope.READ)]
)
def get(services: InjectedServices, namespace: NamedNamespace, name: _Name) -> BudgetOut:
    """A budget with what was spent of it."""
    return _one(services, namespace, name)


@router.put(
    "/{name}",
    summary="Set a budget",
    responses=problems.documented(403, 409, 413, 415, 422),
    dependencies=[requires(KeyScope.ADMIN, all_namespaces=True)],
    openapi_extra=bodies.documented_as(BudgetIn),
)
def put(
    services: InjectedServices,
    namespace: NamedNamespace,
    name: _Name,
    body: Annotated[BudgetIn, bodies.of(BudgetIn)],
) -> BudgetOut:
    """
    Set a budget of a namespace, in the place of an earlier one of the name. It holds within a second.

    Only a key of all namespaces may: nobody sets the budget of their own namespace.
    """
    budget = SpendingBudget(
        namespace, name, body.amount, body.period, body.workflow, body.model, body.hard, body.spares_interactive
    )
    with services.database.work() as work:
        budget_store.set_budget(work, budget)
    return _one(services, namespace, name)


@router.delete(
    "/{name}",
    status_code=204,
    summary="Remove a budget",
    responses=problems.documented(403, 404, 422),
    dependencies=[requires(KeyScope.ADMIN, all_namespaces=True)],
)
def delete(services: InjectedServices, namespace: NamedNamespace, name: _Name) -> None:
    """Remove a budget; new work is accepted within a second."""
    with services.database.work() as work:
        budget_store.remove(work, namespace, name)


def _read(services: Services, namespace: str | None) -> list[BudgetOut]:
    settings = services.settings.costs
    with services.database.work() as work:
        found = budget_store.standings(work, namespace, clock.now(), ZoneInfo(settings.timezone))
    return [_out(one, settings.currency) for one in found]


def _one(services: Services, namespace: str, name: str) -> BudgetOut:
    found = _read(services, namespace)
    for one in found:
        if one.name == name:
            return one
    raise NotFound("budget", name, [one.name for one in found])


def _out(standing: BudgetStanding, currency: str) -> BudgetOut:
    budget = standing.budget
    return BudgetOut(
        namespace=budget.namespace,
        name=budget.name,
        amount=float(budget.amount),
        period=budget.period,
        workflow=budget.workflow,
        model=budget.model,
        hard=budget.is_hard,
        spares_interactive=budget.spares_interactive,
        currency=currency,
        spent=float(standing.spent),
        used=round(standing.used, 6),
        begins_at=standing.begins_at,
        resets_at=standing.resets_at,
    )
