"""
Tests on software GPUs: llama.cpp's Vulkan backend on Mesa's llvmpipe. `make test-gpu` runs them.

They need a llama.cpp that is built for Vulkan, and a driver. Elsewhere they are skipped, with the reason.
"""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

import pytest

#: Two devices. `GGML_VK_VISIBLE_DEVICES` may name the first one several times: each is a device of its own.
os.environ.setdefault("GGML_VK_VISIBLE_DEVICES", "0,0")
HERE = Path(__file__).parent


def why_not() -> str:
    """Why these tests cannot run here; empty when they can."""
    files = metadata.files("llama-cpp-python") or []
    if not any(file.name.startswith(("libggml-vulkan", "ggml-vulkan.dll")) for file in files):
        return "llama.cpp is not built for Vulkan in this environment: run `make test-gpu`"
    drivers = [file for folder in ("/usr/share", "/etc") for file in Path(folder, "vulkan/icd.d").glob("*.json")]
    if not drivers and "VK_DRIVER_FILES" not in os.environ:
        return "there is no Vulkan driver; on Debian: apt-get install mesa-vulkan-drivers"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot run. Software devices are slow: their kernels are compiled for the processor first."""
    reason = why_not()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.timeout(900))
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))
