"""Devices: the memory of this host, as it is now."""

from __future__ import annotations

import socket

from fastapi import APIRouter
from pydantic import BaseModel, Field

from app.api import problems
from app.api.services import Use
from app.devices.device import HardwareKind, MeasuredDevice
from app.devices.inventory import Devices

router = APIRouter(prefix="/v1/devices", tags=["devices"])


class ProcessOut(BaseModel):
    """A process that holds memory of a GPU."""

    pid: int = Field(description="as the driver numbers it: outside the container, when there is one")
    used: int | None = Field(description="bytes; null where the driver does not tell")


class MeasuredDeviceOut(BaseModel):
    """A device."""

    name: str = Field(examples=["cpu", "gpu-0", "gpu-0-1", "sim-0"])
    kind: HardwareKind
    simulated: bool
    model: str = Field(examples=["NVIDIA H200"])
    total: int = Field(description="bytes that can be used")
    used: int = Field(description="bytes that somebody uses, strangers among them; of a simulated device always 0")
    free: int
    uuid: str = Field(description="what pins a process to it; empty for what is no GPU")
    driver: str
    parent: str = Field(description="UUID of the GPU of which this is an instance (MIG)")
    processes: list[ProcessOut]
    temperature: int | None = Field(description="degrees Celsius")
    utilisation: float | None = Field(description="0 to 1")
    limited_by: str = Field(description="the file of a limit that makes total smaller than the hardware")
    speed: float = Field(description="of a simulated device: tokens a second, as a multiple of the catalogue's")
    bandwidth: int | None = Field(description="of a simulated device: bytes that are loaded in a second")


class DeviceList(BaseModel):
    """The devices of the host that answers."""

    host: str
    devices: list[MeasuredDeviceOut]
    problems: list[str] = Field(description="what could not be measured, and why")


@router.get("", summary="Devices of this host", responses=problems.documented())
def page(services: Use) -> DeviceList:
    """The devices of the host on which this API runs, measured now."""
    return listed(services.devices)


def listed(devices: Devices) -> DeviceList:
    """All devices as they are now, as the API and the command show them."""
    found = devices.measure()
    return DeviceList(
        host=socket.gethostname(), devices=[_out(device) for device in found.devices], problems=list(found.problems)
    )


def _out(device: MeasuredDevice) -> MeasuredDeviceOut:
    return MeasuredDeviceOut(
        name=device.name,
        kind=device.kind,
        simulated=device.kind is HardwareKind.SIMULATED,
        model=device.model,
        total=device.total,
        used=device.used,
        free=device.free,
        uuid=device.uuid,
        driver=device.driver,
        parent=device.parent,
        processes=[ProcessOut(pid=process.pid, used=process.used) for process in device.processes],
        temperature=device.temperature,
        utilisation=device.utilisation,
        limited_by=device.limited_by,
        speed=device.speed,
        bandwidth=device.bandwidth,
    )
