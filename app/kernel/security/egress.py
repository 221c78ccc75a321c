"""
Egress: which servers outside this process may call, and at which addresses.

A host is refused unless a rule lists it. Listed or not, an address is refused unless it is public; private networks and
this machine itself can be allowed, addresses that stand for no server of anybody's cannot.
A refusal is a text that says why, and which setting would change it.

Nothing here resolves a name or opens a connection.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

#: What messages tell people to write.
ACCEPTED = "a host, as 'api.example.com', '*.example.com' for all names below it, or either with a port, as 'db:8080'"

#: The ports of a rule that names none.
PORTS = {"http": 80, "https": 443}

_LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*")
_RULE = re.compile(r"(?P<below>\*\.)?(?P<host>\[[^\]]+\]|[^:\[\]]+)(:(?P<port>\d{1,5}))?")

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class EgressRule:
    """A host that may be called, or all names below one."""

    host: str
    below: bool = False
    #: None stands for the port of the scheme.
    port: int | None = None

    def admits(self, scheme: str, host: str, port: int) -> bool:
        """Whether the rule lists that place."""
        named = host.endswith(f".{self.host}") if self.below else host == self.host
        return named and port == (PORTS[scheme] if self.port is None else self.port)


def rule(text: str) -> EgressRule:
    """The rule that a text writes. Raises ValueError."""
    found = _RULE.fullmatch(text.strip().lower())
    if found is None:
        raise ValueError(f"{text!r} is no host: write {ACCEPTED}")
    name, port = host(found["host"]), int(found["port"] or 0)
    wildcard_address = found["below"] and _address(name or "") is not None
    if name is None or wildcard_address or (found["port"] and not 1 <= port <= 65535):
        raise ValueError(f"{text!r} is no host: write {ACCEPTED}")
    return EgressRule(name, bool(found["below"]), port or None)


def host(text: str) -> str | None:
    """A host's name or address as it is compared and connected to: lower-case, without brackets; None for others."""
    name = text.lower().removesuffix(".")
    if name.startswith("[") and name.endswith("]"):
        name = name[1:-1]
    address = _address(name)
    if address is not None:
        return str(address)
    return name if len(name) <= 253 and _NAME.fullmatch(name) else None


@dataclass(frozen=True, slots=True)
class EgressPolicy:
    """What may be called."""

    rules: tuple[EgressRule, ...] = ()
    allow_private: bool = False

    @classmethod
    def of(cls, allowed: Sequence[str], *, allow_private: bool) -> EgressPolicy:
        """The policy that the settings write. Raises ValueError."""
        return cls(tuple(rule(text) for text in allowed), allow_private)

    def refuse_host(self, scheme: str, host: str, port: int) -> str | None:
        """Why a host may not be called, or None."""
        if any(one.admits(scheme, host, port) for one in self.rules):
            return None
        place = f"[{host}]" if ":" in host else host
        wanted = place if port == PORTS[scheme] else f"{place}:{port}"
        return f"the setting http.allowed_hosts does not list '{wanted}'"

    def refuse_address(self, host: str, address: str) -> str | None:
        """Why an address, which `host` has led to, may not be connected to, or None."""
        found = _kind(ipaddress.ip_address(address))
        if found is None or (found.private and self.allow_private):
            return None
        leads = "" if host == address else f"{host} leads to "
        hint = "; the setting http.allow_private would allow it" if found.private else ""
        return f"{leads}{address}, {found.what}{hint}"


@dataclass(frozen=True, slots=True)
class _Kind:
    network: _Network
    #: As it stands in messages.
    what: str
    #: It can be allowed.
    private: bool = False


def _kinds(what: str, *networks: str, private: bool = False) -> list[_Kind]:
    return [_Kind(ipaddress.ip_network(network), what, private) for network in networks]


#: The first that holds an address counts. IANA's registries of special-purpose addresses (RFC 6890), and the addresses
#: at which clouds tell a machine its credentials.
_KINDS = (
    *_kinds("this machine itself", "127.0.0.0/8", "::1/128", private=True),
    *_kinds(
        "the metadata service of a cloud",
        *("169.254.169.254/32", "169.254.170.2/32", "169.254.170.23/32", "100.100.100.200/32", "168.63.129.16/32"),
        *("192.0.0.192/32", "fd00:ec2::254/128", "fd00:ec2::23/128", "fd20:ce::254/128"),
    ),
    *_kinds("a link-local address", "169.254.0.0/16", "fe80::/10"),
    *_kinds("no address of a server", "0.0.0.0/8", "::/128", "240.0.0.0/4"),
    *_kinds("a multicast address", "224.0.0.0/4", "ff00::/8"),
    *_kinds(
        "a private address",
        *("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "198.18.0.0/15", "fc00::/7", "fec0::/10"),
        private=True,
    ),
    *_kinds("an address shared by a carrier's customers", "100.64.0.0/10", private=True),
    *_kinds(
        "a form that hides another address",
        *("::ffff:0:0/96", "::ffff:0:0:0/96", "::/96", "64:ff9b:1::/48", "2001::/32", "2002::/16"),
    ),
    *_kinds("an address for documentation", "192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24"),
    *_kinds("an address for documentation", "2001:db8::/32", "3fff::/20"),
)

#: Where IPv6 has its public addresses.
_GLOBAL = ipaddress.IPv6Network("2000::/3")
#: NAT64 (RFC 6052): the last 32 bits are an address of IPv4, and a gateway goes there. Machines that have IPv6 alone
#: reach all others by it, so the inner address decides.
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def _kind(address: _Address) -> _Kind | None:
    """What keeps an address from being public, or None."""
    if address in _NAT64:
        inner = _kind(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        return None if inner is None else _Kind(_NAT64, f"by NAT64 {inner.what}")
    for kind in _KINDS:
        if address in kind.network:
            return kind
    public = address.is_global and (address.version == 4 or address in _GLOBAL)
    return None if public else _Kind(ipaddress.ip_network(address), "not a public address")


def _address(text: str) -> _Address | None:
    """The address that a text writes; one with a zone (`%eth0`) means something on one machine only, and is none."""
    try:
        return None if "%" in text else ipaddress.ip_address(text)
    except ValueError:
        return None
