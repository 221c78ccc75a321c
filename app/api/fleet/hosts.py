"""The resource `hosts`: machines with an agent, and their devices."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from fastapi import Query
from pydantic import BaseModel, ConfigDict, Field

from app.access.callers import KeyScope
from app.api import bodies, problems
from app.api.callers import requires
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.fleet import views
from app.fleet.host import HostState
from app.fleet.views import HostView
from app.kernel.errors import InvalidInput, Problem

router = ApiRouter(prefix="/v1/hosts", tags=["fleet"], dependencies=[requires(KeyScope.READ, all_namespaces=True)])


class DeviceOut(BaseModel):
    """A device of a host: its memory, and what is reserved of it."""

    id: str
    name: str = Field(examples=["cpu", "gpu-0", "sim-0"])
    kind: str
    type: str = Field(examples=["cpu", "NVIDIA H200"])
    simulated: bool
    present: bool = Field(description="false when its agent no longer finds it")
    total: int = Field(description="bytes")
    capacity: int = Field(description="most bytes that all reservations together may have")
    reserved: int = Field(description="bytes of the reservations")
    free: int = Field(description="bytes that can still be reserved")
    guaranteed: int = Field(
        description="guaranteed capacity: bytes reserved for models that are not loaded, lent to others while idle"
    )
    used: int = Field(description="measured bytes in use by all processes")
    unmanaged: int = Field(description="unmanaged memory: bytes of the capacity used without a reservation")
    temperature: int | None = Field(description="degrees Celsius")
    utilisation: float | None = Field(description="0 to 1")


class HostOut(BaseModel):
    """A machine with an agent."""

    name: str
    state: HostState
    alive: bool = Field(description="its agent has sent a heartbeat recently")
    joined_at: datetime
    cores: int
    problems: list[str]
    devices: list[DeviceOut]


class HostList(BaseModel):
    """Hosts by name."""

    hosts: list[HostOut]


class MarkIn(BaseModel):
    """The scheduling state of a host."""

    model_config = ConfigDict(extra="forbid")

    state: HostState = Field(description="schedulable, cordoned or draining", examples=["cordoned"])


@router.get("", summary="List hosts", responses=problems.documented())
def page(services: InjectedServices) -> HostList:
    """Hosts and their devices."""
    return HostList(hosts=[out(host) for host in views.hosts(services.database)])


@router.put(
    "/{name}",
    dependencies=[requires(KeyScope.OPERATE, all_namespaces=True)],
    summary="Uncordon, cordon or drain a host",
    responses=problems.documented(404, 413, 415, 422),
    openapi_extra=bodies.documented_as(MarkIn),
)
def mark(services: InjectedServices, name: str, body: Annotated[MarkIn, bodies.of(MarkIn)]) -> HostOut:
    """Set the scheduling state: schedulable, cordoned (no new pools), draining (its pools are moved or stopped)."""
    if body.state is HostState.LOST:
        raise InvalidInput(
            [Problem("state", "a host cannot be set to lost; remove it instead", "schedulable, cordoned, draining")],
            "request",
        )
    services.operator_commands.mark(name, body.state)
    return out(views.host(services.database, name))


@router.delete(
    "/{name}",
    status_code=204,
    dependencies=[requires(KeyScope.OPERATE, all_namespaces=True)],
    summary="Remove a host",
    responses=problems.documented(404, 409),
)
def remove(
    services: InjectedServices,
    name: str,
    lost: Annotated[bool, Query(description="the machine is gone, with all its processes")] = False,
) -> None:
    """Remove a host whose agent has ended. `lost` declares that its processes are gone, so its bytes are released."""
    services.operator_commands.remove(name, lost=lost)


def out(host: HostView) -> HostOut:
    """Return the answer for a host."""
    return HostOut.model_validate(host, from_attributes=True)
