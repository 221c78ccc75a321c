"""
A device: memory that models can lie in. A GPU, the host's RAM, or one that is only simulated.

What is free is what was measured: memory that strangers hold is used memory.
A simulated device is called so by its kind and by its name.

Nothing here measures: `devices` does.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

#: The name of the host's RAM as a device.
CPU = "cpu"


class HardwareKind(StrEnum):
    """What a device is."""

    GPU = "gpu"
    CPU = "cpu"
    SIMULATED = "simulated"


@dataclass(frozen=True, slots=True)
class DeviceProcess:
    """A process that holds memory of a GPU."""

    #: As the driver numbers it: outside the container, when there is one.
    pid: int
    #: Bytes; None where the driver does not tell.
    used: int | None


@dataclass(frozen=True, slots=True)
class MeasuredDevice:
    """One device of a host, as it was measured."""

    #: Unique on its host: `cpu`, `gpu-0`, `gpu-0-1` for an instance of a GPU that is divided (MIG), `sim-…`.
    name: str
    kind: HardwareKind
    #: What it is: `NVIDIA H200`, the name of the processor, `simulated`.
    model: str
    #: Bytes that can be used: without what the driver keeps for itself, and within the limits of this process.
    total: int
    #: Bytes that nobody uses now.
    free: int
    #: What pins a process to it (`CUDA_VISIBLE_DEVICES`); empty for what is no GPU.
    uuid: str = ""
    #: Version of the driver.
    driver: str = ""
    #: The UUID of the GPU of which this is an instance.
    parent: str = ""
    #: Of a GPU: who holds memory of it.
    processes: tuple[DeviceProcess, ...] = ()
    #: Degrees Celsius.
    temperature: int | None = None
    #: Part of the last moments in which it computed, 0 to 1.
    utilisation: float | None = None
    #: What makes `total` smaller than the hardware: the file of a limit.
    limited_by: str = ""
    #: Of a simulated device: tokens a second, as a multiple of the catalogue's; and bytes that are loaded in a second.
    speed: float = 1.0
    bandwidth: int | None = None

    @property
    def used(self) -> int:
        """Bytes that somebody uses, strangers among them."""
        return self.total - self.free

    def used_by_others(self, pids: Collection[int]) -> int:
        """
        Bytes that are used by processes other than these.

        What the driver does not tell of a process counts as others'.
        """
        own = sum(process.used or 0 for process in self.processes if process.pid in pids)
        return max(self.used - own, 0)


@dataclass(frozen=True, slots=True)
class Inventory:
    """The devices of a host, and what went wrong in measuring them."""

    devices: tuple[MeasuredDevice, ...]
    #: Sentences for people: a driver that does not answer, a GPU that was left out.
    problems: tuple[str, ...] = ()

    def find(self, name: str) -> MeasuredDevice | None:
        """The device of that name, or None."""
        return next((device for device in self.devices if device.name == name), None)
