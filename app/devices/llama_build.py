"""The installed build of llama.cpp: its version, its hash, and whether it supports GPUs."""

from __future__ import annotations

import functools
import hashlib
import json
from importlib import metadata

_PACKAGE = "llama-cpp-python"


def build() -> str:
    """Returns the id of the build: the version of its package, and a hash of its installed libraries."""
    return f"{metadata.version(_PACKAGE)}+{hashlib.sha256(json.dumps(_libraries()).encode()).hexdigest()[:12]}"


def computes_on_gpus() -> bool:
    """Returns whether the build supports NVIDIA GPUs. The standard package does not: it loads everything into RAM."""
    return any("ggml-cuda" in line for line in _libraries())


@functools.cache
def _libraries() -> tuple[str, ...]:
    lines = (metadata.distribution(_PACKAGE).read_text("RECORD") or "").splitlines()
    return tuple(sorted(line for line in lines if line.partition(",")[0].endswith((".so", ".dylib", ".dll"))))
