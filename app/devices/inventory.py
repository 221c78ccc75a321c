"""
The inventory: measures the devices of this host: its RAM, its GPUs, and the simulated devices of the settings.

Nothing here uses CUDA: a CUDA context would use half a gigabyte of the memory that is measured.
"""

from __future__ import annotations

import functools
import threading
from pathlib import Path

import psutil

from app.devices import control_group, llama_build
from app.devices.device import CPU, HardwareKind, Inventory, MeasuredDevice
from app.devices.nvml import Gpus
from app.kernel.sections.fleet import FleetSettings, SimulatedDevice
from app.kernel.security import texts


class Devices:
    """The devices of this host. Thread-safe: one thread at a time calls the driver."""

    def __init__(self, settings: FleetSettings, gpus: Gpus | None = None) -> None:
        """Measures nothing yet."""
        self._simulated = settings.simulated
        self._gpus = gpus or Gpus()
        self._lock = threading.Lock()

    def measure(self) -> Inventory:
        """
        Measures all devices: RAM first, then GPUs by number, then simulated devices.

        A simulated device is always empty here: only the ledger knows what its simulated engines use.
        """
        with self._lock:
            gpus, problems = self._gpus.read()
        if gpus and not llama_build.computes_on_gpus():
            problems.append("the installed llama.cpp was built without CUDA: no model can be loaded on GPUs")
        return Inventory((ram(), *gpus, *(_simulated(device) for device in self._simulated)), tuple(problems))

    def close(self) -> None:
        """Closes the connection to the driver."""
        with self._lock:
            self._gpus.close()


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
