"""The fleet: hosts, devices, pools; why a model is not served, and what operators ask for."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from app.api import problems
from app.api.services import Use
from app.fleet import reconcile, views
from app.fleet.explanation import Condition
from app.fleet.fleet import PoolState
from app.fleet.rows import HostState
from app.fleet.views import HostView, PoolView
from app.inference import demand
from app.kernel.broker import CONTROL_QUEUE, PRIORITIES
from app.kernel.errors import InvalidInput, Problem

router = APIRouter(prefix="/v1", tags=["fleet"])


class DeviceOut(BaseModel):
    """Memory of a host, and what is reserved of it."""

    id: str
    name: str = Field(examples=["cpu", "gpu-0", "sim-0"])
    kind: str
    type: str = Field(examples=["cpu", "NVIDIA H200"])
    simulated: bool
    present: bool = Field(description="false for one that its agent does not see any more")
    total: int = Field(description="bytes")
    capacity: int = Field(description="bytes that reservations may come to in all")
    reserved: int = Field(description="bytes that they come to")
    free: int = Field(description="bytes that may still be reserved")
    set_aside: int = Field(description="bytes that models own before they are loaded; lent to others while idle")
    used: int = Field(description="bytes that somebody uses, as measured")
    strangers: int = Field(description="bytes of the capacity that processes without a reservation use")
    temperature: int | None = Field(description="degrees Celsius")
    utilisation: float | None = Field(description="0 to 1")


class HostOut(BaseModel):
    """A machine with an agent."""

    name: str
    state: HostState
    alive: bool = Field(description="its agent was heard lately")
    joined_at: datetime
    cores: int
    problems: list[str]
    devices: list[DeviceOut]


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
    last_used_at: datetime | None
    ended_at: datetime | None


class RefusalOut(BaseModel):
    """Why a model that is asked for is not started."""

    model: str
    reason: str
    needs: int = Field(description="bytes of its smallest layout")
    estimate_s: float | None = Field(description="until it serves; null when that takes more than the passing of time")
    since: datetime


class FleetOut(BaseModel):
    """Everything, at one instant."""

    hosts: list[HostOut]
    pools: list[PoolOut]
    refusals: list[RefusalOut]


class PoolList(BaseModel):
    """Pools, the newest first."""

    pools: list[PoolOut]


class HostList(BaseModel):
    """Hosts by name."""

    hosts: list[HostOut]


class LogOut(BaseModel):
    """The last lines of a pool's log."""

    id: str
    lines: list[str]


class ExplanationOut(BaseModel):
    """Why a model is, or is not, served."""

    model: str
    condition: Condition
    reason: str = Field(description="why, what must happen, and what it costs")
    waiting: int = Field(description="steps that wait for it")
    estimate_s: float | None = Field(
        description="until the last of them begins; null when that takes more than the passing of time"
    )


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


class MarkIn(BaseModel):
    """What may be done with a host."""

    model_config = ConfigDict(extra="forbid")

    state: HostState = Field(description="open, cordoned or draining", examples=["cordoned"])


@router.get("/fleet", summary="Hosts, devices, pools, refusals", responses=problems.documented())
def get(services: Use) -> FleetOut:
    """All of the fleet, at one instant."""
    seen = views.fleet(services.database)
    return FleetOut(
        hosts=[_host(host) for host in seen.hosts],
        pools=[_pool(pool) for pool in seen.pools],
        refusals=[_refusal(row) for row in seen.refusals],
    )


@router.get("/fleet/explain", summary="Why is it not running?", responses=problems.documented(404, 422))
def explain(
    services: Use,
    model: Annotated[str | None, Query(description="name of a model", examples=["smollm2:135m"])] = None,
    step: Annotated[UUID | None, Query(description="id of a step that waits")] = None,
) -> ExplanationOut:
    """Why a model, or the model of a step, is not served; what must happen, and when it will be."""
    if model is not None and step is None:
        name = model
    elif step is not None and model is None:
        name = demand.model_of(services.database, step)
    else:
        raise InvalidInput(
            [Problem("query", "exactly one of model and step is needed", "model=… or step=…")], "request"
        )
    asked = demand.asked(services.database, services.catalog, services.settings.pools.models)
    found = reconcile.explain(services.database, asked, services.catalog.get(name).name)
    return ExplanationOut(
        model=found.model,
        condition=found.condition,
        reason=found.reason,
        waiting=found.waiting,
        estimate_s=None if found.estimate is None else found.estimate.total_seconds(),
    )


@router.get("/fleet/defragment", summary="What would defragmenting do?", responses=problems.documented())
def preview(services: Use) -> DefragmentOut:
    """The cheapest moves of idle pools after which models fit that now fit nowhere. Nothing is moved."""
    asked = demand.asked(services.database, services.catalog, services.settings.pools.models)
    found = reconcile.preview_defragmentation(services.database, asked)
    return DefragmentOut(
        moves=[MoveOut(pool=one.pool, bytes=dict(one.bytes), reason=one.reason) for one in found.moves],
        gains=[GainOut(model=one.model, reason=one.reason) for one in found.gains],
        stuck=[GainOut(model=one.model, reason=one.reason) for one in found.stuck],
    )


@router.post("/fleet/defragment", status_code=202, summary="Defragment", responses=problems.documented())
def defragment(services: Use) -> DefragmentOut:
    """Have a control worker make such moves now; the answer says which they would have been a moment ago."""
    found = preview(services)
    services.publisher.publish(reconcile.DEFRAGMENT, (), queue=CONTROL_QUEUE, priority=PRIORITIES["interactive"])
    return found


@router.get("/pools", summary="List pools", responses=problems.documented(422))
def pools(
    services: Use,
    model: str | None = None,
    ended: Annotated[bool, Query(description="with those that have ended lately")] = False,
) -> PoolList:
    """Pools, the newest first."""
    return PoolList(pools=[_pool(pool) for pool in views.pools(services.database, model=model, ended=ended)])


@router.post("/pools", status_code=202, summary="Load a model", responses=problems.documented(404, 422))
def start(services: Use, body: StartIn) -> ExplanationOut:
    """Order a pool of a model. The answer says how it stands; `GET /v1/fleet/explain` follows it."""
    model = services.catalog.get(body.model)
    services.orders.start(model.name, keep=body.keep, pinned=body.pinned)
    return explain(services, model=model.name, step=None)


@router.post("/pools/stop", status_code=202, summary="Stop a model's pools", responses=problems.documented(404, 422))
def stop_model(services: Use, body: StopIn) -> PoolList:
    """Stop all pools of a model, and keep it up no longer. Whoever asks for it later has it started again."""
    services.orders.stop_model(body.model)
    return pools(services, model=body.model, ended=False)


@router.get("/pools/{pool}", summary="One pool", responses=problems.documented(404, 409))
def one(services: Use, pool: str) -> PoolOut:
    """A pool by its id, or the end of it."""
    return _pool(views.pool(services.database, pool))


@router.get("/pools/{pool}/log", summary="The last lines of its log", responses=problems.documented(404, 409))
def log(services: Use, pool: str) -> LogOut:
    """What a pool wrote last, whether it lives or not."""
    found = views.pool(services.database, pool)
    return LogOut(id=found.id, lines=views.log_tail(services.database, found.id).splitlines())


@router.post("/pools/{pool}/stop", status_code=202, summary="Stop a pool", responses=problems.documented(404, 409))
def stop(services: Use, pool: str) -> PoolOut:
    """Stop a pool; its steps may finish within pools.drain_timeout."""
    return one(services, services.orders.stop(pool))


@router.post(
    "/pools/{pool}/restart", status_code=202, summary="Restart a pool", responses=problems.documented(404, 409)
)
def restart(services: Use, pool: str) -> PoolOut:
    """Stop a pool and start another of its model."""
    return one(services, services.orders.stop(pool, again=True))


@router.get("/hosts", summary="List hosts", responses=problems.documented())
def hosts(services: Use) -> HostList:
    """Hosts and their devices."""
    return HostList(hosts=[_host(host) for host in views.hosts(services.database)])


@router.put("/hosts/{name}", summary="Open, cordon or drain a host", responses=problems.documented(404, 422))
def mark(services: Use, name: str, body: MarkIn) -> HostOut:
    """Say what may be done with a host: open, cordoned (nothing new), draining (its pools are moved or stopped)."""
    if body.state is HostState.LOST:
        raise InvalidInput(
            [Problem("state", "a host is not made lost: remove it", "open, cordoned, draining")], "request"
        )
    services.orders.mark(name, body.state)
    return next(_host(host) for host in views.hosts(services.database) if host.host.name == name)


@router.delete("/hosts/{name}", status_code=204, summary="Forget a host", responses=problems.documented(404, 409))
def remove(
    services: Use,
    name: str,
    lost: Annotated[bool, Query(description="its machine is gone, with what it holds")] = False,
) -> None:
    """Forget a host whose agent has ended. `lost` declares that what it held is gone with it."""
    services.orders.remove(name, lost=lost)


def _name(pool: PoolView) -> str:
    row = pool.row
    slug = row.configuration.rpartition(".")[0]
    return row.worker or f"{'simulated-' if row.simulated else ''}pool.{slug}.{row.id[-6:]}"


def _host(seen: HostView) -> HostOut:
    row = seen.host
    return HostOut(
        name=row.name,
        state=HostState(row.state),
        alive=row.alive and row.state != HostState.LOST,
        joined_at=row.joined_at,
        cores=row.cores,
        problems=row.problems,
        devices=[
            DeviceOut(
                id=device.id,
                name=device.name,
                kind=device.kind,
                type=device.type,
                simulated=device.simulated,
                present=device.present,
                total=device.total_bytes,
                capacity=device.capacity_bytes,
                reserved=device.charged_bytes,
                free=device.capacity_bytes - device.charged_bytes,
                set_aside=device.set_aside_bytes,
                used=device.used_bytes,
                strangers=device.stranger_bytes,
                temperature=device.temperature,
                utilisation=device.utilisation,
            )
            for device in seen.devices
        ],
    )


def _pool(seen: PoolView) -> PoolOut:
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
        last_used_at=row.last_used_at,
        ended_at=row.ended_at or row.released_at,
    )


def _refusal(row: Any) -> RefusalOut:
    return RefusalOut(
        model=row.model,
        reason=row.reason,
        needs=row.needs_bytes,
        estimate_s=row.estimate_seconds,
        since=row.since,
    )
