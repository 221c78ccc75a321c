"""The resource `namespaces`: the limits of namespaces on the fleet, and their use of it."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from app.access import accounts
from app.access.accounts import NamespaceAccount
from app.access.callers import KeyScope
from app.api import bodies, problems
from app.api.callers import InjectedCaller, requires
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.fleet import views
from app.kernel import clock
from app.kernel.units.durations import Duration
from app.kernel.units.sizes import Size

router = ApiRouter(prefix="/v1/namespaces", tags=["fleet"], dependencies=[requires(KeyScope.READ)])


class LimitsIn(BaseModel):
    """The limits of a namespace. A limit that is left out does not apply."""

    model_config = ConfigDict(extra="forbid")

    weight: float = Field(
        default=1.0, gt=0, le=1000, description="its weight in the fair share among namespaces with demand"
    )
    max_bytes: Size | None = Field(default=None, description="most bytes that pools granted for it may hold at a time")
    max_device_time: Duration | None = Field(
        default=None, description="most device time that it may use in a period", examples=["2h"]
    )
    period: Duration = Field(default=timedelta(days=1), ge=timedelta(seconds=1))


class NamespaceOut(BaseModel):
    """A namespace: its limits and its use of the fleet."""

    name: str
    weight: float
    max_bytes: int | None
    held_bytes: int = Field(description="bytes that pools granted for it hold")
    max_device_s: float | None = Field(description="most seconds of device time in a period")
    used_device_s: float = Field(description="seconds of device time used in this period")
    period_s: float
    period_began: datetime
    attained_s: float = Field(description="seconds of device time that count for fairness; they halve every hour")
    exhausted_until: datetime | None = Field(description="set when its device time is used up: no pool until then")


class NamespaceList(BaseModel):
    """Namespaces by name."""

    namespaces: list[NamespaceOut]


@router.get("", summary="List namespaces", responses=problems.documented())
def page(services: InjectedServices, caller: InjectedCaller) -> NamespaceList:
    """Every namespace that has limits or used devices recently; with a key of a namespace, that one."""
    found = views.accounts(services.database)
    seen = [account for account in found if caller.namespace in (None, account.namespace)]
    return NamespaceList(namespaces=[_out(account) for account in seen])


@router.put(
    "/{name}",
    dependencies=[requires(KeyScope.ADMIN, all_namespaces=True)],
    summary="Limit a namespace",
    responses=problems.documented(413, 415, 422),
    openapi_extra=bodies.documented_as(LimitsIn),
)
def limit(services: InjectedServices, name: str, body: Annotated[LimitsIn, bodies.of(LimitsIn)]) -> NamespaceOut:
    """
    Set the limits of a namespace. They replace the earlier ones; an empty object removes all limits.

    The label `namespace` of a run is its namespace. Running pools keep their memory.
    """
    limits = accounts.NamespaceLimits(body.weight, body.max_bytes, body.max_device_time, body.period)
    services.operator_commands.limit(name, limits)
    found = (account for account in views.accounts(services.database) if account.namespace == name)
    # A namespace without limits and without recent use may be deleted at any time.
    return _out(next(found, accounts.NamespaceAccount.fresh(name, limits, clock.now())))


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
