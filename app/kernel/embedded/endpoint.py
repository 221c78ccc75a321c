"""
The endpoint of an embedded server: the loopback port and the password, kept beside its data.

It stays the same over restarts, so that a client's URL outlives a crash.
A new port is taken only when a stranger has the old one; the password never changes.
Its file is readable by the owner only, and its text never shows the password.
"""

from __future__ import annotations

import json
import socket
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from app.kernel.errors import ServerNotStarted
from app.kernel.processes import private_file

#: Servers listen here and nowhere else.
LOOPBACK = "127.0.0.1"

#: Ports come from here: below the ranges from which systems take ports for outgoing connections, one of which could
#: sit on a server's port when it comes back.
_PORTS = range(20000, 30000)


#: The name of the file in a server's directory.
ENDPOINT_FILE = "endpoint.json"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a server listens, and the password that it asks for."""

    port: int
    password: str = field(repr=False)


def find_endpoint(file: Path) -> Endpoint | None:
    """
    The endpoint kept in the file, or None when there is no such file.

    Raises ServerNotStarted when the file says something else.
    """
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        return Endpoint(port=int(fields["port"]), password=str(fields["password"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise ServerNotStarted(
            file.parent.name, f"{file} is damaged; restore it, or move {file.parent} away to begin anew"
        ) from None


def keep_endpoint(file: Path, endpoint: Endpoint) -> None:
    """Write the endpoint down."""
    private_file.write(file, json.dumps({"port": endpoint.port, "password": endpoint.password}) + "\n")


def free_port(directory: Path, *, other_than: int | None = None) -> int:
    """
    A port on which nobody listens, the same for a directory as long as it is free.

    Where in the range the search begins follows from the directory's path: two directories seldom meet.
    Raises ServerNotStarted when every port is taken.
    """
    start = zlib.crc32(str(directory).encode())
    for step in range(len(_PORTS)):
        port = _PORTS[(start + step) % len(_PORTS)]
        if port != other_than and is_free(port):
            return port
    raise ServerNotStarted(directory.name, f"no port of {LOOPBACK} from {_PORTS.start} to {_PORTS.stop - 1} is free")


def is_free(port: int) -> bool:
    """Whether a server could listen on the port now. Old connections that still wind down are no obstacle."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
            probe.listen(1)
        except OSError:
            return False
    return True
