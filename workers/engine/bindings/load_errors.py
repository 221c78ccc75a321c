"""The errors of failed loads, from what llama.cpp logged."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import psutil

from app.kernel.errors import AllocationFailed, ModelFileDamaged, ModelUnsupported
from workers.engine.bindings import native

_ALLOCATION = re.compile(
    r"(?:unable|failed|cannot) (?:to )?allocate|out ?of ?memory|OutOf(?:Device|Host)Memory|bad_alloc|cudaMalloc failed",
    re.IGNORECASE,
)
_SIZE = re.compile(r"of size ([\d.]+)(?: (MiB|GiB))?")
#: The buffer type of a failed allocation: that of a GPU has its name, such as Vulkan0.
_BUFFER = re.compile(r"(?:unable|failed) to allocate (\S+) buffer")


def reason_in(lines: Sequence[str]) -> str:
    """Return the first log line that contains a reason, without function names."""
    texts = [re.sub(r"^(?:\w+: |error loading model: )+", "", line) for line in lines]
    reasons = [line for line in texts if not line.startswith("failed to load model") and line]
    return reasons[0].rstrip() if reasons else ""


def load_error(path: Path, lines: Sequence[str]) -> Exception:
    """Return the error for a failed load, from llama.cpp's log lines."""
    text = "\n".join(lines)
    if _ALLOCATION.search(text):
        found = _SIZE.search(text)
        scale = {"GiB": 2**30, "MiB": 2**20}.get(found[2] or "", 1) if found else 1
        needed = int(float(found[1]) * scale) if found else None
        return _allocation_failed(path, text, needed)
    why = reason_in(lines) or "llama.cpp rejected it without a reason"
    unsupported = re.search(
        r"unknown model architecture.*|unsupported .*|requires flash|not supported.*|device \S+ does not support.*"
        r"|LLAMA_SPLIT_MODE_\S+ not implemented.*|invalid value for main_gpu.*",
        text,
    )
    if unsupported:
        return ModelUnsupported(path, unsupported[0].strip())
    return ModelFileDamaged(path, why)


def _allocation_failed(path: Path, text: str, needed: int | None) -> AllocationFailed:
    """Return the error for an allocation of `needed` bytes that failed, with the free memory of its device."""
    buffer = _BUFFER.search(text)
    on_gpu = native.free_on(buffer[1]) if buffer else None
    if buffer is None or on_gpu is None:
        return AllocationFailed(str(path), needed, psutil.virtual_memory().available)
    # Some drivers report the size of the device as free memory.
    free = on_gpu if needed is not None and on_gpu < needed else None
    return AllocationFailed(f"{path} on {buffer[1]}: one buffer", needed, free)
