"""
Callers without a key: who needs none.

A program on the machine of the API needs no key while the API listens on a loopback address only. Whoever comes through
a proxy comes from elsewhere, although the proxy itself is on this machine: a request with a header of proxies, or for a
host name that is not a loopback one, needs a key. A proxy that sends neither cannot be told from a local program, so
behind one the setting `access.keys` must be `required`.

Nothing here opens a connection: a request is known by its address and its headers.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from functools import lru_cache
from urllib.parse import urlsplit

from app.kernel.settings import Settings

#: Headers that proxies add.
PROXY_HEADERS = frozenset(
    {b"forwarded", b"via", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto", b"x-real-ip"}
)


def is_local(settings: Settings, peer: str | None, headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether a request needs no key. `peer` is the address that sent it; the names of headers are in lower case."""
    return not needs_keys(settings) and peer is not None and is_loopback(peer) and _is_direct(headers)


def needs_keys(settings: Settings) -> bool:
    """Whether everybody needs a key, because of the setting or because others can reach the API."""
    url = settings.api.url
    is_reachable = not is_loopback(settings.api.host) or (url and not is_loopback(urlsplit(url).hostname or ""))
    return settings.access.keys == "required" or bool(is_reachable)


def _is_direct(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    for name, value in headers:
        if name in PROXY_HEADERS:
            return False
        if name == b"host" and not is_loopback(urlsplit(f"//{value.decode('latin-1')}").hostname or ""):
            return False
    return True


@lru_cache(maxsize=1024)
def is_loopback(host: str) -> bool:
    """Whether only programs on the same machine can reach this address."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
