"""Egress rules: listed hosts, and addresses to which no host may resolve."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.kernel.security import egress
from app.kernel.security.egress import EgressPolicy

LISTED = ("api.example.com", "*.example.org", "db.internal:8080", "*.pods:9000", "10.0.0.5", "[fd00::5]:99")


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        (("https", "api.example.com", 443), True),
        (("http", "api.example.com", 80), True),
        (("https", "api.example.com", 8443), False),
        (("http", "api.example.com", 443), False),
        (("https", "x.api.example.com", 443), False),
        (("https", "api.example.com.evil.net", 443), False),
        (("https", "a.b.example.org", 443), True),
        (("https", "example.org", 443), False),
        (("https", "evilexample.org", 443), False),
        (("https", "db.internal", 8080), True),
        (("https", "db.internal", 443), False),
        (("http", "a.pods", 9000), True),
        (("http", "10.0.0.5", 80), True),
        (("http", "fd00::5", 99), True),
    ],
)
def test_hosts_are_called_only_when_listed(url: tuple[str, str, int], allowed: bool) -> None:
    refusal = EgressPolicy.of(LISTED, allow_private=False).refuse_host(*url)

    assert (refusal is None) is allowed
    if refusal is not None:
        assert refusal.startswith("the setting http.allowed_hosts does not list '")


def test_a_refusal_names_the_rule_that_would_allow_it() -> None:
    for scheme, host, port in (("https", "a.b", 443), ("https", "a.b", 80), ("http", "::1", 8080)):
        refusal = EgressPolicy().refuse_host(scheme, host, port)
        assert refusal is not None
        assert EgressPolicy.of([refusal.split("'")[1]], allow_private=False).refuse_host(scheme, host, port) is None


@pytest.mark.parametrize(
    "text", ["", "*", "*.", "*.*.x", "https://a.b", "a.b/c", "a b", "a*b.c", "*.10.0.0.1", "a:0", "a:70000", "[::g]"]
)
def test_invalid_rules_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a host: write"):
        egress.rule(text)


PRIVATE = (
    *("127.0.0.1", "127.255.255.254", "::1", "10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.0.1"),
    *("100.64.0.1", "198.18.0.1", "fc00::1", "fdff::1", "fec0::1"),
)
NEVER = (
    *("0.0.0.0", "0.1.2.3", "::", "255.255.255.255", "240.0.0.1", "224.0.0.1", "ff02::1", "169.254.1.1", "fe80::1"),
    *("fe80::1%eth0", "169.254.169.254", "169.254.170.2", "100.100.100.200", "168.63.129.16", "fd00:ec2::254"),
    *("::ffff:127.0.0.1", "::ffff:8.8.8.8", "::ffff:0:8.8.8.8", "::7f00:1", "2002:7f00:1::1", "2001:0:1::1"),
    *("64:ff9b::7f00:1", "64:ff9b::a00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::808:808", "192.0.2.1", "2001:db8::1"),
    *("100::1", "4000::1"),
)
PUBLIC = ("8.8.8.8", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "64:ff9b::808:808")


def test_addresses_are_public_private_or_always_refused() -> None:
    strict, lenient = EgressPolicy(), EgressPolicy(allow_private=True)

    assert [one for one in PUBLIC if strict.refuse_address("h", one)] == []
    assert [one for one in PRIVATE if lenient.refuse_address("h", one)] == []
    assert [one for one in PRIVATE if "http.allow_private" not in (strict.refuse_address("h", one) or "")] == []
    assert [one for one in NEVER if not lenient.refuse_address("h", one)] == []
    assert [one for one in NEVER if "http.allow_private" in (strict.refuse_address("h", one) or "")] == []


@given(st.ip_addresses())
def test_only_global_addresses_are_accepted(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    if EgressPolicy().refuse_address("h", str(address)) is None:
        inner = ipaddress.ip_address(int(address) & 0xFFFFFFFF) if str(address).startswith("64:ff9b::") else address
        assert inner.is_global
        assert not inner.is_multicast


def test_hosts_are_normalised() -> None:
    assert egress.host("API.Example.COM.") == "api.example.com"
    assert egress.host("[2001:DB8:0:0::1]") == "2001:db8::1"
    assert [
        one for one in ("a..b", "-a", "a@b", "a\\b", "%31", "bücher.de", "a" * 64, "fd00::1%1") if egress.host(one)
    ] == []
