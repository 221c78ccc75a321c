"""
The request guard: which HTTP requests a server of Arriero answers, judged by their headers alone.

Every web page that somebody opens on this machine can send requests to its loopback addresses. Browsers say so:
`Host` holds the name in the address bar: a page that points its own name here (DNS rebinding) is seen by that name.
`Origin` and `Sec-Fetch-Site`, which no page can change, say which site sent a request. curl and other programs send
neither, and are answered.

Nothing here opens a connection. Whoever serves HTTP asks before the request reaches any endpoint.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable, Sequence
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
#: The setting that adds names.
SETTING = "trusted_hosts"

#: A part of a name between two dots.
_LABEL = re.compile(r"[a-z0-9_][a-z0-9_-]{0,62}", re.ASCII)
#: A name or an address, and a port; an address of IPv6 stands in brackets.
_HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[^\[\]:]+)(:(?P<port>[0-9]{1,5}))?", re.ASCII)
_PORTS = {"http": 80, "https": 443}
#: Characters of a header's value that a refusal shows, and of a name that is looked at.
_SHOWN, _LONGEST = 100, 253
_WILDCARDS = ("0.0.0.0", "::", "")  # noqa: S104 compared, not listened on


class ForbiddenRequest(InvalidInput):
    """A web page of another site may have sent the request, or it is for a server of another name."""

    what = "request"


@dataclass(frozen=True, slots=True)
class _Host:
    """A name or an address, and the port that was given with it."""

    name: str
    port: int | None


@dataclass(frozen=True, slots=True)
class RequestGuard:
    """Judges requests to one server."""

    #: Names and addresses of this server besides the loopback ones, in lower case.
    names: tuple[str, ...]
    #: Those of the settings: pages of these hosts may call. `*.example.com` is every name below it.
    trusted: tuple[str, ...]

    def refuse(self, method: str, headers: Iterable[tuple[str, str]], address: str | None) -> Problem | None:
        """
        Why the request is refused; None when it is answered.

        `headers` are all of the request, `address` is the one of this machine on which it arrived.
        """
        found: dict[str, list[str]] = {}
        for name, value in headers:
            found.setdefault(name.lower(), []).append(value)
        for name in ("Host", "Origin", "Sec-Fetch-Site"):
            if len(given := found.get(name.lower(), [])) > 1:
                return Problem(name, f"{_shown(', '.join(given))}: it is given {len(given)} times", "one")
        one = {name: values[0] for name, values in found.items()}
        return self._refuse_host(one.get("host"), address) or self._refuse_site(method, one)

    def _refuse_host(self, value: str | None, address: str | None) -> Problem | None:
        if value is None:
            return Problem("Host", "it is missing", self._accepted())
        host = _parsed(value)
        if host is None:
            return Problem("Host", f"{_shown(value)} is no host", self._accepted())
        if _is_loopback(host.name) or host.name in self.names or _matches(host.name, self.trusted):
            return None
        if address is not None and _same_address(host.name, address):
            return None
        return Problem("Host", f"{_shown(value)} is no name of this server", self._accepted())

    def _refuse_site(self, method: str, headers: dict[str, str]) -> Problem | None:
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        accepted = f"the server's own pages; those of other hosts: the setting {SETTING}"
        trusted = False
        if origin is not None:
            page = _origin(origin)
            trusted = page is not None and _matches(page.name, self.trusted)
            if page is None or not (trusted or page == _with_port(headers["host"], origin)):
                return Problem("Origin", f"{_shown(origin)} is another site", accepted)
        if site is None or trusted or site in ("same-origin", "none"):
            return None
        if method in ("GET", "HEAD") and headers.get("sec-fetch-mode") == "navigate":
            # A link on another page was followed: the answer is shown to the user, and not to that page.
            if headers.get("sec-fetch-dest") == "document":
                return None
            accepted = f"{accepted}; a link that opens a page of its own"
        return Problem("Sec-Fetch-Site", f"{_shown(site)}: a page of another site sent this", accepted)

    def _accepted(self) -> str:
        known = dict.fromkeys(["localhost", "127.0.0.1", "[::1]", *self.names, *self.trusted])
        return f"{', '.join(known)}; other names: the setting {SETTING}"


def guard_of(listens_on: str, trusted_hosts: Sequence[str], *urls: str) -> RequestGuard:
    """The guard of a server that listens on a name or address, and is called by `urls` too."""
    own = [socket.gethostname() if listens_on in _WILDCARDS else listens_on]
    own += [urlsplit(url).hostname or "" for url in urls]
    return RequestGuard(tuple(dict.fromkeys(name.lower() for name in own if name)), tuple(trusted_hosts))


def document(problem: Problem) -> dict[str, Any]:
    """A refusal as problem details, for servers that have no other way to write them."""
    return {
        "type": "urn:arriero:error:forbidden-request",
        "title": f"invalid {ForbiddenRequest.what}",
        "status": STATUS,
        "detail": str(problem),
        "errors": [{"where": problem.where, "message": problem.message, "accepted": problem.accepted, "line": None}],
    }


def trusted_host(text: str) -> str:
    """A host as the settings name it. Raises ValueError."""
    name = text.strip().lower().removesuffix(".")
    bare = name.removeprefix("*.")
    if not 0 < len(bare) <= _LONGEST or not (_is_name(bare) or _address(bare)):
        raise ValueError(f"{text!r} is no host; expected a name, an address or *.name, without scheme and port")
    return name


#: A host in the settings.
TrustedHost = Annotated[str, AfterValidator(trusted_host)]


def _parsed(value: str) -> _Host | None:
    if len(value) > _LONGEST + 10 or (match := _HOST.fullmatch(value.lower())) is None:
        return None
    name, port = match["name"].removesuffix("."), match["port"]
    if not (_is_name(name) or (":" in name and _address(name.strip("[]")))):
        return None
    return _Host(name.strip("[]"), None if port is None else int(port))


def _origin(value: str) -> _Host | None:
    """Where a page is from, with its port; None for `null` and what is no origin."""
    scheme, _, rest = value.partition("://")
    return _with_port(rest, value) if scheme in _PORTS else None


def _with_port(host: str, origin: str) -> _Host | None:
    """A host with the port that it has by the origin's scheme, where it gives none."""
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
    return repr(value if len(value) <= _SHOWN else f"{value[:_SHOWN]}…")
