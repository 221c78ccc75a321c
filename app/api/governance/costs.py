"""The resource `costs`: what work cost, and what it would have cost on another model."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated

from fastapi import Query
from pydantic import AwareDatetime, BaseModel, Field

from app.access.callers import KeyScope
from app.api import problems
from app.api.callers import ListedNamespace, requires
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.governance.costs import spending, store
from app.governance.costs.spending import CostGroup, Spending
from app.governance.costs.store import CostWindow
from app.kernel import clock
from app.kernel.errors import InvalidInput, Problem
from app.kernel.units import durations
from app.kernel.units.durations import Duration

router = ApiRouter(prefix="/v1/costs", tags=["costs"], dependencies=[requires(KeyScope.READ)])

#: The longest windows: of sums that are kept, and of those by label, which are made of single attempts.
_LONGEST, _LONGEST_BY_LABEL = store.KEPT_FOR, timedelta(days=31)
#: The time whose attempts say what a token of a model costs on this installation.
_MEASURED = timedelta(days=30)
_DAY = timedelta(days=1)

_Name = Annotated[str | None, Query(max_length=200, pattern=r"^[^\x00]*$")]
_Last = Annotated[Duration, Query(description="the length of the window: `1h`, `7d`")]
_Until = Annotated[AwareDatetime | None, Query(description="its end, by default now")]


class SpendingOut(BaseModel):
    """What some attempts did and cost."""

    cost: float = Field(description="the sum of the known costs, which is exact before it is written as a number")
    attempts: int = Field(description="failed, cancelled and requeued ones too")
    unpriced: int = Field(description="attempts whose cost is not known; they are not in `cost`")
    tokens_in: int
    tokens_cached: int = Field(description="of those read, the ones that were computed before")
    tokens_out: int
    device_s: float = Field(description="seconds of the devices of pools, shared among what they did at the same time")


class CostLine(SpendingOut):
    """What one model, namespace, workflow, day or label cost."""

    key: str = Field(description="its name; of a day its date; empty for runs without the label")


class CostsOut(BaseModel):
    """Costs in a window."""

    since: datetime = Field(description="the window begins with a whole quarter of an hour, but by label")
    until: datetime
    currency: str
    timezone: str = Field(description="of the days")
    by: str
    total: SpendingOut
    lines: list[CostLine] = Field(description="the dearest first; days: the latest first")
    more: bool = Field(description="there are further lines, which are in the total only")


class CostEstimateOut(BaseModel):
    """What the work of a window would have cost on another model."""

    on: str
    since: datetime
    until: datetime
    currency: str
    recorded: SpendingOut = Field(description="what was done, and what it did cost")
    amount: float | None = Field(description="what it would have cost; null where that cannot be known")
    with_cache: float | None = Field(description="the same, where as many tokens are cached there as were here")
    assumed: list[str] = Field(description="what the amount rests on, or why there is none")


@router.get("", summary="What work cost", responses=problems.documented(422))
def costs(
    services: InjectedServices,
    namespace: ListedNamespace,
    by: Annotated[
        str, Query(max_length=210, description="`model`, `namespace`, `workflow`, `day` or `label:NAME`")
    ] = "model",
    last: _Last = timedelta(days=7),
    until: _Until = None,
    workflow: _Name = None,
    model: _Name = None,
    limit: Annotated[int, Query(ge=1, le=store.MOST_LINES)] = 100,
) -> CostsOut:
    """
    Costs of attempts that ended in a window. A key of a namespace sees its own.

    They are those of the prices that held when an attempt ended: later prices change nothing. By label, they are of
    the runs that are still kept, and the window has at most 31 days.
    """
    group = CostGroup.parse(by)
    begin, end = _window(last, until, _LONGEST if group.label is None else _LONGEST_BY_LABEL)
    settings = services.settings.costs
    with services.database.work() as work:
        window = CostWindow(begin, end, namespace, workflow, model)
        total, lines = store.read(work, window, group, settings.timezone, limit)
    return CostsOut(
        since=begin if group.label is not None else store.interval_of(begin),
        until=end,
        currency=settings.currency,
        timezone=settings.timezone,
        by=by,
        total=SpendingOut(**_figures(total)),
        lines=[CostLine(key=key, **_figures(line)) for key, line in lines[:limit]],
        more=len(lines) > limit,
    )


@router.get("/estimate", summary="What work would have cost elsewhere", responses=problems.documented(404, 422))
def estimate(
    services: InjectedServices,
    namespace: ListedNamespace,
    on: Annotated[str, Query(min_length=1, max_length=200, pattern=r"^[^\x00]*$", description="the other model")],
    last: _Last = timedelta(days=7),
    until: _Until = None,
    workflow: _Name = None,
    model: Annotated[str | None, Query(max_length=200, description="only what this model did")] = None,
) -> CostEstimateOut:
    """
    What the recorded tokens of a window would have cost on another model of the catalogue.

    At a server by its prices; on a local model by what its own tokens cost in the last 30 days.
    """
    begin, end = _window(last, until, _LONGEST)
    other, settings = services.catalog.get(on), services.settings.costs
    with services.database.work() as work:
        done, _ = store.read(work, CostWindow(begin, end, namespace, workflow, model), CostGroup("day"), "UTC", 1)
        prices = None if other.remote is None else other.remote.prices
        if prices is not None:
            found = spending.on_server(done, prices)
        else:
            now = clock.now()
            own = CostWindow(now - _MEASURED, now, namespace, None, other.name)
            found = spending.on_devices(done, store.read(work, own, CostGroup("day"), "UTC", 1)[0])
    return CostEstimateOut(
        on=other.name,
        since=store.interval_of(begin),
        until=end,
        currency=settings.currency,
        recorded=SpendingOut(**_figures(done)),
        amount=None if found.amount is None else float(found.amount),
        with_cache=None if found.with_cache is None else float(found.with_cache),
        assumed=list(found.assumed),
    )


def _window(last: timedelta, until: datetime | None, longest: timedelta) -> tuple[datetime, datetime]:
    if not timedelta(0) < last <= longest:
        accepted = f"more than 0, at most {durations.show(longest)}"
        raise InvalidInput([Problem("query.last", "no possible window", accepted)], "query")
    end = clock.now() if until is None else until
    try:
        # The earliest interval, and the day before it in any time zone, are times too.
        begin = end - last
        _ = begin - _DAY
    except OverflowError:
        raise InvalidInput([Problem("query.until", "no possible time", "a time of this age")], "query") from None
    return begin, end


def _figures(found: Spending) -> dict[str, float | int]:
    names = ("attempts", "unpriced", "tokens_in", "tokens_cached", "tokens_out")
    return {
        **{name: getattr(found, name) for name in names},
        "cost": float(found.cost),
        "device_s": round(found.device_us / 1_000_000, 6),
    }
