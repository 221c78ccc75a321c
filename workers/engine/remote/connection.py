"""
The connections of a remote engine: opened to checked addresses only, and closed by another thread.

The host of the server is resolved for each connection, the egress policy checks all its addresses, and the connection
is opened to a checked one, so a later change in DNS has no effect. There are no proxies, no cookies and no redirects.
A read that waits for the server ends at once when its call is interrupted.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpcore2
import httpx2
from httpcore2 import NetworkBackend, NetworkStream, SyncBackend

from app.kernel import tracing
from app.kernel.errors import FailureReason, StepFailure
from app.kernel.security.egress import EgressPolicy

_current = threading.local()


class Interruption:
    """Lets any thread end the waits of one call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self.requested = threading.Event()
        #: The headers that continue the trace of who made the call.
        self.trace = tracing.headers()

    def request(self) -> None:
        """End the waits of the call. Any thread may do this, any number of times."""
        self.requested.set()
        with self._lock:
            if self._socket is not None:
                with suppress(OSError):  # the server has closed it
                    self._socket.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The context of the call, on its own thread."""
        _current.interruption = self
        try:
            yield
        finally:
            _current.interruption = None
            with self._lock:
                self._socket = None

    def uses(self, connection: socket.socket | None) -> None:
        """Note the socket that the call uses now."""
        with self._lock:
            self._socket = connection
            if self.requested.is_set() and connection is not None:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


def client(policy: EgressPolicy, connect_timeout: float, read_timeout: float, ca_file: Path | None) -> httpx2.Client:
    """
    Return an HTTP client that reaches only what the policy allows. `ca_file` has further trusted certificates (PEM).

    Raises StepFailure when the file cannot be read.
    """
    context = httpcore2.default_ssl_context()
    if ca_file is not None:
        try:
            context.load_verify_locations(ca_file)
        except OSError as error:
            message = f"the certificates of http.ca_file ({ca_file}) cannot be read: {error.strerror}"
            raise StepFailure(FailureReason.HTTP_REFUSED, message) from None
    timeout = httpx2.Timeout(read_timeout, connect=connect_timeout)
    return httpx2.Client(transport=_Transport(policy, context), timeout=timeout, trust_env=False)


class _Transport(httpx2.HTTPTransport):
    """The transport of httpx on connections to checked addresses."""

    def __init__(self, policy: EgressPolicy, context: ssl.SSLContext) -> None:
        super().__init__(verify=context, trust_env=False)
        # The only way to give it a network backend: its own pool has none that was used yet.
        self._pool = httpcore2.ConnectionPool(
            ssl_context=context, max_connections=None, keepalive_expiry=30.0, network_backend=_Backend(policy)
        )


class _Backend(NetworkBackend):
    """Opens connections to checked addresses."""

    def __init__(self, policy: EgressPolicy) -> None:
        self._policy, self._inner = policy, SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> NetworkStream:
        """See the base class. Raises StepFailure for an address that the policy refuses."""
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise httpcore2.ConnectError(f"the name {host} cannot be resolved: {error}") from None
        addresses = list(dict.fromkeys(str(endpoint[0]) for *_, endpoint in found))
        for address in addresses:
            refusal = self._policy.refuse_address(host, address)
            if refusal is not None:
                refusal = refusal.replace("the setting http.allow_private", "`private = true` in its catalogue entry")
                raise StepFailure(FailureReason.HTTP_REFUSED, f"the server may not be called: {refusal}")
        problem: Exception = httpcore2.ConnectError(f"the name {host} has no address")
        for address in addresses:
            try:
                return _Stream(self._inner.connect_tcp(address, port, timeout, local_address, socket_options))
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                problem = error
        raise problem


class _Stream(NetworkStream):
    """A connection whose reads the call's interruption can end."""

    def __init__(self, inner: NetworkStream) -> None:
        self._inner = inner

    def _note(self) -> None:
        interruption: Interruption | None = getattr(_current, "interruption", None)
        if interruption is not None:
            interruption.uses(self._inner.get_extra_info("socket"))

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """See the base class."""
        self._note()
        return self._inner.read(max_bytes, timeout)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """See the base class."""
        self._note()
        self._inner.write(buffer, timeout)

    def close(self) -> None:
        """See the base class."""
        self._inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> NetworkStream:
        """See the base class."""
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        """See the base class."""
        return self._inner.get_extra_info(info)
