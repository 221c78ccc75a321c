"""The resource `devices`: the devices of this host and their memory, measured now."""

from __future__ import annotations

import socket

from pydantic import BaseModel, Field

from app.access.callers import KeyScope
from app.api import problems
from app.api.callers import requires
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.devices.device import HardwareKind
from app.devices.inventory import Devices

router = ApiRouter(prefix="/v1/devices", tags=["devices"], dependencies=[requires(KeyScope.READ, all_namespaces=True)])


class ProcessOut(BaseModel):
    """A process that uses memory of a GPU."""

    pid: int = Field(description="as the driver reports it: in a container, the id outside of it")
    used: int | None = Field(description="bytes; null when the driver does not report it")


class MeasuredDeviceOut(BaseModel):
    """A measured device."""

    name: str = Field(examples=["cpu", "gpu-0", "gpu-0-1", "sim-0"])
    kind: HardwareKind
    simulated: bool
    model: str = Field(examples=["NVIDIA H200"])
    total: int = Field(description="bytes that can be used")
    used: int = Field(description="bytes in use, unmanaged memory included; always 0 for a simulated device")
    free: int
    uuid: str = Field(description="pins a process to the device; empty when it is not a GPU")
    driver: str
    parent: str = Field(description="UUID of the GPU of which this is an instance (MIG)")
    processes: list[ProcessOut]
    temperature: int | None = Field(description="degrees Celsius")
    utilisation: float | None = Field(description="0 to 1")
    limited_by: str = Field(description="the file of the limit that makes `total` smaller than the hardware")
    speed: float = Field(description="of a simulated device: tokens per second as a multiple of the catalogue's")
    bandwidth: int | None = Field(description="of a simulated device: bytes loaded per second")


class DeviceList(BaseModel):
    """The devices of the host on which the API runs."""

    host: str
    devices: list[MeasuredDeviceOut]
    problems: list[str] = Field(description="failed measurements, each with its reason")


@router.get("", summary="Devices of this host", responses=problems.documented())
def page(services: InjectedServices) -> DeviceList:
    """The devices of the host on which this API runs, measured now."""
    return measured_devices(services.devices)


def measured_devices(devices: Devices) -> DeviceList:
    """Measure all devices and return the answer, which the API and the command share."""
    found = devices.measure()
    return DeviceList(
        host=socket.gethostname(),
        devices=[MeasuredDeviceOut.model_validate(device, from_attributes=True) for device in found.devices],
        problems=list(found.problems),
    )
