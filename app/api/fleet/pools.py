"""The resource `pools`: engine processes, each with one model on one set of devices, and operator commands for them."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from fastapi import Query
from pydantic import BaseModel, ConfigDict, Field

from app.access.callers import KeyScope
from app.api import bodies, problems
from app.api.callers import requires
from app.api.fleet import explanations
from app.api.fleet.explanations import ExplanationOut
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.fleet import views
from app.fleet.pool import PoolState
from app.fleet.views import PoolView

router = ApiRouter(prefix="/v1/pools", tags=["fleet"], dependencies=[requires(KeyScope.READ, all_namespaces=True)])


class PoolOut(BaseModel):
    """An engine process, or the grant for one."""

    id: str
    name: str = Field(description="its name in Celery, logs and Flower")
    model: str
    configuration: str
    state: PoolState | None = Field(description="null once it has ended and its bytes are released")
    simulated: bool = Field(description="it runs a simulated engine on simulated devices")
    pinned: bool
    host: str
    devices: list[str]
    bytes: dict[str, int] = Field(description="reserved, by id of the device")
    used: dict[str, int] = Field(description="measured, by id of the device")
    peak: dict[str, int] = Field(description="the highest measurement, by id of the device")
    slots: int
    busy: int
    phase: str | None = Field(description="its current phase, as it reports it")
    progress: float = Field(description="of the load, 0 to 1")
    purpose: str
    reason: str = Field(description="why it was started")
    stop_reason: str | None = Field(description="why it is being stopped")
    waits_for: list[str] = Field(description="ids of pools whose bytes it gets when they have ended")
    failed: bool = Field(description="it ended in another way than requested")
    ending: str | None = Field(description="how it ended")
    pid: int | None
    threads: int | None
    created_at: datetime
    serving_at: datetime | None
    heartbeat_at: datetime | None = Field(description="its last heartbeat")
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
    """A request to load a model."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(examples=["smollm2:135m"])
    keep: bool = Field(default=False, description="keep it running until it is stopped")
    pinned: bool = Field(default=False, description="keep it running, and never stop it to make room for others")


class StopIn(BaseModel):
    """A request to stop the pools of a model."""

    model_config = ConfigDict(extra="forbid")

    model: str


@router.get("", summary="List pools", responses=problems.documented(422))
def page(
    services: InjectedServices,
    model: str | None = None,
    ended: Annotated[bool, Query(description="include pools that ended recently")] = False,
) -> PoolList:
    """Pools, the newest first."""
    return PoolList(pools=[out(pool) for pool in views.pools(services.database, model=model, ended=ended)])


@router.post(
    "",
    status_code=202,
    dependencies=[requires(KeyScope.OPERATE, all_namespaces=True)],
    summary="Load a model",
    responses=problems.documented(404, 413, 415, 422),
    openapi_extra=bodies.documented_as(StartIn),
)
def start(services: InjectedServices, body: Annotated[StartIn, bodies.of(StartIn)]) -> ExplanationOut:
    """Start a pool of a model. The answer is its current state; poll `GET /v1/fleet/explain` for updates."""
    model = services.catalog.get(body.model)
    services.operator_commands.start(model.name, keep=body.keep, pinned=body.pinned)
    return explanations.explain_model(services, model.name)


@router.post(
    "/stop",
    status_code=202,
    dependencies=[requires(KeyScope.OPERATE, all_namespaces=True)],
    summary="Stop a model's pools",
    responses=problems.documented(404, 413, 415, 422),
    openapi_extra=bodies.documented_as(StopIn),
)
def stop_model(services: InjectedServices, body: Annotated[StopIn, bodies.of(StopIn)]) -> PoolList:
    """Stop all pools of a model, and no longer keep it running. Later demand starts it again."""
    if not views.pools(services.database, model=body.model):
        services.catalog.get(body.model)  # raises NotFound; a model removed from the catalogue may still have pools
    services.operator_commands.stop_model(body.model)
    return page(services, model=body.model, ended=False)


@router.get("/{pool}", summary="One pool", responses=problems.documented(404, 409))
def one(services: InjectedServices, pool: str) -> PoolOut:
    """A pool by its id, or by the end of its id."""
    return out(views.pool(services.database, pool))


@router.get("/{pool}/log", summary="The last lines of its log", responses=problems.documented(404, 409))
def log(services: InjectedServices, pool: str) -> LogOut:
    """The last lines of a pool's log, of an ended pool too."""
    found = views.pool(services.database, pool)
    return LogOut(id=found.id, lines=views.log_tail(services.database, found.id).splitlines())


@router.post(
    "/{pool}/stop",
    status_code=202,
    dependencies=[requires(KeyScope.OPERATE, all_namespaces=True)],
    summary="Stop a pool",
    responses=problems.documented(404, 409),
)
def stop(services: InjectedServices, pool: str) -> PoolOut:
    """Stop a pool; its steps may finish within pools.drain_timeout."""
    return one(services, services.operator_commands.stop(pool))


@router.post(
    "/{pool}/restart",
    status_code=202,
    dependencies=[requires(KeyScope.OPERATE, all_namespaces=True)],
    summary="Restart a pool",
    responses=problems.documented(404, 409),
)
def restart(services: InjectedServices, pool: str) -> PoolOut:
    """Stop a pool and start another of its model."""
    return one(services, services.operator_commands.stop(pool, again=True))


def out(pool: PoolView) -> PoolOut:
    """Return the answer for a pool."""
    return PoolOut.model_validate(pool, from_attributes=True)
