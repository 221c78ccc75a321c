"""Format checks, for formats that can be checked unambiguously. Each check runs in linear time."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from datetime import date
from uuid import UUID

from app.kernel.security import regex

#: Maximum characters of an address, a date or a UUID.
_MAX_CHARACTERS = 64
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)
_UUID = re.compile(r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")


def _accepts(make: Callable[[str], object]) -> Callable[[str], bool]:
    def check(text: str) -> bool:
        try:
            make(text)
        except ValueError:
            return False
        return True

    return check


def _has_no_scope(text: str) -> bool:
    return not ipaddress.IPv6Address(text).scope_id


def _bounded(check: Callable[[str], bool]) -> Callable[[str], bool]:
    return lambda text: len(text) <= _MAX_CHARACTERS and check(text)


#: The checked formats. The other formats of the draft are annotations.
CHECKS: Mapping[str, Callable[[str], bool]] = {
    "date": _bounded(lambda text: bool(_DATE.fullmatch(text)) and _accepts(date.fromisoformat)(text)),
    "email": lambda text: "@" in text,
    "idn-email": lambda text: "@" in text,
    "ipv4": _bounded(_accepts(ipaddress.IPv4Address)),
    "ipv6": _bounded(lambda text: _accepts(ipaddress.IPv6Address)(text) and _has_no_scope(text)),
    "regex": _accepts(regex.compiled),
    "uuid": _bounded(lambda text: bool(_UUID.fullmatch(text)) and _accepts(UUID)(text)),
}
