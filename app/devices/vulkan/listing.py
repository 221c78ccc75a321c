"""
The Vulkan devices of this host, as measured devices: AMD and Intel GPUs, and NVIDIA GPUs where CUDA is not used.

A device is identified by its PCI address, or by its Vulkan UUID where it has none. Vulkan numbers devices anew in each
process: the number is that of the last listing, by which a process is pinned, and the process checks what it sees.
A GPU with two drivers is listed once. Software devices are used only as `fleet.software` declares them: their memory is
the host's RAM.

The list comes from a process of its own, `loader`. It is asked again only while a driver reports nothing to the kernel;
one that does not answer in time is killed, reported, and started again by the next reading.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from app.devices import pci
from app.devices.device import GpuBackend, HardwareKind, MeasuredDevice
from app.devices.pci import PciGpu
from app.kernel import log
from app.kernel.security import texts

_log = log.get(__name__)

#: Seconds for a listing, and for which it is kept while the kernel reports the memory of every device.
_SECONDS, _KEPT = 20.0, 60.0
_MAX_BYTES, _MAX_TEXT, _MAX_ANSWER = 1 << 50, 96, 1 << 20
_LOADER = (sys.executable, "-P", "-m", "app.devices.vulkan.loader")


@dataclass(frozen=True, slots=True)
class PhysicalDevice:
    """A physical device of Vulkan, as the loader lists it."""

    #: Its number in `GGML_VK_VISIBLE_DEVICES`.
    number: int
    name: str
    #: `discrete`, `integrated`, `virtual`, `software` or `other`.
    kind: str
    vendor: int
    uuid: str
    #: Its PCI address; empty without one.
    pci: str
    driver: str
    #: Bytes of its memory.
    total: int
    #: Free bytes; None when its driver does not report them.
    free: int | None


_ANSWER = TypeAdapter(list[PhysicalDevice])


class VulkanListing:
    """The connection to the listing process. Not thread-safe."""

    def __init__(self, command: Sequence[str] = _LOADER) -> None:
        """Starts nothing yet."""
        self._command = command
        self._process: subprocess.Popen[str] | None = None
        self._kept: tuple[float, list[PhysicalDevice]] | None = None

    def read(self, measured: Container[str]) -> tuple[list[PhysicalDevice], list[str]]:
        """
        Return the physical devices in Vulkan's order, and a sentence for each problem.

        `measured` has the addresses of GPUs whose memory is measured elsewhere: for these a recent list is enough.
        """
        now = time.monotonic()
        if self._kept is not None and now - self._kept[0] < _KEPT:
            return self._kept[1], []
        try:
            found = self._ask()
        except (OSError, ValueError, TimeoutError) as error:
            self.close()
            return [], [f"Vulkan devices cannot be listed: {error}; run `vulkaninfo --summary` for details"]
        if all(one.kind == "software" or one.pci in measured for one in found):
            self.close()  # it would only wait
            self._kept = (now, found)
        return found, []

    def close(self) -> None:
        """End the listing process, and forget its list."""
        self._kept = None
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()
            process.communicate()

    def _ask(self) -> list[PhysicalDevice]:
        if self._process is None:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        assert self._process.stdin is not None, "it is a pipe"
        assert self._process.stdout is not None, "it is a pipe"
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], _SECONDS)[0]:
            raise TimeoutError(f"a driver has not answered for {_SECONDS:g} s")
        line = self._process.stdout.readline(_MAX_ANSWER)
        if not line:
            raise ValueError(f"a driver ended the listing process (exit code {self._process.wait()})")
        answer: Any = json.loads(line)
        if (error := answer.get("error") if isinstance(answer, dict) else None) is not None:
            raise ValueError(str(error)[:200])
        try:
            return _ANSWER.validate_python(answer)
        except ValidationError as invalid:
            raise ValueError(f"the listing is not what it should be: {invalid.errors()[0]['msg']}") from invalid


def gpus(
    found: Sequence[PhysicalDevice],
    measured: Mapping[str, PciGpu],
    processes: Mapping[str, tuple[Any, ...]],
    problems: list[str],
) -> list[MeasuredDevice]:
    """Return the GPUs of a listing, by identity. A GPU without usable figures is left out with a problem."""
    once: dict[str, PhysicalDevice] = {}
    for one in found:
        if one.kind in {"discrete", "integrated", "virtual"}:
            once.setdefault(identity(one), one)
    devices = []
    for number, (name, one) in enumerate(sorted(once.items())):
        known = measured.get(one.pci)
        total, free = one.total, one.free
        if known is not None and known.total is not None and known.used is not None and one.kind == "discrete":
            total, free = known.total, known.total - known.used
        if not 0 < total < _MAX_BYTES or one.number < 0:
            problems.append(
                f"vulkan-{number} ({_printable(one.name)}) is left out: it reports {total:,} bytes of memory"
            )
            continue
        devices.append(
            MeasuredDevice(
                name=f"vulkan-{number}",
                kind=HardwareKind.GPU,
                model=_printable(one.name),
                total=total,
                free=total if free is None else min(max(free, 0), total),
                uuid=name,
                driver=_printable(one.driver),
                processes=processes.get(one.pci, ()),
                temperature=known.temperature if known else None,
                utilisation=known.utilisation if known else None,
                backend=GpuBackend.VULKAN,
                pci=one.pci,
                number=one.number,
                unified=one.kind == "integrated",
                knows_processes=known is not None and known.used is not None,
            )
        )
    return devices


def software(found: Sequence[PhysicalDevice], sizes: Sequence[int], free: int) -> list[MeasuredDevice]:
    """Return a software device of each size. `free` is the free RAM of the host, of which they are a part."""
    on = next((one for one in found if one.kind == "software"), None)
    if on is None:
        return []
    return [
        MeasuredDevice(
            name=f"software-{number}",
            kind=HardwareKind.GPU,
            model=_printable(on.name),
            total=size,
            free=min(size, free),
            uuid=f"software-{number}",
            driver=_printable(on.driver),
            backend=GpuBackend.VULKAN,
            number=on.number,
            unified=True,
            software=True,
            knows_processes=False,
        )
        for number, size in enumerate(sizes)
    ]


def identity(one: PhysicalDevice) -> str:
    """Return the permanent identity of a device on its host."""
    return f"vulkan-{one.pci or one.uuid}"


def read_kernel() -> tuple[dict[str, PciGpu], dict[str, tuple[Any, ...]]]:
    """Return the kernel's GPUs that have measured memory, and the processes on all of them, by address."""
    found = {one.address: one for one in pci.gpus()}
    return {address: one for address, one in found.items() if one.used is not None}, pci.processes() if found else {}


def _printable(value: str) -> str:
    return texts.printable(value, _MAX_TEXT)
