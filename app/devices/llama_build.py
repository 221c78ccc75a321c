"""The installed build of llama.cpp: its version, its hash, and whether it supports GPUs."""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from importlib import metadata

from app.devices.device import GpuBackend

_PACKAGE = "llama-cpp-python"


def build() -> str:
    """Returns the id of the build: the version of its package, and a hash of its installed libraries."""
    return f"{metadata.version(_PACKAGE)}+{hashlib.sha256(json.dumps(_libraries()).encode()).hexdigest()[:12]}"


@functools.cache
def backends() -> frozenset[GpuBackend]:
    """Returns the backends for GPUs of the build. The standard package has none: it loads everything into RAM."""
    return frozenset(one for one in GpuBackend if any(f"ggml-{one}" in line for line in _libraries()))


def how_to_build(backend: GpuBackend) -> str:
    """Returns the command that installs a build with this backend."""
    release = metadata.version(_PACKAGE)
    return (
        f"CMAKE_ARGS=-DGGML_{backend.upper()}=ON {sys.executable} -m pip install --force-reinstall --no-deps "
        f"--no-cache-dir --no-binary {_PACKAGE} {_PACKAGE}=={release}"
    )


@functools.cache
def _libraries() -> tuple[str, ...]:
    lines = (metadata.distribution(_PACKAGE).read_text("RECORD") or "").splitlines()
    return tuple(sorted(line for line in lines if line.partition(",")[0].endswith((".so", ".dylib", ".dll"))))
