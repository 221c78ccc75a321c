"""
The HTTP client of `http` steps: one call to an external server.

A host name is resolved once, the egress policy checks all its addresses, and the connection is opened to a checked
address. So a later change in DNS has no effect. There are no proxies, no cookies, and no reuse of connections.
A call ends exactly at its timeout, however slowly a server sends, and immediately when another thread cancels it.
No message, log line or response contains a secret of the call.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import httpcore2
from httpcore2 import HTTP11Connection, Origin

from app.kernel import clock, log
from app.kernel.errors import FailureReason, StepFailure
from app.kernel.sections.http import HttpSettings
from app.kernel.security import masking
from app.kernel.security.egress import EgressPolicy
from app.workflows.http import calls, responses
from app.workflows.http.calls import Hop, HttpCall
from app.workflows.http.responses import HttpResponse
from workers import connections
from workers.connections import ConnectionWatch, Resolve, Stream

_log = log.get(__name__)

#: Registers a function that cancels the call and that any thread may call; `Holding.on_stop` is one.
OnStop = Callable[[Callable[[], None]], None]

#: Makes a response of its status, headers and body, with the secrets of the call.
_Respond = Callable[[int, Sequence[tuple[str, str]], bytes, Sequence[str]], HttpResponse]

_REDIRECTS = frozenset({301, 302, 303, 307, 308})


def call(
    request: HttpCall, *, settings: HttpSettings, on_stop: OnStop, resolve: Resolve = connections.system_addresses
) -> HttpResponse:
    """
    Make the call and return the response.

    Raises StepFailure with `timeout`, `invalid_request` or a reason of `http_…`; CancelledError when it was cancelled.
    """
    return _called(request, settings, on_stop, resolve, responses.response_of)


def fetch(
    request: HttpCall, *, settings: HttpSettings, on_stop: OnStop, resolve: Resolve = connections.system_addresses
) -> bytes:
    """As `call`, but return the body of the response as it is, whatever its type."""
    found = _called(request, settings, on_stop, resolve, lambda status, _, body, __: HttpResponse(status, {}, body))
    assert isinstance(found.body, bytes), "it was made here"
    return found.body


def _called(
    request: HttpCall, settings: HttpSettings, on_stop: OnStop, resolve: Resolve, respond: _Respond
) -> HttpResponse:
    try:
        with ConnectionWatch(request.timeout.total_seconds()) as watch:
            on_stop(watch.stop)
            return _Caller(request, settings, resolve, watch, respond).response()
    except StepFailure as failure:
        # Without the cause, which may contain parts of the request.
        raise StepFailure(
            failure.reason,
            masking.masked(failure.message, request.secrets),
            text=failure.text,
            status=failure.status,
            retry_after=failure.retry_after,
        ) from None


class _Caller:
    """One call, with all its redirects."""

    def __init__(
        self, request: HttpCall, settings: HttpSettings, resolve: Resolve, watch: ConnectionWatch, respond: _Respond
    ) -> None:
        self._request, self._settings, self._resolve, self._watch = request, settings, resolve, watch
        self._respond = respond
        self._policy = EgressPolicy.of(settings.allowed_hosts, allow_private=settings.allow_private)

    def response(self) -> HttpResponse:
        """Return the response at the end of the redirects. Raises StepFailure, CancelledError."""
        hop = calls.first_hop(self._request)
        for _ in range(1 + calls.MAX_REDIRECTS):
            found = self._request_hop(hop)
            if isinstance(found, HttpResponse):
                return found
            hop = found
        raise StepFailure(
            FailureReason.HTTP_UNUSABLE, f"more than {calls.MAX_REDIRECTS} redirects; the last one is to {hop}"
        )

    def _request_hop(self, hop: Hop) -> HttpResponse | Hop:
        """Send one request. Returns the response, or the target of a redirect. Raises StepFailure, CancelledError."""
        refusal = self._policy.refuse_host(hop.scheme, hop.host, hop.port)
        if refusal is not None:
            raise _refused(hop, refusal)
        began = time.monotonic()
        with self._connection(hop) as (connection, address):
            try:
                status, size, found = self._exchange(hop, Stream(connection, self._watch))
            except httpcore2.LocalProtocolError:
                raise StepFailure(FailureReason.INVALID_REQUEST, f"{hop} cannot be written as HTTP") from None
            except httpcore2.RemoteProtocolError:
                raise _unreachable(hop, "the connection ended early, or the response is not HTTP") from None
            except httpcore2.NetworkError:
                raise _unreachable(hop, "the connection broke") from None
        seconds = round(time.monotonic() - began, 3)
        place = {"method": hop.method, "host": hop.authority, "address": address}
        _log.info("http_called", **place, status=status, bytes=size, seconds=seconds)
        if isinstance(found, StepFailure):
            raise found
        return found

    def _exchange(self, hop: Hop, stream: Stream) -> tuple[int, int, HttpResponse | Hop | StepFailure]:
        """Send a request and read the response. Returns the status, the number of bytes read, and the result."""
        request = self._request
        origin = Origin(hop.scheme.encode(), hop.host.encode(), hop.port)
        target = httpcore2.URL(scheme=origin.scheme, host=origin.host, port=origin.port, target=hop.path.encode())
        lines = [(name.encode(), value.encode()) for name, value in hop.header_lines()]
        content = b"" if hop.body is None else hop.body.data
        response = HTTP11Connection(origin, stream).handle_request(
            httpcore2.Request(hop.method, target, headers=lines, content=content)
        )
        headers = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in response.headers]
        first = dict(reversed(headers))
        status, expected = response.status, request.expects(response.status)
        if status in _REDIRECTS and request.follow_redirects and "location" in first and not expected:
            return status, 0, calls.next_hop(hop, status, first["location"], request.secrets)
        reader = responses.ResponseReader(request.max_bytes if expected else responses.excerpt_bytes(request.secrets))
        try:
            reader.start(first.get("content-encoding", ""))
            for part in response.iter_stream():
                reader.feed(part)
            reader.close()
        except (StepFailure, httpcore2.NetworkError, httpcore2.RemoteProtocolError):
            if expected:
                raise  # otherwise the status decides, even if the body is incomplete
        body = reader.body()
        if expected:
            return status, len(body), self._respond(status, headers, body, request.secrets)
        failure = responses.failure_of(hop, status, first, body, request.secrets, clock.now())
        return status, len(body), failure

    @contextmanager
    def _connection(self, hop: Hop) -> Iterator[tuple[socket.socket, str]]:
        """Yield a connection to the first address that accepts one. Raises StepFailure, CancelledError."""
        seconds = self._settings.connect_timeout.total_seconds()
        tls_name = hop.host if hop.scheme == "https" else None
        failure = _unreachable(hop, "the host name has no address")
        for address in self._addresses(hop):
            try:
                connection = connections.connect(
                    address, hop.port, tls_name, self._settings.ca_file, self._watch, seconds
                )
            except connections.ConnectTimeout:
                message = f"{hop}: no connection to {address} after {seconds:g} s (the setting http.connect_timeout)"
                failure = StepFailure(FailureReason.TIMEOUT, message)
            except ssl.SSLCertVerificationError as error:
                raise _unreachable(hop, connections.description_of(error)) from None
            except OSError as error:
                failure = _unreachable(hop, f"{address}: {connections.description_of(error)}")
            else:
                with connection:
                    yield connection, address
                return
        raise failure

    def _addresses(self, hop: Hop) -> Sequence[str]:
        """Return the addresses of the host, if all are allowed. Raises StepFailure, CancelledError."""
        try:
            found = connections.resolve_host(hop.host, hop.port, self._resolve, self._watch)
        except OSError as error:
            raise _unreachable(hop, f"the name cannot be resolved: {connections.description_of(error)}") from None
        for address in found:
            refusal = self._policy.refuse_address(hop.host, address)
            if refusal is not None:
                raise _refused(hop, refusal)
        return found


def _unreachable(hop: Hop, reason: str) -> StepFailure:
    return StepFailure(FailureReason.HTTP_UNREACHABLE, f"{hop} cannot be reached: {reason}")


def _refused(hop: Hop, reason: str) -> StepFailure:
    return StepFailure(FailureReason.HTTP_REFUSED, f"{hop} may not be called: {reason}")
