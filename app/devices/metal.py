"""
The GPU of an Apple computer: Metal on unified memory.

Its memory is the RAM of the host. macOS lets a GPU use a part of it: two thirds up to 36 GiB, three quarters above, or
`iogpu.wired_limit_mb` where an operator has set it.

Not run: no such computer was available. It is written after Apple's documentation and llama.cpp's source, and tested
with values.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

from app.devices.device import GpuBackend, HardwareKind, MeasuredDevice
from app.kernel.security import texts

_SYSCTL = "/usr/sbin/sysctl"
_SMALL = 36 * 2**30
_NAMES = ("machdep.cpu.brand_string", "hw.optional.arm64", "hw.memsize", "iogpu.wired_limit_mb")


def gpus(free: int, read: Callable[[str], str] | None = None, platform: str = sys.platform) -> list[MeasuredDevice]:
    """Return the GPU of an Apple computer; no device elsewhere. `free` is the free RAM of the host."""
    if platform != "darwin":
        return []
    name, arm, size, limit = (texts.printable((read or _sysctl)(key), 96) for key in _NAMES)
    if arm != "1" or not size.isdecimal() or len(size) > 15:
        return []  # the GPUs of Intel computers have memory of their own, and llama.cpp hardly uses them
    ram = int(size)
    wired = int(limit) * 2**20 if limit.isdecimal() and len(limit) < 9 else 0
    total = min(wired or (ram * 2 // 3 if ram <= _SMALL else ram * 3 // 4), ram)
    return [
        MeasuredDevice(
            name="metal",
            kind=HardwareKind.GPU,
            model=name or "Apple",
            total=total,
            free=min(free, total),
            uuid="metal",
            backend=GpuBackend.METAL,
            unified=True,
            knows_processes=False,
        )
    ]


def _sysctl(name: str) -> str:
    try:
        done = subprocess.run([_SYSCTL, "-n", name], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
