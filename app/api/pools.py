"""Pools: engine processes, each with one model on one set of devices, and what operators ask of them."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from app.api import explanations, problems
from app.api.explanations import ExplanationOut
from app.api.services import Use
from app.fleet import views
from app.fleet.pool import PoolState
from app.fleet.views import PoolView

router = APIRouter(prefix="/v1/pools", tags=["fleet"])


class PoolOut(BaseModel):
    """An engine process, or the grant for one."""

    id: str
    name: str = Field(description="as workers, logs and Flower name it")
    model: str
    configuration: str
    state: PoolState | None = Field(description="null once it has ended and its bytes are back")
    simulated: bool = Field(description="there is no model and no device behind it")
    pinned: bool
    host: str
    devices: list[str]
    bytes: dict[str, int] = Field(description="reserved, by id of the device")
    used: dict[str, int] = Field(description="measured, by id of the device")
    peak: dict[str, int] = Field(description="the most that was measured")
    slots: int
    busy: int
    stage: str | None = Field(description="what it does, in its own words")
    progress: float = Field(description="of the loading, 0 to 1")
    purpose: str
    reason: str = Field(description="why it was started")
    stop_reason: str | None = Field(description="why it is to end")
    waits_for: list[str] = Field(description="ids of pools whose bytes it gets when they are gone")
    failed: bool = Field(description="it ended otherwise than it was asked to")
    ending: str | None = Field(description="how it ended")
    pid: int | None
    threads: int | None
    created_at: datetime
    serving_at: datetime | None
    heard_at: datetime | None = Field(description="when it last told of itself")
    last_used_at: datetime | None
    ended_at: datetime | None


class PoolList(BaseModel):
    """Pools, the newest first."""

    pools: list[PoolOut]


class LogOut(BaseModel):
    """The last lines of a pool's log."""

    id: str
    lines: list[str]


class StartIn(BaseModel):
    """A model that is to be loaded."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(examples=["smollm2:135m"])
    keep: bool = Field(default=False, description="keep it up until it is stopped")
    pinned: bool = Field(default=False, description="and never stop it to make room for others")


class StopIn(BaseModel):
    """A model whose pools are to be stopped."""

    model_config = ConfigDict(extra="forbid")

    model: str


@router.get("", summary="List pools", responses=problems.documented(422))
def page(
    services: Use,
    model: str | None = None,
    ended: Annotated[bool, Query(description="with those that have ended lately")] = False,
) -> PoolList:
    """Pools, the newest first."""
    return PoolList(pools=[out(pool) for pool in views.pools(services.database, model=model, ended=ended)])


@router.post("", status_code=202, summary="Load a model", responses=problems.documented(404, 422))
def start(services: Use, body: StartIn) -> ExplanationOut:
    """Order a pool of a model. The answer says how it stands; `GET /v1/fleet/explain` follows it."""
    model = services.catalog.get(body.model)
    services.orders.start(model.name, keep=body.keep, pinned=body.pinned)
    return explanations.explained(services, model.name)


@router.post("/stop", status_code=202, summary="Stop a model's pools", responses=problems.documented(404, 422))
def stop_model(services: Use, body: StopIn) -> PoolList:
    """Stop all pools of a model, and keep it up no longer. Whoever asks for it later has it started again."""
    if not views.pools(services.database, model=body.model):
        services.catalog.get(body.model)  # one that has left the catalogue is known as long as it has pools
    services.orders.stop_model(body.model)
    return page(services, model=body.model, ended=False)


@router.get("/{pool}", summary="One pool", responses=problems.documented(404, 409))
def one(services: Use, pool: str) -> PoolOut:
    """A pool by its id, or the end of it."""
    return out(views.pool(services.database, pool))


@router.get("/{pool}/log", summary="The last lines of its log", responses=problems.documented(404, 409))
def log(services: Use, pool: str) -> LogOut:
    """What a pool wrote last, whether it lives or not."""
    found = views.pool(services.database, pool)
    return LogOut(id=found.id, lines=views.log_tail(services.database, found.id).splitlines())


@router.post("/{pool}/stop", status_code=202, summary="Stop a pool", responses=problems.documented(404, 409))
def stop(services: Use, pool: str) -> PoolOut:
    """Stop a pool; its steps may finish within pools.drain_timeout."""
    return one(services, services.orders.stop(pool))


@router.post("/{pool}/restart", status_code=202, summary="Restart a pool", responses=problems.documented(404, 409))
def restart(services: Use, pool: str) -> PoolOut:
    """Stop a pool and start another of its model."""
    return one(services, services.orders.stop(pool, again=True))


def out(seen: PoolView) -> PoolOut:
    """A pool as it is shown."""
    row = seen.row
    return PoolOut(
        id=row.id,
        name=_name(seen),
        model=row.model,
        configuration=row.configuration,
        state=seen.state,
        simulated=bool(row.simulated),
        pinned=row.pinned,
        host=row.host,
        devices=sorted((row.devices or {}).values()),
        bytes=row.bytes or {},
        used=row.used or {},
        peak=row.peak or {},
        slots=row.slots,
        busy=row.busy or 0,
        stage=row.stage,
        progress=row.progress or 0.0,
        purpose=row.purpose,
        reason=row.reason,
        stop_reason=row.stop_reason,
        waits_for=list(row.after),
        failed=bool(row.failed),
        ending=row.ending or row.why,
        pid=row.pid,
        threads=row.threads,
        created_at=row.created_at,
        serving_at=row.serving_at,
        heard_at=row.heard_at,
        last_used_at=row.last_used_at,
        ended_at=row.ended_at or row.released_at,
    )


def _name(pool: PoolView) -> str:
    row = pool.row
    slug = row.configuration.rpartition(".")[0]
    return row.worker or f"{'simulated-' if row.simulated else ''}pool.{slug}.{row.id[-6:]}"
