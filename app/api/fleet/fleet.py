"""The resource `fleet`: hosts, devices, pools, reserves and refusals, and defragmentation."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from fastapi import Query
from pydantic import BaseModel, Field

from app.access.callers import KeyScope
from app.api import problems
from app.api.callers import requires
from app.api.fleet import hosts, pools
from app.api.fleet.hosts import HostOut
from app.api.fleet.pools import PoolOut
from app.api.routers import ApiRouter
from app.api.services import InjectedServices, Services
from app.fleet import views
from app.fleet.views import FleetView
from app.inference import demand
from app.kernel.broker import CONTROL_QUEUE, PRIORITIES
from app.scheduler import needs, reconcile, tasks

router = ApiRouter(prefix="/v1/fleet", tags=["fleet"], dependencies=[requires(KeyScope.READ, all_namespaces=True)])


class RefusalOut(BaseModel):
    """The reason why a model with demand is not started."""

    model: str
    reason: str
    needs: int = Field(description="bytes of its smallest layout")
    estimate_s: float | None = Field(description="seconds until it serves; null when waiting alone does not help")
    since: datetime


class ReserveOut(BaseModel):
    """Guaranteed capacity: bytes that are reserved for a model even when it is not loaded."""

    model: str
    host: str
    devices: list[str]
    simulated: bool
    bytes: dict[str, int] = Field(description="by id of the device")
    idle: bool = Field(description="no pool of the model uses it, so others may borrow the bytes")
    since: datetime


class PoolTargetOut(BaseModel):
    """A model that is kept running."""

    model: str
    pools: int
    pinned: bool
    by: Literal["operator", "settings"] = Field(description="an operator command, or the setting pools.models")


class OrphanOut(BaseModel):
    """A process or reservation on which ledger and processes disagree. The host's agent, if it runs, resolves it."""

    kind: Literal["process", "reservation"] = Field(
        description="a process without a reservation, or a reservation whose process is gone or silent"
    )
    pool: str
    model: str
    host: str
    pid: int | None
    since: datetime


class FleetOut(BaseModel):
    """The whole fleet at one instant."""

    hosts: list[HostOut]
    pools: list[PoolOut]
    reserves: list[ReserveOut]
    targets: list[PoolTargetOut] = Field(
        description="models that are kept running by operators and settings; models whose entry has a `min` are too"
    )
    orphans: list[OrphanOut]
    refusals: list[RefusalOut]


class MoveOut(BaseModel):
    """A planned move: an idle pool is started on other devices and stopped on its own."""

    pool: str
    bytes: dict[str, int] = Field(description="its new reservation, by id of the device")
    reason: str


class GainOut(BaseModel):
    """A model, and why it fits after the moves, or still does not."""

    model: str
    reason: str


class DefragmentOut(BaseModel):
    """Planned moves, the models that fit after them, and those that still do not."""

    moves: list[MoveOut]
    gains: list[GainOut]
    stuck: list[GainOut]


class MovedOut(BaseModel):
    """A pool that was moved, and why."""

    pool: str
    reason: str


class DefragmentationOut(BaseModel):
    """A past defragmentation: its moves, and what they gained."""

    at: datetime
    moves: list[MovedOut]
    gains: list[GainOut]
    stuck: list[GainOut]


class DefragmentationList(BaseModel):
    """Defragmentations of the last thirty days, the latest first."""

    defragmentations: list[DefragmentationOut]


@router.get("", summary="Hosts, devices, pools, refusals", responses=problems.documented())
def get(services: InjectedServices) -> FleetOut:
    """The whole fleet at one instant."""
    seen = views.fleet(services.database)
    kept = [PoolTargetOut(model=name, pools=1, pinned=True, by="settings") for name in services.settings.pools.models]
    return FleetOut(
        hosts=[hosts.out(host) for host in seen.hosts],
        pools=[pools.out(pool) for pool in seen.pools],
        reserves=_reserves(services, seen),
        targets=kept
        + [PoolTargetOut(model=one.model, pools=one.pools, pinned=one.pinned, by="operator") for one in seen.targets],
        orphans=[OrphanOut.model_validate(one, from_attributes=True) for one in seen.orphans],
        refusals=[RefusalOut.model_validate(one, from_attributes=True) for one in seen.refusals],
    )


@router.get("/defragment", summary="What would defragmenting do?", responses=problems.documented())
def preview(services: InjectedServices) -> DefragmentOut:
    """The cheapest moves of idle pools after which models fit that now fit on no device. Nothing is moved."""
    demanded = demand.observe(services.database, services.catalog, services.always_on)
    found = reconcile.preview_defragmentation(services.database, demanded)
    return DefragmentOut(
        moves=[MoveOut(pool=one.pool, bytes=dict(one.bytes), reason=one.reason) for one in found.moves],
        gains=[GainOut(model=one.model, reason=one.reason) for one in found.gains],
        stuck=[GainOut(model=one.model, reason=one.reason) for one in found.stuck],
    )


@router.post(
    "/defragment",
    status_code=202,
    dependencies=[requires(KeyScope.OPERATE, all_namespaces=True)],
    summary="Defragment",
    responses=problems.documented(),
)
def defragment(services: InjectedServices) -> DefragmentOut:
    """Start a defragmentation in a control worker. The answer is a preview from just before."""
    found = preview(services)
    services.publisher.publish(tasks.DEFRAGMENT, (), queue=CONTROL_QUEUE, priority=PRIORITIES["interactive"])
    return found


@router.get("/defragmentations", summary="Past defragmentations", responses=problems.documented(422))
def defragmentations(
    services: InjectedServices, limit: Annotated[int, Query(ge=1, le=1000, description="most entries to return")] = 20
) -> DefragmentationList:
    """Past defragmentations: the moves, and what they gained."""
    found = views.defragmentations(services.database, limit=limit)
    return DefragmentationList(
        defragmentations=[DefragmentationOut.model_validate(one, from_attributes=True) for one in found]
    )


def _reserves(services: Services, seen: FleetView) -> list[ReserveOut]:
    models = {needs.configuration_id(model): model.name for model in services.catalog}
    used = {(pool.configuration, device) for pool in seen.pools for device in pool.bytes}
    return [
        ReserveOut(
            model=models.get(one.configuration, one.configuration),
            host=one.host,
            devices=one.devices,
            simulated=one.simulated,
            bytes=dict(one.bytes),
            idle=not any((one.configuration, device) in used for device in one.bytes),
            since=one.since,
        )
        for one in seen.reserves
    ]
