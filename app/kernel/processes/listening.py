"""
Listening sockets, and who holds a port that is in use.

The refusal names the address, its setting and its variable, and the process that listens there, as far as this user may
know it. A process of Arriero is recognized by the data directory that it has locked, or by its answer to `/healthz`.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from app.kernel.errors import ServerNotStarted
from app.kernel.processes.data_directory import LOCK_FILE
from app.kernel.security.texts import printable
from app.kernel.settings import variable

#: Seconds to wait for a port that no process seems to hold, and between two attempts.
_RELEASE_SECONDS, _PAUSE = 2.0, 0.05
#: Seconds to wait for the answer of the holder of a port, and most bytes of it.
_ANSWER_SECONDS, _ANSWER_BYTES = 1.0, 4096
#: Clients that can wait while the program that serves them starts or restarts.
_BACKLOG = 2048
_EVERY = {"", "0.0.0.0", "::"}  # noqa: S104 compared, not bound


def listen(name: str, host: str, port: int, setting: str) -> socket.socket:
    """
    Return a listening socket for the program `name`; port 0 chooses a free one. `setting` has the port, as `api.port`.

    Raises ServerNotStarted, with the setting and the holder of the port, when the address cannot be used.
    """
    limit = time.monotonic() + _RELEASE_SECONDS
    while True:
        try:
            family, address = _address(host, port)
            return socket.create_server(address, family=family, backlog=_BACKLOG)
        except OSError as error:
            # The last threads of a killed process use its port for a moment, when the process itself is gone.
            if error.errno != errno.EADDRINUSE or time.monotonic() > limit or any(_listening_on(host, port)):
                raise ServerNotStarted(name, _refusal(host, port, setting, error)) from error
        time.sleep(_PAUSE)


def _address(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int]]:
    """Return the address of a name, of version 4 where there is one. Raises OSError."""
    every = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, *_, address = min(every, key=lambda one: one[0] != socket.AF_INET)
    return family, (str(address[0]), int(address[1]))


def _refusal(host: str, port: int, setting: str, error: OSError) -> str:
    named, at = f"{setting} ({variable(setting)})", host or "all addresses"
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {port} on {at}, its setting {named}, is in use by {holder(host, port)}; "
            f"stop that one, or choose another port; 0 takes a free one"
        )
    if error.errno == errno.EACCES:
        return f"this user may not listen on port {port}, its setting {named}; choose a port from 1024 on"
    of_host = setting.replace("port", "host")
    wanted = f"{of_host} ({variable(of_host)}) must be an address of this machine"
    return f"it cannot listen on {at} port {port} ({error.strerror or error}); {wanted}"


def port_of(listener: socket.socket) -> int:
    """Return the port on which a socket listens."""
    port: int = listener.getsockname()[1]
    return port


def holder(host: str, port: int) -> str:
    """Describe who listens on a port: the process, and what it is."""
    listening = list(_listening_on(host, port))
    directories = [found for process in listening if (found := _data_directory(process)) is not None]
    process = _first(listening)
    shown = "a process that this user cannot see" if process is None else _described(process)
    if directories:
        return f"{shown}: another Arriero, on the data directory {directories[0]}"
    return f"{shown}: another Arriero" if _answers_as_arriero(host, port) else shown


def _listening_on(host: str, port: int) -> Iterator[psutil.Process]:
    """Yield the processes that listen on the port; several when they share the socket."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            for one in process.net_connections("tcp"):
                if one.status == psutil.CONN_LISTEN and one.laddr.port == port and _overlap(one.laddr.ip, host, port):
                    yield process
                    break


def _overlap(listened: str, host: str, port: int) -> bool:
    return bool(_EVERY & {listened, host}) or listened == _address(host, port)[1][0]


def _first(processes: list[psutil.Process]) -> psutil.Process | None:
    """Return the oldest process: the parent of those that inherited its socket."""
    return min(processes, key=lambda process: process.create_time(), default=None)


def _described(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return f"process {process.pid} ({printable(process.name(), 80)})"
    return f"process {process.pid}"


def _data_directory(process: psutil.Process) -> Path | None:
    """Return the data directory that the process has locked."""
    with contextlib.suppress(psutil.Error, OSError):
        for file in process.open_files():
            if Path(file.path).name == LOCK_FILE:
                return Path(file.path).parent
    return None


def _answers_as_arriero(host: str, port: int) -> bool:
    """Whether an API of Arriero answers on the port."""
    connection = http.client.HTTPConnection("127.0.0.1" if host in _EVERY else host, port, timeout=_ANSWER_SECONDS)
    try:
        connection.request("GET", "/healthz")
        answer = json.loads(connection.getresponse().read(_ANSWER_BYTES))
    except (OSError, ValueError, http.client.HTTPException, RecursionError):
        return False
    finally:
        connection.close()
    return isinstance(answer, dict) and {"status", "version", "instance"} <= answer.keys()
