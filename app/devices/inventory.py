"""
The inventory: measures the devices of this host: its RAM, its GPUs, and those that the settings declare.

A GPU of NVIDIA is measured by NVML, whatever computes on it: CUDA, or Vulkan with a llama.cpp without CUDA. Others are
Vulkan's, or Metal's.
Nothing here makes a context on a GPU: it would use half a gigabyte of the memory that is measured.
"""

from __future__ import annotations

import functools
import threading
from dataclasses import replace
from pathlib import Path

import psutil

from app.devices import control_group, llama_build, metal
from app.devices.device import CPU, GpuBackend, HardwareKind, Inventory, MeasuredDevice
from app.devices.nvml import Gpus
from app.devices.vulkan import listing
from app.devices.vulkan.listing import VulkanListing
from app.kernel.sections.fleet import FleetSettings, SimulatedDevice
from app.kernel.security import texts


class Devices:
    """The devices of this host. Thread-safe: one thread at a time calls the driver."""

    def __init__(self, settings: FleetSettings, gpus: Gpus | None = None, vulkan: VulkanListing | None = None) -> None:
        """Measures nothing yet."""
        self._simulated = settings.simulated
        self._software = settings.software
        self._gpus = gpus or Gpus()
        self._vulkan = vulkan or VulkanListing()
        self._lock = threading.Lock()

    def measure(self) -> Inventory:
        """
        Measures all devices: RAM first, then GPUs by number or address, software devices, and simulated devices.

        A simulated device is always empty here: only the ledger knows what its simulated engines use.
        """
        with self._lock:
            gpus, problems = self._gpus.read()
            memory = ram()
            gpus = self._with_vulkan(gpus, memory.free, problems)
        gpus += metal.gpus(memory.free)
        for backend in sorted({gpu.backend for gpu in gpus} - llama_build.backends()):
            names = ", ".join(gpu.name for gpu in gpus if gpu.backend is backend)
            problems.append(
                f"the installed llama.cpp was built without {backend.label}: no model can be loaded on {names}; "
                f"this installs such a build, and `arriero gpu check` says what it needs: "
                f"{llama_build.how_to_build(backend)}"
            )
        return Inventory((memory, *gpus, *(_simulated(device) for device in self._simulated)), tuple(problems))

    def _with_vulkan(self, gpus: list[MeasuredDevice], free: int, problems: list[str]) -> list[MeasuredDevice]:
        """Returns the GPUs together with those of Vulkan, if llama.cpp can compute there."""
        if GpuBackend.VULKAN not in llama_build.backends():
            if self._software:
                problems.append("fleet.software has no effect: the installed llama.cpp was built without Vulkan")
            return gpus
        kernel, processes = listing.read_kernel()
        found, failures = self._vulkan.read({*kernel, *(gpu.pci for gpu in gpus)} - {""})
        problems += failures
        others = []
        for device in listing.gpus(found, kernel, processes, problems):
            own = next((index for index, gpu in enumerate(gpus) if gpu.pci and gpu.pci == device.pci), None)
            if own is None:
                others.append(device)
            elif GpuBackend.CUDA not in llama_build.backends() and not gpus[own].parent:
                gpus[own] = replace(gpus[own], backend=GpuBackend.VULKAN, number=device.number)
        made = listing.software(found, self._software, free)
        if self._software and not made and not failures:
            problems.append("fleet.software has no effect: Vulkan lists no software device (apt: mesa-vulkan-drivers)")
        return [*gpus, *others, *made]

    def close(self) -> None:
        """Closes the connections to the drivers."""
        with self._lock:
            self._gpus.close()
            self._vulkan.close()


def ram(root: Path = Path("/")) -> MeasuredDevice:
    """Measures the host's RAM, within the limit of this process's control group."""
    memory = psutil.virtual_memory()
    total, free, limited_by = memory.total, memory.available, ""
    limit = control_group.find(root)
    if limit is not None:
        free = min(free, limit.free)
        if limit.total < total:
            total, limited_by = limit.total, str(limit.path)
    return MeasuredDevice(CPU, HardwareKind.CPU, processor(root), total, min(free, total), limited_by=limited_by)


@functools.cache
def processor(root: Path = Path("/")) -> str:
    """Returns the name of the processor as Linux reports it, or `RAM`."""
    try:
        lines = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return texts.printable(names[0], 100) if names else "RAM"


def _simulated(device: SimulatedDevice) -> MeasuredDevice:
    return MeasuredDevice(
        name=device.name,
        kind=HardwareKind.SIMULATED,
        model="simulated",
        total=device.bytes,
        free=device.bytes,
        speed=device.speed,
        bandwidth=device.bandwidth,
    )
