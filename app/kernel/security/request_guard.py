"""
The request guard: refuses HTTP requests that web pages of other sites could have sent, by their headers alone.

Every web page that a user opens on this machine can send requests to its loopback addresses. Headers reveal them:
`Host` is the name in the address bar, so it reveals a page whose name was pointed at this machine (DNS rebinding).
`Origin` and `Sec-Fetch-Site`, which no page can change, identify the site that sent a request. curl and other programs
send neither, and are answered.

Nothing here opens a connection. Every HTTP server calls the guard before a request reaches an endpoint.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator

from app.kernel.errors import InvalidInput, Problem

#: The media type of a refusal, which is problem details (RFC 9457).
MEDIA_TYPE = "application/problem+json"
#: The HTTP status of a refusal.
STATUS = 403
#: The setting with further accepted hosts.
SETTING = "trusted_hosts"

#: A part of a name between two dots.
_LABEL = re.compile(r"[a-z0-9_][a-z0-9_-]{0,62}", re.ASCII)
#: A name or an address, and a port; an IPv6 address is in brackets.
_HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[^\[\]:]+)(:(?P<port>[0-9]{1,5}))?", re.ASCII)
_PORTS = {"http": 80, "https": 443}
#: Most characters of a header's value in a refusal, and of a host name.
_MAX_SHOWN, _MAX_NAME = 100, 253
_WILDCARDS = ("0.0.0.0", "::", "")  # noqa: S104 only compared


class ForbiddenRequest(InvalidInput):
    """A web page of another site may have sent the request, or it is for a server with another name."""

    what = "request"


@dataclass(frozen=True, slots=True)
class _Host:
    """A name or an address, with its port if there is one."""

    name: str
    port: int | None


@dataclass(frozen=True, slots=True)
class RequestGuard:
    """Accepts or refuses the requests to one server."""

    #: Names and addresses of this server in addition to the loopback ones, in lower case.
    names: tuple[str, ...]
    #: Hosts of the settings, whose pages may send requests. `*.example.com` is every subdomain.
    trusted: tuple[str, ...]

    def refuse(
        self,
        method: str,
        headers: Iterable[tuple[str, str]],
        address: str | None,
        origins: Collection[str] = (),
    ) -> Problem | None:
        """
        Return why the request is refused, or None when it is accepted.

        `headers` are all headers of the request. `address` is the local address on which it arrived. `origins` are
        further origins whose pages may send requests.
        """
        found: dict[str, list[str]] = {}
        for name, value in headers:
            found.setdefault(name.lower(), []).append(value)
        for name in ("Host", "Origin", "Sec-Fetch-Site"):
            if len(given := found.get(name.lower(), [])) > 1:
                return Problem(name, f"{_shown(', '.join(given))}: the header is sent {len(given)} times", "one header")
        one = {name: values[0] for name, values in found.items()}
        return self._refuse_host(one.get("host"), address) or self._refuse_site(method, one, origins)

    def _refuse_host(self, value: str | None, address: str | None) -> Problem | None:
        if value is None:
            return Problem("Host", "the header is missing", self._accepted())
        host = _parsed(value)
        if host is None:
            return Problem("Host", f"{_shown(value)} is not a host", self._accepted())
        if _is_loopback(host.name) or host.name in self.names or _matches(host.name, self.trusted):
            return None
        if address is not None and _same_address(host.name, address):
            return None
        return Problem("Host", f"{_shown(value)} is not a name of this server", self._accepted())

    def _refuse_site(self, method: str, headers: dict[str, str], origins: Collection[str]) -> Problem | None:
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        accepted = f"the server's own pages; pages of other hosts: see the setting {SETTING}"
        trusted = False
        if origin is not None:
            page = _origin(origin)
            trusted = origin in origins or (page is not None and _matches(page.name, self.trusted))
            if page is None or not (trusted or page == _with_port(headers["host"], origin)):
                return Problem("Origin", f"{_shown(origin)} is the origin of another site", accepted)
        if site is None or trusted or site in ("same-origin", "none"):
            return None
        if method in ("GET", "HEAD") and headers.get("sec-fetch-mode") == "navigate":
            # The user followed a link on another page: the browser shows the answer to the user, not to that page.
            if headers.get("sec-fetch-dest") == "document":
                return None
            accepted = f"{accepted}; a link that opens a top-level page"
        return Problem("Sec-Fetch-Site", f"{_shown(site)}: a page of another site sent this", accepted)

    def _accepted(self) -> str:
        known = dict.fromkeys(["localhost", "127.0.0.1", "[::1]", *self.names, *self.trusted])
        return f"{', '.join(known)}; other names: see the setting {SETTING}"


def guard_of(listens_on: str, trusted_hosts: Sequence[str], *urls: str) -> RequestGuard:
    """Return the guard of a server that listens on a name or address, and that clients also reach by `urls`."""
    own = [socket.gethostname() if listens_on in _WILDCARDS else listens_on]
    own += [urlsplit(url).hostname or "" for url in urls]
    return RequestGuard(tuple(dict.fromkeys(name.lower() for name in own if name)), tuple(trusted_hosts))


def problem_document(problem: Problem) -> dict[str, Any]:
    """Return a refusal as problem details, for servers without their own code for them."""
    return {
        "type": "urn:arriero:error:forbidden-request",
        "title": f"invalid {ForbiddenRequest.what}",
        "status": STATUS,
        "detail": str(problem),
        "errors": [{"where": problem.where, "message": problem.message, "accepted": problem.accepted, "line": None}],
    }


def trusted_host(text: str) -> str:
    """Return a host of the settings in normalised form. Raises ValueError."""
    name = text.strip().lower().removesuffix(".")
    bare = name.removeprefix("*.")
    if not 0 < len(bare) <= _MAX_NAME or not (_is_name(bare) or _address(bare)):
        raise ValueError(f"{text!r} is not a host; accepted: a name, an address or *.name, without scheme and port")
    return name


#: A host in the settings.
TrustedHost = Annotated[str, AfterValidator(trusted_host)]


def _parsed(value: str) -> _Host | None:
    if len(value) > _MAX_NAME + 10 or (match := _HOST.fullmatch(value.lower())) is None:
        return None
    name, port = match["name"].removesuffix("."), match["port"]
    if not (_is_name(name) or (":" in name and _address(name.strip("[]")))):
        return None
    return _Host(name.strip("[]"), None if port is None else int(port))


def _origin(value: str) -> _Host | None:
    """Parse an origin into host and port; None for `null` and for invalid origins."""
    scheme, _, rest = value.partition("://")
    return _with_port(rest, value) if scheme in _PORTS else None


def _with_port(host: str, origin: str) -> _Host | None:
    """Parse a host. A missing port is replaced by the default port of the origin's scheme."""
    found = _parsed(host)
    if found is None or found.port is not None:
        return found
    return _Host(found.name, _PORTS.get(origin.partition("://")[0]))


def _is_name(text: str) -> bool:
    return all(_LABEL.fullmatch(label) for label in text.split("."))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(name.endswith(one[1:]) if one.startswith("*.") else name == one for one in patterns)


def _is_loopback(name: str) -> bool:
    address = _address(name)
    return name == "localhost" if address is None else address.is_loopback


def _same_address(name: str, address: str) -> bool:
    found = _address(name)
    return found is not None and found == _address(address.partition("%")[0])


@lru_cache(maxsize=256)
def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return None
    mapped = getattr(found, "ipv4_mapped", None)
    return found if mapped is None else mapped


def _shown(value: str) -> str:
    return repr(value if len(value) <= _MAX_SHOWN else f"{value[:_MAX_SHOWN]}…")
