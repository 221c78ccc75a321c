"""
Calls: what an `http` step asks of a server.

A URL is read once, here; what is connected to is what was read. Headers that steer a connection cannot be set.
A redirect carries neither headers of the step nor secrets to another place.

Nothing here opens a connection; `workers.outbound` does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any
from urllib.parse import quote, urlencode, urljoin, urlsplit

import app
from app.kernel.errors import FailureReason, Problem, StepFailure
from app.kernel.security import egress, masking
from app.kernel.security.egress import EgressPolicy
from app.workflows.expressions import templates

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
#: Methods that can be repeated without a key.
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
#: Redirects of one call at the most.
MOST_HOPS = 5
#: Headers that decide where a request goes and where it ends: they are Arriero's.
_OURS = frozenset(
    {
        *("accept-encoding", "connection", "content-length", "expect", "host", "keep-alive", "proxy-authorization"),
        *("proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"),
    }
)
#: Headers that go along to another place.
_TRAVEL = frozenset({"accept", "content-type", "user-agent"})
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"[\t -~]*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]*):")
#: The beginning of a URL's template whose host is no template itself.
_LITERAL = re.compile(r"\s*(https?)://([^/?#\\@{}\s]+)(?=[/?#]|\s*$)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class HttpBody:
    """What a request carries."""

    data: bytes = field(repr=False)
    content_type: str


def json_body(value: Any) -> HttpBody:
    """A JSON body."""
    return HttpBody(json.dumps(value, ensure_ascii=False, allow_nan=False).encode(), "application/json")


def text_body(text: str) -> HttpBody:
    """A body that is a text; the header `content-type` of the step says more of it."""
    return HttpBody(text.encode(), "text/plain; charset=utf-8")


@dataclass(frozen=True, slots=True)
class HttpCall:
    """What an `http` step asks, its templates rendered. What may hold secrets is not in its `repr`."""

    url: str = field(repr=False)
    #: GET without a body, else POST.
    method: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    #: Added to the query of the URL.
    query: Mapping[str, str] = field(default_factory=dict, repr=False)
    body: HttpBody | None = None
    #: Statuses that are a success; without any, 200 to 299.
    expect: tuple[int, ...] = ()
    #: For all of it, redirects included.
    timeout: timedelta = timedelta(seconds=30)
    #: Bytes of the unpacked answer.
    max_bytes: int = 1_048_576
    follow_redirects: bool = False
    #: Equal for all attempts of one step, so that the server can tell a second attempt from a second call.
    idempotency_key: str | None = None
    idempotency_header: str = "Idempotency-Key"
    #: The values of the secrets in it, to be masked.
    secrets: tuple[str, ...] = field(default=(), repr=False)

    def expects(self, status: int) -> bool:
        """Whether the status is a success."""
        return status in self.expect if self.expect else 200 <= status < 300


@dataclass(frozen=True, slots=True)
class Hop:
    """One request of a call, as it goes to one server."""

    method: str
    scheme: str
    #: A name or an address, without brackets.
    host: str
    port: int
    #: With the query, in ASCII.
    path: str = field(repr=False)
    headers: tuple[tuple[str, str], ...] = field(repr=False)
    body: HttpBody | None = None

    @property
    def authority(self) -> str:
        """Host and port, as the header `host` has them."""
        name = f"[{self.host}]" if ":" in self.host else self.host
        return name if self.port == egress.PORTS[self.scheme] else f"{name}:{self.port}"

    @property
    def url(self) -> str:
        """Where it goes."""
        return f"{self.scheme}://{self.authority}{self.path}"

    def __str__(self) -> str:
        return f"{self.method} {self.url.partition('?')[0]}"

    def lines(self) -> list[tuple[str, str]]:
        """All headers, in the order in which they are sent."""
        given = {name.lower() for name, _ in self.headers}
        lines = [("Host", self.authority)]
        if "user-agent" not in given:
            lines.append(("User-Agent", f"arriero/{app.__version__}"))
        if "accept" not in given:
            lines.append(("Accept", "application/json, text/*;q=0.9, */*;q=0.1"))
        lines += [("Accept-Encoding", "gzip"), ("Connection", "close"), *self.headers]
        if self.body is not None:
            if "content-type" not in given:
                lines.append(("Content-Type", self.body.content_type))
            lines.append(("Content-Length", str(len(self.body.data))))
        elif self.method not in _SAFE:
            lines.append(("Content-Length", "0"))
        return lines


def first_hop(call: HttpCall) -> Hop:
    """The request of a call. Raises StepFailure for what is no request, and what is none that we make."""
    method = (call.method or ("GET" if call.body is None else "POST")).upper()
    if method not in METHODS:
        raise _invalid(f"{method!r} is no method: write {', '.join(METHODS)}")
    headers = _headers(call.headers)
    given = {name.lower() for name, _ in headers}
    if call.idempotency_key is not None and method not in _SAFE and call.idempotency_header.lower() not in given:
        headers += _headers({call.idempotency_header: call.idempotency_key})
    hop = Hop(method, "", "", 0, "", tuple(headers), call.body)
    hop = _towards(hop, call.url, call.query)
    if masking.contains_secret(hop.host, [secret.lower() for secret in call.secrets]):
        raise _refused("a secret stands in the host of the URL, and hosts are looked up in the open")
    return hop


def next_hop(hop: Hop, status: int, location: str, secrets: Collection[str]) -> Hop:
    """
    The request that follows a redirect (RFC 9110, section 15.4).

    Raises StepFailure for one that leads from https to http, and for one that would carry a secret to another place.
    """
    there = _towards(hop, urljoin(hop.url, location), {})
    if hop.scheme == "https" and there.scheme == "http":
        raise _refused(f"{hop} redirects from https to http, to {there.host}")
    if status == 303 or (status in (301, 302) and hop.method == "POST"):
        kept = tuple((name, value) for name, value in hop.headers if name.lower() != "content-type")
        there = replace(there, method="HEAD" if hop.method == "HEAD" else "GET", body=None, headers=kept)
    upgraded = (hop.scheme, hop.port, there.scheme, there.port) == ("http", 80, "https", 443)
    if hop.host == there.host and ((hop.scheme, hop.port) == (there.scheme, there.port) or upgraded):
        return there
    body = there.body.data.decode(errors="replace") if there.body is not None else ""
    if masking.contains_secret(there.url, secrets) or masking.contains_secret(body, secrets):
        raise _refused(f"{hop} redirects to another place, {there.host}, and a secret would go along")
    return replace(there, headers=tuple((name, value) for name, value in there.headers if name.lower() in _TRAVEL))


def check_headers(headers: Mapping[str, str], where: str) -> list[Problem]:
    """Names of headers that cannot be set."""
    found = []
    for name in headers:
        try:
            _headers({name: ""})
        except StepFailure as failure:
            found.append(Problem(f"{where}.{name}", failure.message, "other names, of letters, digits and hyphens"))
    return found


def check_url(template: str, where: str, policy: EgressPolicy | None) -> list[Problem]:
    """
    What is known to be refused before anything runs: another scheme, a host that is written out, and any where none is
    listed. Without a policy, nobody knows which are.
    """
    if (other := _SCHEME.match(template)) is not None and other[1].lower() not in egress.PORTS:
        return [Problem(where, f"the URL has the scheme {other[1][:20]!r}", "http, https")]
    if policy is None:
        return []
    if not policy.rules:
        accepted = f"hosts under the setting http.allowed_hosts: {egress.ACCEPTED}"
        return [Problem(where, "no server may be called: the setting http.allowed_hosts is empty", accepted)]
    if (literal := _LITERAL.match(template)) is None:
        return []
    try:
        hop = _towards(Hop("GET", "", "", 0, "", ()), literal[0].strip(), {})
    except StepFailure as failure:
        return [Problem(where, failure.message)]
    refusal = policy.refuse_host(hop.scheme, hop.host, hop.port)
    return [] if refusal is None else [Problem(where, refusal, "a host that is listed there")]


def secret_names(value: Any) -> frozenset[str]:
    """The names of the secrets that the templates in nested data use."""
    if isinstance(value, str):
        return templates.secret_names(value)
    inner: Iterable[Any] = ()
    if isinstance(value, Mapping):
        inner = value.values()
    elif isinstance(value, list | tuple):
        inner = value
    return frozenset().union(*map(secret_names, inner))


def filled(value: Any, data: Mapping[str, Any], secrets: Mapping[str, str]) -> Any:
    """
    Nested data with each of its texts rendered as a template, which can name `secrets` too.

    Raises StepFailure, with the secrets masked, when one cannot be rendered.
    """
    scope = {**data, "secrets": secrets}
    try:
        return _filled(value, lambda text: templates.render(text, scope))
    except StepFailure as failure:
        raise StepFailure(failure.reason, masking.masked(failure.message, tuple(secrets.values()))) from None


def _filled(value: Any, render: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return render(value)
    if isinstance(value, Mapping):
        return {key: _filled(inner, render) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_filled(inner, render) for inner in value]
    return value


def _towards(hop: Hop, url: str, query: Mapping[str, str]) -> Hop:
    """The request, sent to a URL. Raises StepFailure for one that we do not go to."""
    url = url.strip()
    if _CONTROL.search(url):
        raise _invalid("the URL holds a control character")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise _invalid("the URL cannot be read: write https://host/path") from None
    if parts.scheme not in egress.PORTS:
        raise _refused(f"the URL has the scheme {parts.scheme[:20]!r}; http and https are offered")
    if "@" in parts.netloc:
        raise _refused("the URL holds a user or a password: put them into the header 'authorization', by secrets")
    written = parts.netloc[: -len(f":{port}")] if port is not None else parts.netloc.removesuffix(":")
    host = egress.host(written)
    if host is None or port == 0:
        raise _invalid(f"{parts.netloc[:100]!r} is no host; one that is not in ASCII is written as 'xn--…'")
    pairs = [quote(parts.query, safe="/?%:@!$&'()*+,;=~[]"), urlencode(query)]
    asked = "&".join(filter(None, pairs))
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~") + (f"?{asked}" if asked else "")
    return replace(hop, scheme=parts.scheme, host=host, port=port or egress.PORTS[parts.scheme], path=path)


def _headers(given: Mapping[str, str]) -> list[tuple[str, str]]:
    found = []
    for name, value in given.items():
        if not _TOKEN.fullmatch(name):
            raise _invalid(f"{name[:100]!r} is no name of a header")
        if name.lower() in _OURS:
            raise _invalid(f"the header {name!r} cannot be set: Arriero does")
        if not _HEADER_VALUE.fullmatch(value.strip()):
            raise _invalid(f"the header {name!r} holds what is not printable ASCII, such as a line break")
        found.append((name, value.strip()))
    return found


def _invalid(message: str) -> StepFailure:
    return StepFailure(FailureReason.INVALID_REQUEST, message)


def _refused(message: str) -> StepFailure:
    return StepFailure(FailureReason.HTTP_REFUSED, message)
