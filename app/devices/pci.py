"""
GPUs as the Linux kernel lists them: their PCI addresses, drivers, measured memory and the processes that use them.

The driver of AMD reports the memory in use; of other drivers only the processes are known. These are those whose file
descriptors this user may read: all of them for root, its own for another user.

No library of a driver is called. A system without these files has no such figures.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from app.devices.device import DeviceProcess

#: Vendors of GPUs, by PCI id; other display controllers are those of servers' consoles and of virtual machines.
VENDORS = {0x1002: "AMD", 0x10DE: "NVIDIA", 0x8086: "Intel"}
_DISPLAY = 0x03
_ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
#: Most bytes of a GPU, and most GPUs and processes: a larger figure is wrong.
_MAX_BYTES, _MAX_GPUS, _MAX_PROCESSES = 1 << 50, 64, 1_000
#: In the records of the kernel, memory on the device: amdgpu's `vram`, i915's `local0`, xe's `vram0`.
_RECORD = re.compile(r"drm-(total|memory|resident)-(?:vram|local)\d*:\s*(\d+)\s*(KiB|MiB|GiB)?")
_UNITS = {None: 1, "": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True, slots=True)
class PciGpu:
    """A GPU on the PCI bus."""

    #: Such as `0000:03:00.0`.
    address: str
    vendor: int
    #: Name of the kernel's driver; empty without one.
    driver: str
    #: Its node for computing, such as `/dev/dri/renderD128`; None when the driver made none.
    node: Path | None
    #: Bytes of its own memory, and those in use; None when its driver does not report them.
    total: int | None
    used: int | None
    #: Fraction of time in which it computed, and degrees Celsius.
    utilisation: float | None
    temperature: int | None

    @property
    def vendor_name(self) -> str:
        """The name of its vendor."""
        return VENDORS.get(self.vendor, f"vendor {self.vendor:04x}")


def gpus(root: Path = Path("/")) -> list[PciGpu]:
    """Return the GPUs of these vendors, by address."""
    try:
        folders = sorted((root / "sys/bus/pci/devices").iterdir())
    except OSError:
        return []
    found = (_gpu(folder, root) for folder in folders if _ADDRESS.fullmatch(folder.name))
    return [one for one in found if one is not None][:_MAX_GPUS]


def processes(root: Path = Path("/")) -> dict[str, tuple[DeviceProcess, ...]]:
    """Return for the address of each GPU the processes that use its memory, as far as this user may see them."""
    found: dict[str, dict[int, int]] = {}
    try:
        names = [entry.name for entry in (root / "proc").iterdir() if entry.name.isdecimal()]
    except OSError:
        return {}
    for name in names:
        clients: dict[tuple[str, str], int] = {}
        for text in _records(root / "proc" / name):
            fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
            address, client = fields.get("drm-pdev", "").strip(), fields.get("drm-client-id", "").strip()
            if _ADDRESS.fullmatch(address):  # several descriptors may be of one client
                clients[address, client] = _size(text)
        for (address, _), size in clients.items():
            by_pid = found.setdefault(address, {})
            if len(by_pid) < _MAX_PROCESSES:
                by_pid[int(name)] = by_pid.get(int(name), 0) + size
    return {
        address: tuple(DeviceProcess(pid, used) for pid, used in sorted(pids.items()))
        for address, pids in found.items()
    }


def _gpu(folder: Path, root: Path) -> PciGpu | None:
    vendor, class_ = _number(folder / "vendor"), _number(folder / "class")
    if class_ is None or class_ >> 16 != _DISPLAY or vendor not in VENDORS:
        return None
    try:
        driver = (folder / "driver").resolve(strict=True).name
    except OSError:
        driver = ""
    nodes = sorted(node.name for node in _inside(folder / "drm") if node.name.startswith("renderD"))
    total, used = _number(folder / "mem_info_vram_total"), _number(folder / "mem_info_vram_used")
    known = total is not None and used is not None and 0 < total < _MAX_BYTES
    busy = _number(folder / "gpu_busy_percent")
    degrees = [_number(sensor / "temp1_input") for sensor in _inside(folder / "hwmon")]
    heat = next((one // 1000 for one in degrees if one is not None and 0 <= one < 1_000_000), None)
    return PciGpu(
        address=folder.name,
        vendor=vendor,
        driver=driver,
        node=root / "dev/dri" / nodes[0] if nodes else None,
        total=total if known else None,
        used=min(used or 0, total or 0) if known else None,
        utilisation=None if busy is None else min(busy / 100, 1.0),
        temperature=heat,
    )


def _records(process: Path) -> Iterator[str]:
    """Yield the kernel's records of the descriptors of a process that are open on a GPU."""
    try:
        descriptors = sorted((process / "fd").iterdir())
    except OSError:
        return
    for descriptor in descriptors:
        try:
            if str(descriptor.readlink()).startswith("/dev/dri/"):
                yield (process / "fdinfo" / descriptor.name).read_text(encoding="ascii", errors="replace")[:16_384]
        except OSError:
            continue


def _size(record: str) -> int:
    """Return the bytes of device memory in a record: total where given, otherwise what older kernels report."""
    sizes: dict[str, int] = {}
    for key, size, unit in _RECORD.findall(record):
        sizes[key] = sizes.get(key, 0) + int(size[:18]) * _UNITS[unit]
    return min(next((sizes[key] for key in ("total", "memory", "resident") if key in sizes), 0), _MAX_BYTES)


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _number(path: Path) -> int | None:
    """Return the number in the file, decimal or hexadecimal; None without one."""
    try:
        return int(path.read_text(encoding="ascii", errors="replace")[:64].strip(), 0)
    except (OSError, ValueError):
        return None
