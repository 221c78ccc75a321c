"""
HTTP calls: the requests of an `http` step, and the redirects that it follows.

A URL is parsed once, here, and the connection goes to the parsed host. Headers that control a connection cannot be set.
A redirect to another origin carries neither the headers of the step nor secrets.

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
#: Methods that can be repeated without an idempotency key.
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
#: Maximum redirects of one call.
MAX_REDIRECTS = 5
#: Headers that Arriero sets itself, because they control the target and the framing of a request.
_RESERVED_HEADERS = frozenset(
    {
        *("accept-encoding", "connection", "content-length", "expect", "host", "keep-alive", "proxy-authorization"),
        *("proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"),
    }
)
#: Headers that are kept in a redirect to another origin.
_CROSS_ORIGIN_HEADERS = frozenset({"accept", "content-type", "user-agent"})
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"[\t -~]*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]*):")
#: Matches the beginning of a URL template whose host contains no template.
_LITERAL_HOST = re.compile(r"\s*(https?)://([^/?#\\@{}\s]+)(?=[/?#]|\s*$)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class HttpBody:
    """The body of a request."""

    data: bytes = field(repr=False)
    content_type: str


def json_body(value: Any) -> HttpBody:
    """Return a JSON body."""
    return HttpBody(json.dumps(value, ensure_ascii=False, allow_nan=False).encode(), "application/json")


def text_body(text: str) -> HttpBody:
    """Return a text body; the step's header `content-type` overrides its content type."""
    return HttpBody(text.encode(), "text/plain; charset=utf-8")


@dataclass(frozen=True, slots=True)
class HttpCall:
    """The call of an `http` step with rendered templates. Its `repr` omits the fields that may contain secrets."""

    url: str = field(repr=False)
    #: By default GET without a body, POST with a body.
    method: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    #: Added to the query of the URL.
    query: Mapping[str, str] = field(default_factory=dict, repr=False)
    body: HttpBody | None = None
    #: The status codes that count as a success; when empty, 200 to 299.
    expect: tuple[int, ...] = ()
    #: The time limit for the whole call, redirects included.
    timeout: timedelta = timedelta(seconds=30)
    #: Maximum bytes of the decompressed response body.
    max_bytes: int = 1_048_576
    follow_redirects: bool = False
    #: The same for all attempts of a step, so that the server can distinguish a second attempt from a second call.
    idempotency_key: str | None = None
    idempotency_header: str = "Idempotency-Key"
    #: The values of the secrets in the call, which are masked in outputs and messages.
    secrets: tuple[str, ...] = field(default=(), repr=False)

    def expects(self, status: int) -> bool:
        """Return whether the status counts as a success."""
        return status in self.expect if self.expect else 200 <= status < 300


@dataclass(frozen=True, slots=True)
class Hop:
    """One request of a call: the first one, or one that follows a redirect."""

    method: str
    scheme: str
    #: A host name or an IP address, without brackets.
    host: str
    port: int
    #: The path with the query, in ASCII.
    path: str = field(repr=False)
    headers: tuple[tuple[str, str], ...] = field(repr=False)
    body: HttpBody | None = None

    @property
    def authority(self) -> str:
        """Host and port, in the form of the header `host`."""
        name = f"[{self.host}]" if ":" in self.host else self.host
        return name if self.port == egress.PORTS[self.scheme] else f"{name}:{self.port}"

    @property
    def url(self) -> str:
        """The URL of the request."""
        return f"{self.scheme}://{self.authority}{self.path}"

    def __str__(self) -> str:
        return f"{self.method} {self.url.partition('?')[0]}"

    def header_lines(self) -> list[tuple[str, str]]:
        """Return all headers in the order in which they are sent."""
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
    """Return the first request of a call. Raises StepFailure for an invalid or a forbidden request."""
    method = (call.method or ("GET" if call.body is None else "POST")).upper()
    if method not in METHODS:
        raise _invalid(f"{method!r} is not a supported method: write {', '.join(METHODS)}")
    headers = _headers(call.headers)
    given = {name.lower() for name, _ in headers}
    if call.idempotency_key is not None and method not in _SAFE and call.idempotency_header.lower() not in given:
        headers += _headers({call.idempotency_header: call.idempotency_key})
    hop = Hop(method, "", "", 0, "", tuple(headers), call.body)
    hop = _with_url(hop, call.url, call.query)
    if masking.contains_secret(hop.host, [secret.lower() for secret in call.secrets]):
        raise _refused("the host of the URL contains a secret, and DNS would reveal it")
    return hop


def next_hop(hop: Hop, status: int, location: str, secrets: Collection[str]) -> Hop:
    """
    Return the request that follows a redirect (RFC 9110, section 15.4).

    An upgrade from http to https on the default ports of the same host counts as the same origin.
    Raises StepFailure for a redirect from https to http, and for one that would send a secret to another origin.
    """
    there = _with_url(hop, urljoin(hop.url, location), {})
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
        raise _refused(f"{hop} redirects to another origin, {there.host}, and the request contains a secret")
    return replace(
        there, headers=tuple((name, value) for name, value in there.headers if name.lower() in _CROSS_ORIGIN_HEADERS)
    )


def check_headers(headers: Mapping[str, str], where: str) -> list[Problem]:
    """Return a problem for each header that cannot be set."""
    found = []
    for name in headers:
        try:
            _headers({name: ""})
        except StepFailure as failure:
            found.append(Problem(f"{where}.{name}", failure.message, "other names, of letters, digits and hyphens"))
    return found


def check_url(template: str, where: str, policy: EgressPolicy | None) -> list[Problem]:
    """
    Return the problems of a URL that are known at submission.

    These are an unsupported scheme, a literal host that the policy does not allow, and any host when the policy allows
    none. Without a policy, only the scheme is checked.
    """
    if (other := _SCHEME.match(template)) is not None and other[1].lower() not in egress.PORTS:
        return [Problem(where, f"the scheme {other[1][:20]!r} of the URL is not supported", "http, https")]
    if policy is None:
        return []
    if not policy.rules:
        accepted = f"hosts under the setting http.allowed_hosts: {egress.ACCEPTED}"
        return [Problem(where, "no host may be called: the setting http.allowed_hosts is empty", accepted)]
    if (literal := _LITERAL_HOST.match(template)) is None:
        return []
    try:
        hop = _with_url(Hop("GET", "", "", 0, "", ()), literal[0].strip(), {})
    except StepFailure as failure:
        return [Problem(where, failure.message)]
    refusal = policy.refuse_host(hop.scheme, hop.host, hop.port)
    return [] if refusal is None else [Problem(where, refusal, "a host that the setting lists")]


def secret_names(value: Any) -> frozenset[str]:
    """Return the names of the secrets that the templates in nested data use."""
    if isinstance(value, str):
        return templates.secret_names(value)
    inner: Iterable[Any] = ()
    if isinstance(value, Mapping):
        inner = value.values()
    elif isinstance(value, list | tuple):
        inner = value
    return frozenset().union(*map(secret_names, inner))


def render_texts(value: Any, data: Mapping[str, Any], secrets: Mapping[str, str]) -> Any:
    """
    Return nested data with each string rendered as a template, which can also use `secrets`.

    Raises StepFailure, with the secrets masked, when a template cannot be rendered.
    """
    scope = {**data, "secrets": secrets}
    try:
        return _map_texts(value, lambda text: templates.render(text, scope))
    except StepFailure as failure:
        raise StepFailure(failure.reason, masking.masked(failure.message, tuple(secrets.values()))) from None


def _map_texts(value: Any, render: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return render(value)
    if isinstance(value, Mapping):
        return {key: _map_texts(inner, render) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_map_texts(inner, render) for inner in value]
    return value


def _with_url(hop: Hop, url: str, query: Mapping[str, str]) -> Hop:
    """Return the request with another URL. Raises StepFailure for an invalid or unsupported URL."""
    url = url.strip()
    if _CONTROL.search(url):
        raise _invalid("the URL contains a control character")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise _invalid("the URL cannot be parsed: write https://host/path") from None
    if parts.scheme not in egress.PORTS:
        raise _refused(f"the scheme {parts.scheme[:20]!r} of the URL is not supported: write http or https")
    if "@" in parts.netloc:
        raise _refused("the URL contains a user or a password: put them into the header 'authorization', as secrets")
    written = parts.netloc[: -len(f":{port}")] if port is not None else parts.netloc.removesuffix(":")
    host = egress.host(written)
    if host is None or port == 0:
        raise _invalid(f"{parts.netloc[:100]!r} is not a valid host; write a non-ASCII host as 'xn--…'")
    pairs = [quote(parts.query, safe="/?%:@!$&'()*+,;=~[]"), urlencode(query)]
    query_string = "&".join(filter(None, pairs))
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~") + (f"?{query_string}" if query_string else "")
    return replace(hop, scheme=parts.scheme, host=host, port=port or egress.PORTS[parts.scheme], path=path)


def _headers(given: Mapping[str, str]) -> list[tuple[str, str]]:
    found = []
    for name, value in given.items():
        if not _TOKEN.fullmatch(name):
            raise _invalid(f"{name[:100]!r} is not a valid header name")
        if name.lower() in _RESERVED_HEADERS:
            raise _invalid(f"the header {name!r} cannot be set: Arriero sets it")
        if not _HEADER_VALUE.fullmatch(value.strip()):
            raise _invalid(f"the header {name!r} contains characters other than printable ASCII, such as a line break")
        found.append((name, value.strip()))
    return found


def _invalid(message: str) -> StepFailure:
    return StepFailure(FailureReason.INVALID_REQUEST, message)


def _refused(message: str) -> StepFailure:
    return StepFailure(FailureReason.HTTP_REFUSED, message)
