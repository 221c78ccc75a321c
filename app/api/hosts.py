"""Hosts: machines with an agent, and the devices that they bring."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from app.api import problems
from app.api.services import Use
from app.fleet import views
from app.fleet.rows import HostState
from app.fleet.views import HostView
from app.kernel.errors import InvalidInput, Problem

router = APIRouter(prefix="/v1/hosts", tags=["fleet"])


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


class HostList(BaseModel):
    """Hosts by name."""

    hosts: list[HostOut]


class MarkIn(BaseModel):
    """What may be done with a host."""

    model_config = ConfigDict(extra="forbid")

    state: HostState = Field(description="open, cordoned or draining", examples=["cordoned"])


@router.get("", summary="List hosts", responses=problems.documented())
def page(services: Use) -> HostList:
    """Hosts and their devices."""
    return HostList(hosts=[out(host) for host in views.hosts(services.database)])


@router.put("/{name}", summary="Open, cordon or drain a host", responses=problems.documented(404, 422))
def mark(services: Use, name: str, body: MarkIn) -> HostOut:
    """Say what may be done with a host: open, cordoned (nothing new), draining (its pools are moved or stopped)."""
    if body.state is HostState.LOST:
        raise InvalidInput(
            [Problem("state", "a host is not made lost: remove it", "open, cordoned, draining")], "request"
        )
    services.orders.mark(name, body.state)
    return next(out(host) for host in views.hosts(services.database) if host.host.name == name)


@router.delete("/{name}", status_code=204, summary="Forget a host", responses=problems.documented(404, 409))
def remove(
    services: Use,
    name: str,
    lost: Annotated[bool, Query(description="its machine is gone, with what it holds")] = False,
) -> None:
    """Forget a host whose agent has ended. `lost` declares that what it held is gone with it."""
    services.orders.remove(name, lost=lost)


def out(seen: HostView) -> HostOut:
    """A host as it is shown."""
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
