"""The installed build of llama.cpp: its version, its hash, and whether it supports GPUs."""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from importlib import metadata

from app.devices.device import GpuBackend

_PACKAGE = "llama-cpp-python"
#: What has to be there before a build.
_NEEDED = {
    GpuBackend.CUDA: "a C++ compiler, CMake, and the CUDA toolkit with nvcc "
    "(apt install g++ cmake nvidia-cuda-toolkit)",
    GpuBackend.VULKAN: "a C++ compiler, CMake, and Vulkan's headers 1.3.272 or later with glslc "
    "(apt install g++ cmake libvulkan-dev glslc spirv-headers)",
    GpuBackend.METAL: "the command line tools of Xcode, and CMake (xcode-select --install; brew install cmake)",
}


def build() -> str:
    """Returns the id of the build: the version of its package, and a hash of its installed libraries."""
    return f"{metadata.version(_PACKAGE)}+{hashlib.sha256(json.dumps(_libraries()).encode()).hexdigest()[:12]}"


@functools.cache
def backends() -> frozenset[GpuBackend]:
    """Returns the backends for GPUs of the build. The standard package has none: it loads everything into RAM."""
    return frozenset(one for one in GpuBackend if any(f"ggml-{one}" in line for line in _libraries()))


def what_to_install(backend: GpuBackend) -> str:
    """Returns what a build with this backend needs on the machine, with Debian's names where there are any."""
    return _NEEDED[backend]


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
