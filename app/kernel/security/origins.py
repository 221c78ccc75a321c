"""
Origins of web pages, and networks of proxies, as the settings name them.

An origin is exact: a scheme, a host, and a port that is not the scheme's own. There are no wildcards, so that no list
admits every site by mistake.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated

from pydantic import AfterValidator

_ORIGIN = re.compile(
    r"(?P<scheme>https?)://(?P<host>[a-z0-9_]([a-z0-9_.-]{0,251}[a-z0-9_])?|\[[0-9a-f:.]{2,45}\])(:(?P<port>[0-9]{1,5}))?",
    re.ASCII,
)
_PORTS = {"http": "80", "https": "443"}

IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network


def page_origin(text: str) -> str:
    """Return an origin as browsers send it. Raises ValueError."""
    found = _ORIGIN.fullmatch(text.strip().lower().removesuffix("/"))
    if found is None or int(found["port"] or 1) not in range(1, 65536):
        raise ValueError(f"{text!r} is not an origin; accepted: scheme and host, such as https://app.example.com:8443")
    port = found["port"]
    is_default = port is None or port == _PORTS[found["scheme"]]
    return f"{found['scheme']}://{found['host']}{'' if is_default else f':{port}'}"


def proxy_network(text: str) -> str:
    """Return an address or a network in normalised form. Raises ValueError."""
    try:
        network = ipaddress.ip_network(text.strip())
    except ValueError:
        accepted = "an address such as 10.0.0.7, or a network such as 10.1.0.0/16"
        raise ValueError(f"{text!r} is no address and no network; accepted: {accepted}") from None
    return str(network.network_address) if network.num_addresses == 1 else str(network)


#: An origin in the settings.
PageOrigin = Annotated[str, AfterValidator(page_origin)]
#: The address or the network of a proxy in the settings.
ProxyNetwork = Annotated[str, AfterValidator(proxy_network)]


def client_address(peer: str, forwarded: Sequence[str], proxies: Sequence[IPNetwork]) -> str | None:
    """
    Return the address of the client of a request.

    `peer` is at the other end of the connection, `forwarded` are the addresses that proxies have noted, the first one
    nearest to the client. They are read from the end, and only as long as trusted proxies have noted them.
    None means that it is not known: a trusted proxy has noted something that is no address.
    """
    address = peer
    for noted in reversed(forwarded):
        if not is_in(address, proxies):
            break
        if _address(noted) is None:
            return None
        address = noted
    return address


def is_in(address: str, networks: Sequence[IPNetwork]) -> bool:
    """Whether the address belongs to one of the networks."""
    found = _address(address)
    return found is not None and any(found in network for network in networks)


def is_loopback(address: str) -> bool:
    """Whether the address is one of this machine alone."""
    found = _address(address)
    return found is not None and found.is_loopback


@lru_cache(maxsize=1024)
def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    if len(text) > 64:
        return None
    try:
        found = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = getattr(found, "ipv4_mapped", None)
    return found if mapped is None else mapped
