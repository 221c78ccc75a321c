"""
Callers without a key: who needs none.

A program on the machine of the API needs no key while the API listens on a loopback address only. Whoever comes through
a proxy comes from elsewhere, although the proxy itself is on this machine: a request with a header of proxies, or for a
host name that is not a loopback one, needs a key. A proxy that sends neither cannot be told from a local program, so
behind one the setting `access.keys` must be `required`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.types import Scope

from app.kernel.settings import Settings

#: Headers that proxies add.
PROXY_HEADERS = frozenset(
    {b"forwarded", b"via", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto", b"x-real-ip"}
)


def is_local(settings: Settings, scope: Scope) -> bool:
    """Whether a request needs no key."""
    if settings.access.keys == "required" or not listens_locally(settings):
        return False
    client = scope.get("client")
    return client is not None and _is_loopback(client[0]) and _is_direct(scope["headers"])


def listens_locally(settings: Settings) -> bool:
    """Whether the API can be reached only from its own machine, as far as its settings say."""
    url = settings.api.url
    return _is_loopback(settings.api.host) and (not url or _is_loopback(urlsplit(url).hostname or ""))


def _is_direct(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    for name, value in headers:
        if name in PROXY_HEADERS:
            return False
        if name == b"host" and not _is_loopback(urlsplit(f"//{value.decode('latin-1')}").hostname or ""):
            return False
    return True


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
