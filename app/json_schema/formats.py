"""Formats: what texts of a format look like, for those that can be checked without doubt. Each check is linear."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from datetime import date
from uuid import UUID

from app.kernel.security import regex

#: Characters of the longest text that an address, a date or a UUID can be.
_LONGEST = 64
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)
_UUID = re.compile(r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")


def _made(make: Callable[[str], object]) -> Callable[[str], bool]:
    def check(text: str) -> bool:
        try:
            make(text)
        except ValueError:
            return False
        return True

    return check


def _address_6(text: str) -> bool:
    return not ipaddress.IPv6Address(text).scope_id


def _short(check: Callable[[str], bool]) -> Callable[[str], bool]:
    return lambda text: len(text) <= _LONGEST and check(text)


#: The formats that are checked. The others of the draft are annotations.
CHECKS: Mapping[str, Callable[[str], bool]] = {
    "date": _short(lambda text: bool(_DATE.fullmatch(text)) and _made(date.fromisoformat)(text)),
    "email": lambda text: "@" in text,
    "idn-email": lambda text: "@" in text,
    "ipv4": _short(_made(ipaddress.IPv4Address)),
    "ipv6": _short(lambda text: _made(ipaddress.IPv6Address)(text) and _address_6(text)),
    "regex": _made(regex.compiled),
    "uuid": _short(lambda text: bool(_UUID.fullmatch(text)) and _made(UUID)(text)),
}
