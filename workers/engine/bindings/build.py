"""The build of llama.cpp: what the loaded library says of itself, for `arriero version`."""

from __future__ import annotations

import ctypes
import json
import sys

from workers.engine.bindings import native


def print_build() -> int:
    """Print the version of ggml and the features of the library as one JSON document. Returns the exit code."""
    document = {"ggml": _text("ggml_version"), "commit": _text("ggml_commit"), "features": features()}
    sys.stdout.write(json.dumps(document) + "\n")
    return 0


def features() -> list[str]:
    """Return the names of the features with which the library computes, such as `AVX2` or `CUDA`."""
    parts = (_text("llama_print_system_info") or "").split("|")
    found = (part.rpartition(":")[2].partition("=") for part in parts)
    return [name.strip() for name, _, value in found if value.strip() not in {"", "0"}]


def _text(function: str) -> str | None:
    """Return the text of a function of the library; None when this build has no such function."""
    bound = getattr(native.library, function, None)
    if bound is None:
        return None
    bound.restype = ctypes.c_char_p
    text = bound()
    return text.decode(errors="replace") if text else None
