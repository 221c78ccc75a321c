"""
The embedded servers: Postgres and Valkey for one machine, from their packages, when no outside ones are set.

They listen on loopback only, ask for passwords, keep their ports, and are as durable as their makers intend.
What was running is stopped when the `with` ends, however it ends; what a killed parent left behind is ended at the
next start; two process trees never work on one data directory.

Which of the two are wanted, and what becomes of their URLs, is decided elsewhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from app.kernel.embedded.data_directory import DataDirectory, DirectoryHolder, find_holder
from app.kernel.embedded.endpoint import ENDPOINT_FILE, Endpoint, find_endpoint
from app.kernel.embedded.postgres import PostgresServer
from app.kernel.embedded.postgres import url_of as postgres_url_of
from app.kernel.embedded.server import START_DEADLINE, Server
from app.kernel.embedded.valkey import ValkeyServer
from app.kernel.embedded.valkey import url_of as valkey_url_of
from app.kernel.errors import ServerNotStarted

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


#: Folders of the servers below the data directory.
_POSTGRES, _VALKEY = "postgres", "valkey"


@dataclass(frozen=True, slots=True)
class Servers:
    """The embedded servers that are wanted."""

    postgres: PostgresServer | None
    valkey: ValkeyServer | None


@contextlib.contextmanager
def started(
    directory: DataDirectory, *, postgres: bool = True, valkey: bool = True, deadline: timedelta = START_DEADLINE
) -> Iterator[Servers]:
    """
    The wanted servers, running until the end of the `with`, below a data directory that is held.

    Leftovers of the one that is not wanted are ended too. `deadline` holds for each of them.
    Raises ServerNotStarted; then none runs. A server that died meanwhile may be started anew by its `start`.
    """
    if not directory.held:
        raise ServerNotStarted("arriero", f"the data directory {directory.path} is not held")
    one = PostgresServer(directory.path / _POSTGRES, deadline=deadline)
    other = ValkeyServer(directory.path / _VALKEY, deadline=deadline)
    with contextlib.ExitStack() as stack:
        for server, wanted in ((one, postgres), (other, valkey)):
            stack.callback(server.stop)
            if wanted:
                server.start()
            else:
                server.end_leftovers()
        yield Servers(one if postgres else None, other if valkey else None)


def start_postgres(directory: Path, *, deadline: timedelta = START_DEADLINE) -> PostgresServer:
    """A running Postgres below the directory, whose lock the caller holds. Raises ServerNotStarted."""
    server = PostgresServer(directory, deadline=deadline)
    server.start()
    return server


def start_valkey(directory: Path, *, deadline: timedelta = START_DEADLINE) -> ValkeyServer:
    """A running Valkey below the directory, whose lock the caller holds. Raises ServerNotStarted."""
    server = ValkeyServer(directory, deadline=deadline)
    server.start()
    return server


def find_postgres_url(path: Path) -> str | None:
    """Where the Postgres of a data directory listens, with its password; None while nobody holds the directory."""
    endpoint = _find_endpoint(path, _POSTGRES)
    return None if endpoint is None else postgres_url_of(endpoint)


def find_valkey_url(path: Path) -> str | None:
    """Where the Valkey of a data directory listens, with its password; None while nobody holds the directory."""
    endpoint = _find_endpoint(path, _VALKEY)
    return None if endpoint is None else valkey_url_of(endpoint)


def _find_endpoint(path: Path, server: str) -> Endpoint | None:
    return None if find_holder(path) is None else find_endpoint(path / server / ENDPOINT_FILE)
