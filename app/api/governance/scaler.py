"""The resource `scaler`: how many hosts of each class are wanted, and why."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, Field

from app.access.callers import KeyScope
from app.api import problems
from app.api.callers import requires
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.fleet.host import HostState
from app.governance.scaler import service
from app.governance.scaler.service import ScalerView
from app.inference import demand
from app.scheduler import reconcile

router = ApiRouter(
    prefix="/v1/scaler", tags=["governance"], dependencies=[requires(KeyScope.READ, all_namespaces=True)]
)


class ScaledHostOut(BaseModel):
    """A host of a class."""

    name: str
    state: HostState
    pools: int = Field(description="that hold memory of it")
    busy: int = Field(description="steps in flight")


class ScalerRequestOut(BaseModel):
    """A request that its receiver has not accepted yet."""

    id: str
    hosts: int
    release: list[str]
    attempts: int = Field(description="failed so far")
    error: str = Field(description="of the last attempt")


class ScaledClassOut(BaseModel):
    """A class of hosts, and what the next pass would do."""

    name: str
    type: str
    min: int
    max: int
    hosts: list[ScaledHostOut] = Field(description="those that are there")
    needed: int = Field(description="hosts that the demand needs, within the limits")
    wanted: int = Field(description="hosts that are, or would be, asked for")
    reasons: list[str]
    would_ask: bool
    drain: list[str]
    keep: list[str] = Field(description="draining hosts that are needed again")
    release: list[str] = Field(description="drained hosts that are given up")
    pending: ScalerRequestOut | None
    asked_at: datetime | None = Field(description="when a request was last accepted")


class ScalerOut(BaseModel):
    """The scaler."""

    mode: Literal["on", "dry_run", "off"]
    classes: list[ScaledClassOut]


@router.get("", summary="Show the scaler", responses=problems.documented())
def show(services: InjectedServices) -> ScalerOut:
    """How many hosts of each class are wanted now, with the reasons; nothing is changed or asked for."""
    settings, database = services.settings.scaler, services.database
    if not settings.classes:
        return ScalerOut(mode=settings.mode, classes=[])
    kept = (*services.settings.pools.models, *services.settings.serving.resident)
    needed = demand.observe(database, services.catalog, kept)
    seen = reconcile.observe_only(database, needed)
    return ScalerOut(mode=settings.mode, classes=[_out(one) for one in service.plan(database, settings, seen, needed)])


def _out(view: ScalerView) -> ScaledClassOut:
    decision, pending = view.decision, view.pending
    request: Any = None
    if pending is not None:
        request = ScalerRequestOut(
            id=pending["id"],
            hosts=pending["hosts"],
            release=pending["release"],
            attempts=view.attempts,
            error=view.error,
        )
    return ScaledClassOut(
        name=view.scaled.name,
        type=view.scaled.type,
        min=view.scaled.min,
        max=view.scaled.max,
        hosts=[ScaledHostOut(name=one.name, state=one.state, pools=one.pools, busy=one.busy) for one in view.hosts],
        needed=decision.needed,
        wanted=decision.hosts,
        reasons=list(decision.reasons),
        would_ask=decision.is_asked,
        drain=list(decision.drain),
        keep=list(decision.keep),
        release=list(decision.release),
        pending=request,
        asked_at=view.asked_at,
    )
