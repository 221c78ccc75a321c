"""
Connections: non-blocking sockets with a total deadline, which another thread can cancel.

A `ConnectionWatch` has the deadline of a call, and a socket pair with which another thread wakes its waits. Each wait,
for an address, a connection, a TLS handshake or a byte, also ends at the deadline and when it is woken.

httpx is not used for this: it resolves names itself, its timeouts start again with each byte, and its calls cannot be
cancelled from another thread. httpcore implements HTTP.
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

#: Returns the addresses of a host, the best first. It may block; it raises OSError.
Resolve = Callable[[str, int], Sequence[str]]


class ConnectTimeout(Exception):
    """A connection was not established in time."""


class ConnectionWatch:
    """The deadline of a call, and its cancellation by another thread."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._until = time.monotonic() + seconds
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_receiver.setblocking(False)
        self._wake_sender.setblocking(False)
        self._lock = threading.Lock()
        self._closed = False
        self._stopped = False

    def __enter__(self) -> ConnectionWatch:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed = True
            self._wake_receiver.close()
            self._wake_sender.close()

    def stop(self) -> None:
        """Cancel the call. Any thread may do this, any number of times, also after the end of the call."""
        self._stopped = True
        self.wake()

    def wake(self) -> None:
        """Make `wait` return. Any thread may call this."""
        with self._lock:
            if not self._closed:
                with suppress(BlockingIOError):  # it is full, so `wait` returns anyway
                    self._wake_sender.send(b".")

    def check(self) -> None:
        """Raises CancelledError after `stop`, StepFailure after the deadline."""
        if self._stopped:
            raise CancelledError
        if time.monotonic() >= self._until:
            raise StepFailure(FailureReason.TIMEOUT, f"the call did not end within {self._seconds:g} s")

    def wait(self, connection: socket.socket | None = None, event: int = 0, until: float | None = None) -> None:
        """
        Wait until the socket is ready for the event, or until `wake` is called; the caller tries its operation again.

        Raises what `check` raises, and ConnectTimeout after `until`, in seconds of the monotonic clock.
        """
        end = self._until if until is None else min(until, self._until)
        with selectors.PollSelector() as selector:
            selector.register(self._wake_receiver, selectors.EVENT_READ)
            if connection is not None:
                selector.register(connection, event)
            ready = selector.select(max(0.0, end - time.monotonic()))
        self.check()
        if until is not None and time.monotonic() >= until:
            raise ConnectTimeout
        if any(key.fileobj is self._wake_receiver for key, _ in ready):
            self._wake_receiver.recv(4096)


class Stream(NetworkStream):
    """A connection for httpcore. Its methods raise what `ConnectionWatch.check` raises, and errors of httpcore."""

    def __init__(self, connection: socket.socket, watch: ConnectionWatch) -> None:
        self._connection, self._watch = connection, watch

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002 the watch has the deadline
        """Read at most `max_bytes`; an empty result is the end of the stream."""
        try:
            return _when_ready(
                self._connection, self._watch, selectors.EVENT_READ, partial(self._connection.recv, max_bytes)
            )
        except OSError as error:
            raise httpcore2.ReadError(str(error)) from None

    def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002 the watch has the deadline
        """Write the whole buffer. After an error, httpcore still reads the response that the server may have sent."""
        view = memoryview(buffer)
        while view:
            send = partial(self._connection.send, view)
            try:
                view = view[_when_ready(self._connection, self._watch, selectors.EVENT_WRITE, send) :]
            except OSError as error:
                raise httpcore2.WriteError(str(error)) from None

    def close(self) -> None:
        """Close the socket."""
        self._connection.close()


def system_addresses(host: str, port: int) -> Sequence[str]:
    """The addresses of a host from the system's resolver. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(endpoint[0]) for *_, endpoint in found))


def resolve_host(host: str, port: int, resolve: Resolve, watch: ConnectionWatch) -> Sequence[str]:
    """
    Return the addresses of a host, from one call of `resolve` on a thread of its own.

    The system's resolver cannot be cancelled: at the deadline its thread is abandoned.
    Raises OSError, and what `ConnectionWatch.check` raises.
    """
    found: list[Sequence[str] | Exception] = []

    def run() -> None:
        try:
            found.append(resolve(host, port))
        except ValueError as error:  # a name that cannot be encoded: one of its labels is too long, or empty
            found.append(OSError(errno.EINVAL, f"it is not a valid host name ({error})"))
        except Exception as error:  # noqa: BLE001 the outermost frame of the thread: the waiting thread raises it
            found.append(error)
        finally:
            watch.wake()

    threading.Thread(target=run, name="resolver", daemon=True).start()
    while not found:
        watch.wait()
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def connect(
    address: str, port: int, tls_name: str | None, ca_file: Path | None, watch: ConnectionWatch, seconds: float
) -> Any:
    """
    Return a connection to an address. With `tls_name` it uses TLS, and verifies that the certificate is for that name.

    Raises ConnectTimeout after `seconds`, OSError, StepFailure, and what `ConnectionWatch.check` raises.
    """
    until = time.monotonic() + seconds
    connection = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _open(connection, (address, port), watch, until)
        if tls_name is None:
            return connection
        connection = _tls_context(ca_file).wrap_socket(
            connection, server_hostname=tls_name, do_handshake_on_connect=False
        )
        _when_ready(connection, watch, selectors.EVENT_READ, connection.do_handshake, until)
    except BaseException:
        connection.close()
        raise
    return connection


def description_of(error: OSError) -> str:
    """Describe an error in the system's words, which contain nothing of the request."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate was rejected: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"the TLS handshake failed ({error.reason or 'the connection ended'})"
    return error.strerror or type(error).__name__


def _open(connection: socket.socket, endpoint: tuple[str, int], watch: ConnectionWatch, until: float) -> None:
    code = connection.connect_ex(endpoint)
    while code in (errno.EINPROGRESS, errno.EALREADY, errno.EINTR):
        watch.wait(connection, selectors.EVENT_WRITE, until)
        code = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or connection.connect_ex(endpoint)
    if code not in (0, errno.EISCONN):
        raise OSError(code, os.strerror(code))


def _when_ready(
    connection: socket.socket,
    watch: ConnectionWatch,
    event: int,
    operation: Callable[[], _T],
    until: float | None = None,
) -> _T:
    """
    Call a non-blocking operation until it does not block, and return its result.

    Raises what `ConnectionWatch.wait` raises, and errors of the operation.
    """
    while True:
        watch.check()
        try:
            return operation()
        except ssl.SSLWantReadError:
            watch.wait(connection, selectors.EVENT_READ, until)
        except ssl.SSLWantWriteError:
            watch.wait(connection, selectors.EVENT_WRITE, until)
        except BlockingIOError:
            watch.wait(connection, event, until)


@lru_cache(maxsize=4)
def _tls_context(ca_file: Path | None) -> ssl.SSLContext:
    """The TLS context that trusts the system's certificate authorities, and those of a file. Raises StepFailure."""
    context = httpcore2.default_ssl_context()
    context.set_alpn_protocols(["http/1.1"])
    if ca_file is not None:
        try:
            context.load_verify_locations(ca_file)
        except OSError as error:
            message = f"the certificates of http.ca_file ({ca_file}) cannot be read: {description_of(error)}"
            raise StepFailure(FailureReason.HTTP_UNREACHABLE, message) from None
    return context
