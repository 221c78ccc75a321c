"""
Connections: sockets on which no wait is longer than the work may take.

A watch knows when the work's time is over, and has a bell with which another thread ends it. Whatever is waited for, an
address, a connection, encryption, a byte, the bell and the end of time are waited for too.

httpx is not used for this: it resolves names itself, its timeouts begin anew with each byte, and a call of it cannot be
stopped from another thread. What is HTTP stays httpcore's.
"""

from __future__ import annotations

import errno
import os
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import httpcore2
from httpcore2 import NetworkStream

from app.kernel.errors import FailureReason, StepFailure

_T = TypeVar("_T")

#: Gives the addresses of a host, best first. May block; raises OSError.
Resolve = Callable[[str, int], Sequence[str]]


class Late(Exception):
    """A connection took longer than it may."""


class ConnectionWatch:
    """The end of a piece of work, by time or by another thread."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._until = time.monotonic() + seconds
        self._bell, self._cord = socket.socketpair()
        self._bell.setblocking(False)
        self._cord.setblocking(False)
        self._lock = threading.Lock()
        self._closed = False
        self._stopped = False

    def __enter__(self) -> ConnectionWatch:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed = True
            self._bell.close()
            self._cord.close()

    def stop(self) -> None:
        """End the work. From any thread, any number of times, after its end too."""
        self._stopped = True
        self.ring()

    def ring(self) -> None:
        """Let `wait` return. From any thread."""
        with self._lock:
            if not self._closed:
                with suppress(BlockingIOError):  # it rings already
                    self._cord.send(b".")

    def look(self) -> None:
        """Raises CancelledError when the work was stopped, StepFailure when its time is over."""
        if self._stopped:
            raise CancelledError
        if time.monotonic() >= self._until:
            raise StepFailure(FailureReason.TIMEOUT, f"the call was not done after {self._seconds:g} s")

    def wait(self, connection: socket.socket | None = None, event: int = 0, until: float | None = None) -> None:
        """
        Wait until a socket is ready, or the bell rings: the caller looks which.

        Raises as `look` does, and Late after `until`.
        """
        end = self._until if until is None else min(until, self._until)
        with selectors.PollSelector() as selector:
            selector.register(self._bell, selectors.EVENT_READ)
            if connection is not None:
                selector.register(connection, event)
            ready = selector.select(max(0.0, end - time.monotonic()))
        self.look()
        if until is not None and time.monotonic() >= until:
            raise Late
        if any(key.fileobj is self._bell for key, _ in ready):
            self._bell.recv(4096)


class Stream(NetworkStream):
    """A connection as httpcore uses it. Raises as `ConnectionWatch.look` does, and httpcore's errors."""

    def __init__(self, connection: socket.socket, watch: ConnectionWatch) -> None:
        self._connection, self._watch = connection, watch

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002 the watch knows the end
        """As the class that it is one of says."""
        try:
            return _ready(
                self._connection, self._watch, selectors.EVENT_READ, partial(self._connection.recv, max_bytes)
            )
        except OSError as error:
            raise httpcore2.ReadError(str(error)) from None

    def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002 the watch knows the end
        """As the class that it is one of says. After its error, httpcore reads what the server may have answered."""
        view = memoryview(buffer)
        while view:
            send = partial(self._connection.send, view)
            try:
                view = view[_ready(self._connection, self._watch, selectors.EVENT_WRITE, send) :]
            except OSError as error:
                raise httpcore2.WriteError(str(error)) from None

    def close(self) -> None:
        """As the class that it is one of says."""
        self._connection.close()


def addresses(host: str, port: int) -> Sequence[str]:
    """The addresses of a host, as the system finds them."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(place[0]) for *_, place in found))


def resolved(host: str, port: int, resolve: Resolve, watch: ConnectionWatch) -> Sequence[str]:
    """
    The addresses of a host, asked for once. The system's resolver cannot be stopped: it is left behind.

    Raises OSError, and as `ConnectionWatch.look` does.
    """
    found: list[Sequence[str] | Exception] = []

    def ask() -> None:
        try:
            found.append(resolve(host, port))
        except ValueError as error:  # a name that the resolver cannot even ask for: a part of it is too long, or empty
            found.append(OSError(errno.EINVAL, f"it is no name of a host ({error})"))
        except Exception as error:  # noqa: BLE001 the shell of the thread: whoever waits gets what it met
            found.append(error)
        finally:
            watch.ring()

    threading.Thread(target=ask, name="resolver", daemon=True).start()
    while not found:
        watch.wait()
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def connected(
    address: str, port: int, tls_name: str | None, ca_file: Path | None, watch: ConnectionWatch, seconds: float
) -> Any:
    """
    A connection to an address; with a name, encrypted, with a server that has shown to be of that name.

    Raises Late after so many seconds, OSError, StepFailure, and as `ConnectionWatch.look` does.
    """
    until = time.monotonic() + seconds
    connection = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _open(connection, (address, port), watch, until)
        if tls_name is None:
            return connection
        connection = _trust(ca_file).wrap_socket(connection, server_hostname=tls_name, do_handshake_on_connect=False)
        _ready(connection, watch, selectors.EVENT_READ, connection.do_handshake, until)
    except BaseException:
        connection.close()
        raise
    return connection


def why(error: OSError) -> str:
    """What went wrong, in the system's words, which hold nothing of what was sent."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is refused: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"no encryption could be agreed on ({error.reason or 'the connection ended'})"
    return error.strerror or type(error).__name__


def _open(connection: socket.socket, place: tuple[str, int], watch: ConnectionWatch, until: float) -> None:
    code = connection.connect_ex(place)
    while code in (errno.EINPROGRESS, errno.EALREADY, errno.EINTR):
        watch.wait(connection, selectors.EVENT_WRITE, until)
        code = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or connection.connect_ex(place)
    if code not in (0, errno.EISCONN):
        raise OSError(code, os.strerror(code))


def _ready(
    connection: socket.socket, watch: ConnectionWatch, event: int, work: Callable[[], _T], until: float | None = None
) -> _T:
    """What `work` gives on a socket that does not block, once it can be done. Raises as `ConnectionWatch.wait` does."""
    while True:
        watch.look()
        try:
            return work()
        except ssl.SSLWantReadError:
            watch.wait(connection, selectors.EVENT_READ, until)
        except ssl.SSLWantWriteError:
            watch.wait(connection, selectors.EVENT_WRITE, until)
        except BlockingIOError:
            watch.wait(connection, event, until)


@lru_cache(maxsize=4)
def _trust(ca_file: Path | None) -> ssl.SSLContext:
    """How servers are recognised: by the system's certificates, and those of a file."""
    context = httpcore2.default_ssl_context()
    context.set_alpn_protocols(["http/1.1"])
    if ca_file is not None:
        try:
            context.load_verify_locations(ca_file)
        except OSError as error:
            message = f"the certificates of http.ca_file ({ca_file}) cannot be read: {why(error)}"
            raise StepFailure(FailureReason.HTTP_UNREACHABLE, message) from None
    return context
