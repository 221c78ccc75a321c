"""The build of llama.cpp that is installed on this host: its version, its hash, and what it computes on."""

from __future__ import annotations

import functools
import hashlib
import json
from importlib import metadata

_PACKAGE = "llama-cpp-python"


def build() -> str:
    """The build of llama.cpp on this host: the version of its package, and the hash of its libraries as installed."""
    return f"{metadata.version(_PACKAGE)}+{hashlib.sha256(json.dumps(_libraries()).encode()).hexdigest()[:12]}"


def computes_on_gpus() -> bool:
    """Whether that build was made for NVIDIA GPUs: the usual package was not, and would load everything into RAM."""
    return any("ggml-cuda" in line for line in _libraries())


@functools.cache
def _libraries() -> tuple[str, ...]:
    lines = (metadata.distribution(_PACKAGE).read_text("RECORD") or "").splitlines()
    return tuple(sorted(line for line in lines if line.partition(",")[0].endswith((".so", ".dylib", ".dll"))))
