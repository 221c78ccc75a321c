"""
The devices that llama.cpp sees in this process: the proof that the process is pinned as intended.

Vulkan numbers devices anew in each process, so the variable that pins a pool is not enough: before the load, the pool
compares what llama.cpp lists with the devices that are reserved for it.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from app.devices.device import GpuBackend, MeasuredDevice
from app.kernel.errors import Unavailable
from workers.engine.bindings import native

#: ggml's types of devices that are GPUs: with memory of their own, and integrated ones.
_GPUS = (1, 2)


class _Properties(ctypes.Structure):
    """ggml_backend_dev_props."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("description", ctypes.c_char_p),
        ("free", ctypes.c_size_t),
        ("total", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("id", ctypes.c_char_p),
        ("capabilities", ctypes.c_bool * 16),
    )


@dataclass(frozen=True, slots=True)
class VisibleGpu:
    """A GPU that llama.cpp lists in this process."""

    #: ggml's name, such as `CUDA0` or `Vulkan1`: its backend, and its number among the visible ones.
    name: str
    description: str
    free: int
    total: int
    #: Its PCI address; empty when ggml does not know it.
    pci: str


def gpus() -> list[VisibleGpu]:
    """Return the GPUs in ggml's order. It creates a context on each, as a load does."""
    library = native.library
    count, get, read = library.ggml_backend_dev_count, library.ggml_backend_dev_get, library.ggml_backend_dev_get_props
    count.restype, count.argtypes = ctypes.c_size_t, []
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    read.restype, read.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p]
    found = []
    for index in range(count()):
        properties = _Properties()
        read(get(index), ctypes.byref(properties))
        if properties.type in _GPUS:
            found.append(
                VisibleGpu(
                    _text(properties.name),
                    _text(properties.description),
                    properties.free,
                    properties.total,
                    _text(properties.id).lower(),
                )
            )
    return found


def check(wanted: Sequence[MeasuredDevice]) -> list[VisibleGpu]:
    """Return the GPUs that llama.cpp sees. Raises Unavailable unless they are exactly these, in this order."""
    seen = gpus()
    if any(gpu.backend is GpuBackend.METAL for gpu in wanted) or (not wanted and sys.platform == "darwin"):
        return seen  # Metal's one device cannot be hidden
    if problem := difference(wanted, seen):
        raise Unavailable(f"this pool is not pinned to its devices: {problem}")
    return seen


def difference(wanted: Sequence[MeasuredDevice], seen: Sequence[VisibleGpu]) -> str:
    """Return how the visible GPUs differ from those that are wanted; empty when they do not."""
    named, listed = ", ".join(gpu.name for gpu in wanted), ", ".join(gpu.description for gpu in seen)
    if len(wanted) != len(seen):
        return f"llama.cpp sees {len(seen)} GPUs ({listed or 'none'}); {len(wanted)} are reserved ({named or 'none'})"
    for gpu, own in zip(wanted, seen, strict=True):
        if not own.name.lower().startswith(gpu.backend):
            return f"llama.cpp sees {own.name} in the place of {gpu.name}, on which {gpu.backend.label} computes"
        # What CUDA says of the address of a MIG instance was never seen; its UUID has pinned it.
        if gpu.pci and own.pci and gpu.pci != own.pci and not gpu.parent:
            return f"llama.cpp sees the GPU at {own.pci} in the place of {gpu.name}, which is at {gpu.pci}"
    return ""


def print_gpus() -> int:
    """Print the GPUs that llama.cpp sees as one JSON document. Returns the exit code."""
    sys.stdout.write(json.dumps([asdict(one) for one in gpus()]) + "\n")
    return 0


def _text(value: Any) -> str:
    return (value or b"").decode("utf-8", "replace")
