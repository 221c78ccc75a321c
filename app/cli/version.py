"""`arriero version`: the versions that a bug report needs."""

from __future__ import annotations

import platform
from importlib import metadata

from app import __version__
from app.cli.output import AsJson, console, print_json


def version(as_json: AsJson = False) -> None:
    """Print the versions of Arriero, Python and llama.cpp's binding."""
    parts = {
        "arriero": __version__,
        "python": platform.python_version(),
        "llama-cpp-python": metadata.version("llama-cpp-python"),
        "celery": metadata.version("celery"),
        "platform": platform.platform(),
    }
    if as_json:
        print_json(parts)
        return
    for name, value in parts.items():
        console().print(f"{name} {value}")
