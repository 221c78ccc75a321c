"""The client of a request behind proxies: whom it believes, and that nobody passes for a program of this machine."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from app.api.proxies import ProxyMiddleware
from app.kernel.errors import InvalidSettings
from app.kernel.settings import load


def resolved(peer: str, headers: dict[str, str], *proxies: str) -> tuple[str | None, str]:
    """The address of the client and the scheme, as the application sees them."""
    found: list[dict[str, Any]] = []

    async def app(scope: Any, _: Any, __: Any) -> None:
        found.append(scope)

    listed = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    scope = {"type": "http", "client": (peer, 1234), "scheme": "http", "headers": listed}
    asyncio.run(ProxyMiddleware(app, proxies)(scope, None, None))  # type: ignore[arg-type] # they are not called
    client = found[0]["client"]
    return None if client is None else client[0], found[0]["scheme"]


PROXY = "10.0.0.7"
FOR = "X-Forwarded-For"


@pytest.mark.parametrize(
    ("peer", "headers", "proxies", "client"),
    [
        # Nobody is trusted: what a request says is ignored, and a proxy on this machine is recognized.
        ("203.0.113.5", {}, (), "203.0.113.5"),
        ("203.0.113.5", {FOR: "127.0.0.1"}, (), "203.0.113.5"),
        ("127.0.0.1", {}, (), "127.0.0.1"),
        ("127.0.0.1", {FOR: "127.0.0.1"}, (), None),
        ("127.0.0.1", {"Forwarded": "for=127.0.0.1"}, (), None),
        ("::1", {"Via": "1.1 proxy"}, (), None),
        ("::ffff:127.0.0.1", {"X-Real-IP": "127.0.0.1"}, (), None),
        # A trusted proxy: the last address that no trusted proxy has.
        (PROXY, {FOR: "203.0.113.5"}, (PROXY,), "203.0.113.5"),
        (PROXY, {FOR: "127.0.0.1, 203.0.113.5"}, (PROXY,), "203.0.113.5"),
        (PROXY, {FOR: "127.0.0.1, 203.0.113.5, 10.0.0.9"}, ("10.0.0.0/24",), "203.0.113.5"),
        (PROXY, {FOR: "203.0.113.5"}, ("10.0.0.8",), PROXY),
        (PROXY, {FOR: "[2001:db8::1]:4711"}, (PROXY,), "2001:db8::1"),
        (PROXY, {FOR: "203.0.113.5:4711"}, (PROXY,), "203.0.113.5"),
        (PROXY, {"Forwarded": 'for="[2001:db8::1]:4711";proto=https'}, (PROXY,), "2001:db8::1"),
        (PROXY, {"Forwarded": "for=127.0.0.1, for=203.0.113.5;by=x"}, (PROXY,), "203.0.113.5"),
        # A proxy that says nothing, nonsense, or two things that differ: the address is not known.
        ("127.0.0.1", {}, ("127.0.0.1",), None),
        (PROXY, {FOR: "unknown"}, (PROXY,), None),
        (PROXY, {FOR: ""}, (PROXY,), None),
        (PROXY, {"Forwarded": "by=x"}, (PROXY,), None),
        (PROXY, {FOR: "203.0.113.5", "Forwarded": "for=127.0.0.1"}, (PROXY,), None),
        (PROXY, {FOR: "1.1.1.1," * 1000}, (PROXY,), None),
        (PROXY, {FOR: "x" * 100_000}, (PROXY,), None),
        ("127.0.0.1", {FOR: "203.0.113.5"}, ("127.0.0.0/8",), "203.0.113.5"),
    ],
)
def test_the_address_of_the_client(
    peer: str, headers: dict[str, str], proxies: tuple[str, ...], client: str | None
) -> None:
    assert resolved(peer, headers, *proxies)[0] == client


@pytest.mark.parametrize(
    ("peer", "given", "scheme"),
    [
        (PROXY, "https", "https"),
        (PROXY, "http, https", "https"),
        (PROXY, "gopher", "http"),
        ("10.0.0.8", "https", "http"),
    ],
)
def test_the_scheme_is_believed_from_trusted_proxies_only(peer: str, given: str, scheme: str) -> None:
    assert resolved(peer, {"X-Forwarded-Proto": given, FOR: "203.0.113.5"}, PROXY)[1] == scheme


@pytest.mark.parametrize("wrong", ["proxy.example.com", "10.0.0.0/33", "10.0.0.1/24", "*", ""])
def test_proxies_are_addresses_or_networks(wrong: str) -> None:
    with pytest.raises(InvalidSettings, match=r"no address and no network"):
        load(environment={"ARRIERO_API__TRUSTED_PROXIES": f'["{wrong}"]'})
