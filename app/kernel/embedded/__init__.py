"""
Embedded servers: Postgres and Valkey for one machine, from Python packages, when no external servers are configured.

They listen on loopback only, require passwords, keep their ports, and store their data durably: Postgres at each
commit, Valkey each second.
They are stopped when the `with` ends, whatever the reason. Servers of a killed parent are taken over or ended at the
next start. Two process trees never use one data directory at the same time.

The caller decides which of the two servers are needed, and how their URLs are used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from app.kernel.embedded.endpoint import ENDPOINT_FILE, Endpoint, find_endpoint
from app.kernel.embedded.postgres import PostgresServer
from app.kernel.embedded.postgres import url_of as postgres_url_of
from app.kernel.embedded.server import START_DEADLINE, Server
from app.kernel.embedded.valkey import ValkeyServer
from app.kernel.embedded.valkey import url_of as valkey_url_of
from app.kernel.errors import ServerNotStarted
from app.kernel.processes.data_directory import DataDirectory, DirectoryHolder, find_holder

__all__ = [
    "DataDirectory",
    "DirectoryHolder",
    "PostgresServer",
    "Server",
    "Servers",
    "ValkeyServer",
    "find_holder",
    "find_postgres_url",
    "find_valkey_url",
    "start_postgres",
    "start_valkey",
    "started",
]


#: Folders of the servers in the data directory.
_POSTGRES, _VALKEY = "postgres", "valkey"


@dataclass(frozen=True, slots=True)
class Servers:
    """The embedded servers that are needed; None for the others."""

    postgres: PostgresServer | None
    valkey: ValkeyServer | None


@contextlib.contextmanager
def started(
    directory: DataDirectory, *, postgres: bool = True, valkey: bool = True, deadline: timedelta = START_DEADLINE
) -> Iterator[Servers]:
    """
    Run the needed servers until the end of the `with`, in a data directory whose lock is held.

    Leftover processes of a server that is not needed are ended too. `deadline` applies to each start.
    Raises ServerNotStarted; then no server runs. A server that died can be restarted with its `start`.
    """
    if not directory.held:
        raise ServerNotStarted("arriero", f"the lock of the data directory {directory.path} is not held")
    postgres_server = PostgresServer(directory.path / _POSTGRES, deadline=deadline)
    valkey_server = ValkeyServer(directory.path / _VALKEY, deadline=deadline)
    with contextlib.ExitStack() as stack:
        for server, needed in ((postgres_server, postgres), (valkey_server, valkey)):
            stack.callback(server.stop)
            if needed:
                server.start()
            else:
                server.end_leftovers()
        yield Servers(postgres_server if postgres else None, valkey_server if valkey else None)


def start_postgres(directory: Path, *, deadline: timedelta = START_DEADLINE) -> PostgresServer:
    """Start a Postgres in the directory, whose lock the caller holds. Raises ServerNotStarted."""
    server = PostgresServer(directory, deadline=deadline)
    server.start()
    return server


def start_valkey(directory: Path, *, deadline: timedelta = START_DEADLINE) -> ValkeyServer:
    """Start a Valkey in the directory, whose lock the caller holds. Raises ServerNotStarted."""
    server = ValkeyServer(directory, deadline=deadline)
    server.start()
    return server


def find_postgres_url(path: Path) -> str | None:
    """Return the URL of the Postgres of a data directory, with its password; None while no process holds the lock."""
    endpoint = _find_endpoint(path, _POSTGRES)
    return None if endpoint is None else postgres_url_of(endpoint)


def find_valkey_url(path: Path) -> str | None:
    """Return the URL of the Valkey of a data directory, with its password; None while no process holds the lock."""
    endpoint = _find_endpoint(path, _VALKEY)
    return None if endpoint is None else valkey_url_of(endpoint)


def _find_endpoint(path: Path, server: str) -> Endpoint | None:
    return None if find_holder(path) is None else find_endpoint(path / server / ENDPOINT_FILE)
