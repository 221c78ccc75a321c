"""
The endpoint of an embedded server: its loopback port and its password, stored next to its data.

It is the same after a restart, so that URLs of clients stay valid after a crash.
The port changes only when another program uses it; the password never changes.
The file is readable by its owner only, and the `repr` of an endpoint does not show the password.
"""

from __future__ import annotations

import json
import socket
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from app.kernel.errors import ServerNotStarted
from app.kernel.processes import private_file

#: The only address on which the servers listen.
LOOPBACK = "127.0.0.1"

#: The range of ports. It is below the ranges for outgoing connections, one of which could otherwise use the port of a
#: server while it restarts.
_PORTS = range(20000, 30000)


#: The name of the file in a server's directory.
ENDPOINT_FILE = "endpoint.json"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The port and the password of a server."""

    port: int
    password: str = field(repr=False)


def find_endpoint(file: Path) -> Endpoint | None:
    """
    Return the endpoint in the file, or None when the file does not exist.

    Raises ServerNotStarted when the file is damaged.
    """
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        return Endpoint(port=int(fields["port"]), password=str(fields["password"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise ServerNotStarted(
            file.parent.name, f"{file} is damaged; restore it, or move {file.parent} away to start without its data"
        ) from None


def store_endpoint(file: Path, endpoint: Endpoint) -> None:
    """Write the endpoint to the file."""
    private_file.write(file, json.dumps({"port": endpoint.port, "password": endpoint.password}) + "\n")


def free_port(directory: Path, *, other_than: int | None = None) -> int:
    """
    Return a free port. It is the same for a directory as long as that port is free.

    The directory's path determines where in the range the search starts, so two directories rarely conflict.
    Raises ServerNotStarted when every port is in use.
    """
    start = zlib.crc32(str(directory).encode())
    for step in range(len(_PORTS)):
        port = _PORTS[(start + step) % len(_PORTS)]
        if port != other_than and is_free(port):
            return port
    raise ServerNotStarted(directory.name, f"no port of {LOOPBACK} from {_PORTS.start} to {_PORTS.stop - 1} is free")


def is_free(port: int) -> bool:
    """Whether a server can listen on the port now. Connections that are still closing do not prevent it."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
            probe.listen(1)
        except OSError:
            return False
    return True
