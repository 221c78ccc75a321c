"""
Outbound: the work of an `http` step, one call to a server outside.

A name is resolved once, every address it leads to is judged, and the connection goes to one that was judged: a name
that answers differently a moment later changes nothing. No proxy is asked, no cookie kept, no connection used again.
A call ends at its timeout to the moment, however slowly a server dribbles, and at once when it is stopped from another
thread, whatever it waits for.
No message, log line or answer holds a secret of the call.
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
from app.kernel.http_settings import HttpSettings
from app.kernel.security import masking
from app.kernel.security.egress import EgressPolicy
from app.workflows.http import calls, responses
from app.workflows.http.calls import Hop, HttpCall
from app.workflows.http.responses import HttpResponse
from workers import connections
from workers.connections import ConnectionWatch, Resolve, Stream

_log = log.get(__name__)

#: Takes what makes the work stop, to be called from any thread; `Holding.on_stop` is one.
OnStop = Callable[[Callable[[], None]], None]

_REDIRECTS = frozenset({301, 302, 303, 307, 308})


def call(
    request: HttpCall, *, settings: HttpSettings, on_stop: OnStop, resolve: Resolve = connections.addresses
) -> HttpResponse:
    """
    Make the call, and give its answer.

    Raises StepFailure with `timeout`, `invalid_request` or a reason of `http_…`; CancelledError when it was stopped.
    """
    try:
        with ConnectionWatch(request.timeout.total_seconds()) as watch:
            on_stop(watch.stop)
            return _Caller(request, settings, resolve, watch).answer()
    except StepFailure as failure:
        # Without its causes: they may hold what was sent.
        raise StepFailure(
            failure.reason,
            masking.masked(failure.message, request.secrets),
            text=failure.text,
            status=failure.status,
            retry_after=failure.retry_after,
        ) from None


class _Caller:
    """One call: its hops, and how it reaches their servers."""

    def __init__(self, request: HttpCall, settings: HttpSettings, resolve: Resolve, watch: ConnectionWatch) -> None:
        self._request, self._settings, self._resolve, self._watch = request, settings, resolve, watch
        self._policy = EgressPolicy.of(settings.allowed_hosts, allow_private=settings.allow_private)

    def answer(self) -> HttpResponse:
        """What the last server answers. Raises StepFailure, CancelledError."""
        hop = calls.first_hop(self._request)
        for _ in range(1 + calls.MAX_REDIRECTS):
            found = self._ask(hop)
            if isinstance(found, HttpResponse):
                return found
            hop = found
        raise StepFailure(FailureReason.HTTP_UNUSABLE, f"more than {calls.MAX_REDIRECTS} redirects, the last to {hop}")

    def _ask(self, hop: Hop) -> HttpResponse | Hop:
        """One request: its answer, or where it redirects to."""
        refusal = self._policy.refuse_host(hop.scheme, hop.host, hop.port)
        if refusal is not None:
            raise _refused(hop, refusal)
        began = time.monotonic()
        with self._connected(hop) as (connection, address):
            try:
                status, size, found = self._exchange(hop, Stream(connection, self._watch))
            except httpcore2.LocalProtocolError:
                raise StepFailure(FailureReason.INVALID_REQUEST, f"{hop} cannot be written as HTTP") from None
            except httpcore2.RemoteProtocolError:
                raise _unreachable(hop, "the connection ended early, or what came is no HTTP") from None
            except httpcore2.NetworkError:
                raise _unreachable(hop, "the connection broke") from None
        seconds = round(time.monotonic() - began, 3)
        place = {"method": hop.method, "host": hop.authority, "address": address}
        _log.info("http_called", **place, status=status, bytes=size, seconds=seconds)
        if isinstance(found, StepFailure):
            raise found
        return found

    def _exchange(self, hop: Hop, stream: Stream) -> tuple[int, int, HttpResponse | Hop | StepFailure]:
        """Send and receive: the status, the bytes that were kept, and what they mean."""
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
                raise  # else the status is what counts, whatever becomes of the body
        body = reader.body()
        if expected:
            return status, len(body), responses.response_of(status, headers, body, request.secrets)
        failure = responses.failure_of(hop, status, first, body, request.secrets, clock.now())
        return status, len(body), failure

    @contextmanager
    def _connected(self, hop: Hop) -> Iterator[tuple[socket.socket, str]]:
        """A connection to the first address of the host that takes one. Raises StepFailure, CancelledError."""
        seconds = self._settings.connect_timeout.total_seconds()
        tls_name = hop.host if hop.scheme == "https" else None
        failure = _unreachable(hop, "the name leads to no address")
        for address in self._addresses(hop):
            try:
                connection = connections.connected(
                    address, hop.port, tls_name, self._settings.ca_file, self._watch, seconds
                )
            except connections.Late:
                late = f"{hop}: no connection to {address} after {seconds:g} s (the setting http.connect_timeout)"
                failure = StepFailure(FailureReason.TIMEOUT, late)
            except ssl.SSLCertVerificationError as error:
                raise _unreachable(hop, connections.why(error)) from None
            except OSError as error:
                failure = _unreachable(hop, f"{address}: {connections.why(error)}")
            else:
                with connection:
                    yield connection, address
                return
        raise failure

    def _addresses(self, hop: Hop) -> Sequence[str]:
        """Where the host is; all of it may be connected to. Raises StepFailure, CancelledError."""
        try:
            found = connections.resolved(hop.host, hop.port, self._resolve, self._watch)
        except OSError as error:
            raise _unreachable(hop, f"the name cannot be resolved: {connections.why(error)}") from None
        for address in found:
            refusal = self._policy.refuse_address(hop.host, address)
            if refusal is not None:
                raise _refused(hop, refusal)
        return found


def _unreachable(hop: Hop, reason: str) -> StepFailure:
    return StepFailure(FailureReason.HTTP_UNREACHABLE, f"{hop} cannot be reached: {reason}")


def _refused(hop: Hop, reason: str) -> StepFailure:
    return StepFailure(FailureReason.HTTP_REFUSED, f"{hop} may not be called: {reason}")
