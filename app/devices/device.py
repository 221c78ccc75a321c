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


class GpuBackend(StrEnum):
    """The part of llama.cpp that computes on a GPU."""

    CUDA = "cuda"
    VULKAN = "vulkan"
    METAL = "metal"

    @property
    def label(self) -> str:
        """Its name for people."""
        return "CUDA" if self is GpuBackend.CUDA else self.value.capitalize()


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

    #: Unique on its host: `cpu`, `gpu-0`, `gpu-0-1` for a MIG instance, `vulkan-0`, `software-0`, `metal`, `sim-…`.
    name: str
    kind: HardwareKind
    #: Hardware model: `NVIDIA H200`, the name of the processor, `simulated`.
    model: str
    #: Usable bytes: without those that the driver reserves, and within the limits of this process.
    total: int
    #: Bytes that no process uses.
    free: int
    #: Its permanent identity on its host; empty unless it is a GPU. For CUDA the UUID for `CUDA_VISIBLE_DEVICES`.
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
    #: For a GPU: what computes on it.
    backend: GpuBackend = GpuBackend.CUDA
    #: For a GPU on a PCI bus: its address, such as `0000:03:00.0`; for a MIG instance that of its GPU.
    pci: str = ""
    #: For a Vulkan device: its current number in `GGML_VK_VISIBLE_DEVICES`.
    number: int | None = None
    #: Its memory is the host's RAM: an integrated GPU, or a software device.
    unified: bool = False
    #: It is a driver that computes on the processor, and no GPU.
    software: bool = False
    #: Whether `processes` is complete; otherwise it cannot be said who uses its memory.
    knows_processes: bool = True

    @property
    def type(self) -> str:
        """The key of footprints and layouts: they differ between backends on the same hardware."""
        return self.model if self.backend is GpuBackend.CUDA else f"{self.model} ({self.backend.label})"

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
