"""
Egress rules: the servers that `http` steps may call, by host and by address.

A host is refused unless a rule lists it. An address is refused unless it is public, even when its host is listed.
Private networks and this machine can be allowed; reserved addresses cannot, such as multicast and link-local ones.
A refusal is a text with the reason, and with the setting that would change it.

Nothing here resolves a name or opens a connection.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

#: The accepted formats, for error messages.
ACCEPTED = "a host such as 'api.example.com' or '*.example.com' (all its subdomains), optionally with a port: 'db:8080'"

#: The ports of a rule without a port, by scheme.
PORTS = {"http": 80, "https": 443}

_LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*")
_RULE = re.compile(r"(?P<wildcard>\*\.)?(?P<host>\[[^\]]+\]|[^:\[\]]+)(:(?P<port>\d{1,5}))?")

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class EgressRule:
    """A host that may be called, or all subdomains of one."""

    host: str
    #: The rule is for the subdomains of `host`, without `host` itself.
    subdomains: bool = False
    #: None means the default port of the scheme.
    port: int | None = None

    def matches(self, scheme: str, host: str, port: int) -> bool:
        """Whether the rule lists this host and port."""
        listed = host.endswith(f".{self.host}") if self.subdomains else host == self.host
        return listed and port == (PORTS[scheme] if self.port is None else self.port)


def rule(text: str) -> EgressRule:
    """Parse a rule. Raises ValueError."""
    found = _RULE.fullmatch(text.strip().lower())
    if found is None:
        raise ValueError(f"{text!r} is not a host: write {ACCEPTED}")
    name, port = host(found["host"]), int(found["port"] or 0)
    wildcard_address = found["wildcard"] and _address(name or "") is not None
    if name is None or wildcard_address or (found["port"] and not 1 <= port <= 65535):
        raise ValueError(f"{text!r} is not a host: write {ACCEPTED}")
    return EgressRule(name, bool(found["wildcard"]), port or None)


def host(text: str) -> str | None:
    """Return the normalised name or address of a host: lower-case, without brackets; None when it is not valid."""
    name = text.lower().removesuffix(".")
    if name.startswith("[") and name.endswith("]"):
        name = name[1:-1]
    address = _address(name)
    if address is not None:
        return str(address)
    return name if len(name) <= 253 and _NAME.fullmatch(name) else None


@dataclass(frozen=True, slots=True)
class EgressPolicy:
    """The rules of an installation."""

    rules: tuple[EgressRule, ...] = ()
    allow_private: bool = False

    @classmethod
    def of(cls, allowed: Sequence[str], *, allow_private: bool) -> EgressPolicy:
        """Return the policy of the settings. Raises ValueError."""
        return cls(tuple(rule(text) for text in allowed), allow_private)

    def refuse_host(self, scheme: str, host: str, port: int) -> str | None:
        """Return why a host may not be called, or None."""
        if any(one.matches(scheme, host, port) for one in self.rules):
            return None
        place = f"[{host}]" if ":" in host else host
        missing = place if port == PORTS[scheme] else f"{place}:{port}"
        return f"the setting http.allowed_hosts does not list '{missing}'"

    def refuse_address(self, host: str, address: str) -> str | None:
        """Return why an address of `host` may not be connected to, or None."""
        found = _blocked_range(ipaddress.ip_address(address))
        if found is None or (found.private and self.allow_private):
            return None
        resolved = "" if host == address else f"{host} resolves to "
        hint = "; the setting http.allow_private would allow it" if found.private else ""
        return f"{resolved}{address}, {found.description}{hint}"


@dataclass(frozen=True, slots=True)
class _BlockedRange:
    network: _Network
    #: For messages.
    description: str
    #: The setting http.allow_private allows it.
    private: bool = False


def _ranges(description: str, *networks: str, private: bool = False) -> list[_BlockedRange]:
    return [_BlockedRange(ipaddress.ip_network(network), description, private) for network in networks]


#: Ranges that are not public; the first one that contains an address decides. From IANA's registries of special-purpose
#: addresses (RFC 6890), and the addresses of the metadata services from which cloud machines get their credentials.
_BLOCKED_RANGES = (
    *_ranges("this machine itself", "127.0.0.0/8", "::1/128", private=True),
    *_ranges(
        "the metadata service of a cloud",
        *("169.254.169.254/32", "169.254.170.2/32", "169.254.170.23/32", "100.100.100.200/32", "168.63.129.16/32"),
        *("192.0.0.192/32", "fd00:ec2::254/128", "fd00:ec2::23/128", "fd20:ce::254/128"),
    ),
    *_ranges("a link-local address", "169.254.0.0/16", "fe80::/10"),
    *_ranges("not an address of a server", "0.0.0.0/8", "::/128", "240.0.0.0/4"),
    *_ranges("a multicast address", "224.0.0.0/4", "ff00::/8"),
    *_ranges(
        "a private address",
        *("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "198.18.0.0/15", "fc00::/7", "fec0::/10"),
        private=True,
    ),
    *_ranges("an address shared by a carrier's customers", "100.64.0.0/10", private=True),
    *_ranges(
        "a form that hides another address",
        *("::ffff:0:0/96", "::ffff:0:0:0/96", "::/96", "64:ff9b:1::/48", "2001::/32", "2002::/16"),
    ),
    *_ranges("an address for documentation", "192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24"),
    *_ranges("an address for documentation", "2001:db8::/32", "3fff::/20"),
)

#: The range of public IPv6 addresses.
_GLOBAL = ipaddress.IPv6Network("2000::/3")
#: NAT64 (RFC 6052): the last 32 bits are an IPv4 address, to which a gateway forwards. Machines that have only IPv6
#: reach all IPv4 servers in this way, so the inner address decides.
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def _blocked_range(address: _Address) -> _BlockedRange | None:
    """Return the range that makes an address not public, or None."""
    if address in _NAT64:
        inner = _blocked_range(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        return None if inner is None else _BlockedRange(_NAT64, f"{inner.description} behind NAT64")
    for blocked in _BLOCKED_RANGES:
        if address in blocked.network:
            return blocked
    public = address.is_global and (address.version == 4 or address in _GLOBAL)
    return None if public else _BlockedRange(ipaddress.ip_network(address), "not a public address")


def _address(text: str) -> _Address | None:
    """Parse an address, or return None. An address with a zone (`%eth0`) is local to one machine and not accepted."""
    try:
        return None if "%" in text else ipaddress.ip_address(text)
    except ValueError:
        return None
