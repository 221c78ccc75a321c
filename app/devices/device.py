"""
A device: memory into which models are loaded. A GPU, the host's RAM, or a simulated device.

Free memory is measured: unmanaged memory, used by other processes, counts as used.
A simulated device is marked by its kind and its name.

Nothing here measures; `inventory` does.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

#: The name of the host's RAM as a device.
CPU = "cpu"


class HardwareKind(StrEnum):
    """The kind of a device."""

    GPU = "gpu"
    CPU = "cpu"
    SIMULATED = "simulated"


@dataclass(frozen=True, slots=True)
class DeviceProcess:
    """A process that uses memory of a GPU."""

    #: The process id in the driver: that outside of a container.
    pid: int
    #: Bytes; None when the driver does not report them.
    used: int | None


@dataclass(frozen=True, slots=True)
class MeasuredDevice:
    """The measurement of one device of a host."""

    #: Unique on its host: `cpu`, `gpu-0`, `gpu-0-1` for a MIG instance, `sim-…`.
    name: str
    kind: HardwareKind
    #: Hardware model: `NVIDIA H200`, the name of the processor, `simulated`.
    model: str
    #: Usable bytes: without those that the driver reserves, and within the limits of this process.
    total: int
    #: Bytes that no process uses.
    free: int
    #: The UUID for `CUDA_VISIBLE_DEVICES`; empty unless it is a GPU.
    uuid: str = ""
    #: Version of the driver.
    driver: str = ""
    #: For a MIG instance: the UUID of its GPU.
    parent: str = ""
    #: For a GPU: the processes that use its memory.
    processes: tuple[DeviceProcess, ...] = ()
    #: Degrees Celsius.
    temperature: int | None = None
    #: Fraction of the last sample period in which it computed, 0 to 1.
    utilisation: float | None = None
    #: The file of the limit that makes `total` smaller than the hardware; empty without one.
    limited_by: str = ""
    #: For a simulated device: the factor on the catalogue's tokens per second, and bytes loaded per second.
    speed: float = 1.0
    bandwidth: int | None = None

    @property
    def simulated(self) -> bool:
        """Whether it has no hardware."""
        return self.kind is HardwareKind.SIMULATED

    @property
    def used(self) -> int:
        """Used bytes, including unmanaged memory."""
        return self.total - self.free

    def used_by_others(self, pids: Collection[int]) -> int:
        """
        Returns the bytes that are used by processes other than these.

        Memory that the driver does not attribute to a process counts as used by others.
        """
        own = sum(process.used or 0 for process in self.processes if process.pid in pids)
        return max(self.used - own, 0)


@dataclass(frozen=True, slots=True)
class Inventory:
    """The devices of a host, and the problems of their measurement."""

    devices: tuple[MeasuredDevice, ...]
    #: Sentences for people: a driver that does not respond, a GPU that was left out.
    problems: tuple[str, ...] = ()

    def find(self, name: str) -> MeasuredDevice | None:
        """Returns the device of that name, or None."""
        return next((device for device in self.devices if device.name == name), None)
