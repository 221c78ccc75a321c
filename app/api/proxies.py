"""
The client of a request behind proxies: its address, and whether it spoke https.

What a request says of its way is believed only from the proxies of `api.trusted_proxies`, and ignored from all others.
`scope["client"]` becomes the address of the client. It becomes None when the address is not known: a request that a
proxy has sent on is never taken for one of this machine, whatever the proxy did or did not say.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from app.kernel.security.origins import IPNetwork, client_address, is_in, is_loopback

#: Headers by which a request shows that a proxy has sent it on.
_SIGNS = frozenset({b"forwarded", b"via", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto", b"x-real-ip"})
#: Most proxies of one request.
_MAX_NOTED = 32
_FOR = re.compile(r'(?:^|;)\s*for\s*=\s*("(?:[^"\\]|\\.)*"|[^;,\s]*)', re.IGNORECASE)


class ProxyMiddleware:
    """ASGI middleware that puts the address of the client and its scheme into the scope."""

    def __init__(self, app: ASGIApp, proxies: Sequence[str]) -> None:
        """`proxies` are addresses and networks."""
        self._app = app
        self._proxies = tuple(ipaddress.ip_network(proxy) for proxy in proxies)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, with its client."""
        if scope["type"] == "http":
            _resolve(scope, self._proxies)
        await self._app(scope, receive, send)


def _resolve(scope: Scope, proxies: Sequence[IPNetwork]) -> None:
    client = scope.get("client")
    signs = [(name, value.decode("latin-1")) for name, value in scope["headers"] if name in _SIGNS]
    if client is None:
        return
    peer = client[0]
    if not is_in(peer, proxies):
        if signs and is_loopback(peer):
            scope["client"] = None  # a proxy on this machine that the settings do not name
        return
    found = _client(peer, signs, proxies)
    scope["client"] = None if found is None else (found, 0)
    schemes = [
        text.strip().lower() for name, value in signs if name == b"x-forwarded-proto" for text in value.split(",")
    ]
    if schemes and schemes[-1] in ("http", "https"):
        scope["scheme"] = schemes[-1]


def _client(peer: str, signs: Iterable[tuple[bytes, str]], proxies: Sequence[IPNetwork]) -> str | None:
    """Return the address that trusted proxies have noted; None for none, and where the two headers differ."""
    signs = list(signs)
    chains = [
        [_address(text) for name, value in signs if name == b"x-forwarded-for" for text in value.split(",")],
        [_forwarded(text) for name, value in signs if name == b"forwarded" for text in value.split(",")],
    ]
    found = {client_address(peer, chain, proxies) if len(chain) <= _MAX_NOTED else None for chain in chains if chain}
    # Without a header, the proxy has not said for whom it speaks. With two that differ, one is a client's own.
    return found.pop() if len(found) == 1 else None


def _forwarded(element: str) -> str:
    """Return the address of an element of `Forwarded` (RFC 7239)."""
    match = _FOR.search(element)
    return _address(match[1].strip('"')) if match else ""


def _address(text: str) -> str:
    """Return an address without brackets and port."""
    text = text.strip()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0] if text.count(":") == 1 else text
