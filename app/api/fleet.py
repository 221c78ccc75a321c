"""The fleet: hosts, devices, pools, reserves, refusals; and what moving pools would bring."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from app.api import hosts, pools, problems
from app.api.hosts import HostOut
from app.api.pools import PoolOut
from app.api.services import Services, Use
from app.fleet import views
from app.fleet.views import FleetView
from app.inference import demand
from app.kernel.broker import CONTROL_QUEUE, PRIORITIES
from app.scheduler import needs, reconcile, tasks

router = APIRouter(prefix="/v1/fleet", tags=["fleet"])


class RefusalOut(BaseModel):
    """Why a model that is asked for is not started."""

    model: str
    reason: str
    needs: int = Field(description="bytes of its smallest layout")
    estimate_s: float | None = Field(description="until it serves; null when that takes more than the passing of time")
    since: datetime


class ReserveOut(BaseModel):
    """Bytes that a model owns before it is loaded."""

    model: str
    host: str
    devices: list[str]
    simulated: bool
    bytes: dict[str, int] = Field(description="by id of the device")
    idle: bool = Field(description="no pool of the model lies there: others may borrow the bytes")
    since: datetime


class StandingOut(BaseModel):
    """A model that is kept up."""

    model: str
    pools: int
    pinned: bool
    by: Literal["order", "settings"] = Field(description="an operator's order, or the setting pools.models")


class OrphanOut(BaseModel):
    """Where ledger and processes disagree. The agent of the host ends it; a host without an agent cannot."""

    what: Literal["process", "reservation"] = Field(
        description="a process without a reservation, or a reservation whose process is gone or silent"
    )
    pool: str
    model: str
    host: str
    pid: int | None
    since: datetime


class FleetOut(BaseModel):
    """Everything, at one instant."""

    hosts: list[HostOut]
    pools: list[PoolOut]
    reserves: list[ReserveOut]
    standing: list[StandingOut] = Field(description="models that are kept up; entries with a `min` are so, too")
    orphans: list[OrphanOut]
    refusals: list[RefusalOut]


class MoveOut(BaseModel):
    """An idle pool that is started elsewhere and stopped where it is."""

    pool: str
    bytes: dict[str, int] = Field(description="where it goes, by id of the device")
    reason: str


class GainOut(BaseModel):
    """A model, and why it fits after the moves, or still does not."""

    model: str
    reason: str


class DefragmentOut(BaseModel):
    """Moves, what they bring, and what they do not."""

    moves: list[MoveOut]
    gains: list[GainOut]
    stuck: list[GainOut]


class MovedOut(BaseModel):
    """A pool that was moved, and why."""

    pool: str
    reason: str


class DefragmentationOut(BaseModel):
    """What was moved at an instant, and what that gained."""

    at: datetime
    moves: list[MovedOut]
    gains: list[GainOut]
    stuck: list[GainOut]


class DefragmentationList(BaseModel):
    """Defragmentations of the last thirty days, the latest first."""

    defragmentations: list[DefragmentationOut]


@router.get("", summary="Hosts, devices, pools, refusals", responses=problems.documented())
def get(services: Use) -> FleetOut:
    """All of the fleet, at one instant."""
    seen = views.fleet(services.database)
    kept = [StandingOut(model=name, pools=1, pinned=True, by="settings") for name in services.settings.pools.models]
    return FleetOut(
        hosts=[hosts.out(host) for host in seen.hosts],
        pools=[pools.out(pool) for pool in seen.pools],
        reserves=_reserves(services, seen),
        standing=kept + [StandingOut(**row._asdict(), by="order") for row in seen.standing],
        orphans=[_orphan(row) for row in seen.orphans],
        refusals=[_refusal(row) for row in seen.refusals],
    )


@router.get("/defragment", summary="What would defragmenting do?", responses=problems.documented())
def preview(services: Use) -> DefragmentOut:
    """The cheapest moves of idle pools after which models fit that now fit nowhere. Nothing is moved."""
    asked = demand.asked(services.database, services.catalog, services.settings.pools.models)
    found = reconcile.preview_defragmentation(services.database, asked)
    return DefragmentOut(
        moves=[MoveOut(pool=one.pool, bytes=dict(one.bytes), reason=one.reason) for one in found.moves],
        gains=[GainOut(model=one.model, reason=one.reason) for one in found.gains],
        stuck=[GainOut(model=one.model, reason=one.reason) for one in found.stuck],
    )


@router.post("/defragment", status_code=202, summary="Defragment", responses=problems.documented())
def defragment(services: Use) -> DefragmentOut:
    """Have a control worker make such moves now; the answer says which they would have been a moment ago."""
    found = preview(services)
    services.publisher.publish(tasks.DEFRAGMENT, (), queue=CONTROL_QUEUE, priority=PRIORITIES["interactive"])
    return found


@router.get("/defragmentations", summary="What was defragmented", responses=problems.documented(422))
def defragmentations(
    services: Use, limit: Annotated[int, Query(ge=1, le=1000, description="how many")] = 20
) -> DefragmentationList:
    """What was moved so that models fit that fitted nowhere, and what that gained."""
    rows = views.defragmentations(services.database, limit=limit)
    return DefragmentationList(defragmentations=[DefragmentationOut(**row._asdict()) for row in rows])


def _reserves(services: Services, seen: FleetView) -> list[ReserveOut]:
    models = {needs.configuration_id(model): model.name for model in services.catalog}
    used = {(pool.row.configuration, device) for pool in seen.pools for device in pool.row.bytes or ()}
    return [
        ReserveOut(
            model=models.get(row.configuration, row.configuration),
            host=row.host,
            devices=sorted(row.devices.values()),
            simulated=row.simulated,
            bytes=row.bytes,
            idle=not any((row.configuration, device) in used for device in row.bytes),
            since=row.since,
        )
        for row in seen.reserves
    ]


def _orphan(row: Any) -> OrphanOut:
    return OrphanOut(what=row.what, pool=row.id, model=row.model, host=row.host, pid=row.pid, since=row.since)


def _refusal(row: Any) -> RefusalOut:
    return RefusalOut(
        model=row.model,
        reason=row.reason,
        needs=row.needs_bytes,
        estimate_s=row.estimate_seconds,
        since=row.since,
    )
