"""Namespaces: what each may hold and use of the fleet, and does."""

from __future__ import annotations

from datetime import datetime, timedelta

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from app.access import accounts
from app.access.accounts import NamespaceAccount
from app.api import problems
from app.api.services import Use
from app.fleet import views
from app.kernel.durations import Duration
from app.kernel.sizes import Size

router = APIRouter(prefix="/v1/namespaces", tags=["fleet"])


class LimitsIn(BaseModel):
    """What a namespace may have. What is left out is not limited."""

    model_config = ConfigDict(extra="forbid")

    weight: float = Field(default=1.0, gt=0, le=1000, description="its share beside others that ask")
    max_bytes: Size | None = Field(default=None, description="that pools granted for it may hold at a time")
    max_device_time: Duration | None = Field(
        default=None, description="time of devices that it may use in a period", examples=["2h"]
    )
    period: Duration = Field(default=timedelta(days=1), ge=timedelta(seconds=1))


class NamespaceOut(BaseModel):
    """A namespace: its limits, and what it has and had."""

    name: str
    weight: float
    max_bytes: int | None
    held_bytes: int = Field(description="that pools granted for it hold")
    max_device_s: float | None = Field(description="seconds of devices that it may use in a period")
    used_device_s: float = Field(description="that it used in this period")
    period_s: float
    period_began: datetime
    attained_s: float = Field(description="that fairness counts: faded by half each hour")
    exhausted_until: datetime | None = Field(description="set when its seconds are used up: it gets no pool before")


class NamespaceList(BaseModel):
    """Namespaces by name."""

    namespaces: list[NamespaceOut]


@router.get("", summary="List namespaces", responses=problems.documented())
def page(services: Use) -> NamespaceList:
    """Every namespace that has limits, or used devices lately."""
    return NamespaceList(namespaces=[_out(account) for account in views.accounts(services.database)])


@router.put("/{name}", summary="Limit a namespace", responses=problems.documented(422))
def limit(services: Use, name: str, body: LimitsIn) -> NamespaceOut:
    """
    Set the limits of a namespace, in the place of those that it had; an empty object takes them all back.

    A run names its namespace by its label `namespace`. What pools hold already is left to them.
    """
    limits = accounts.NamespaceLimits(body.weight, body.max_bytes, body.max_device_time, body.period)
    services.orders.limit(name, limits)
    return next(_out(account) for account in views.accounts(services.database) if account.namespace == name)


def _out(account: NamespaceAccount) -> NamespaceOut:
    limits = account.limits
    return NamespaceOut(
        name=account.namespace,
        weight=limits.weight,
        max_bytes=limits.max_bytes,
        held_bytes=account.held_bytes,
        max_device_s=None if limits.max_device_time is None else limits.max_device_time.total_seconds(),
        used_device_s=round(account.used.total_seconds(), 1),
        period_s=limits.period.total_seconds(),
        period_began=account.period_began,
        attained_s=round(account.attained.total_seconds(), 1),
        exhausted_until=account.exhausted_until,
    )
