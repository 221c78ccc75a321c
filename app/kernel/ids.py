"""
Ids: UUIDs of version 7 (RFC 9562, section 5.7), which sort by the time of their making.

Rows written together lie together in an index, and a list by id is a list by age.
The only reader of the system's randomness besides the secrets of embedded servers.
"""

from __future__ import annotations

import secrets
import time
from uuid import UUID


def new_id() -> UUID:
    """A fresh id: 48 bits of Unix time in milliseconds, 74 random bits."""
    milliseconds = time.time_ns() // 1_000_000
    value = (milliseconds & (1 << 48) - 1) << 80 | secrets.randbits(80)
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return UUID(int=value)


def new_secret() -> str:
    """A password for an embedded server: 192 random bits, safe in URLs and configuration files."""
    return secrets.token_urlsafe(24)


def chance() -> float:
    """A number drawn evenly from [0, 1), for jitter."""
    return secrets.randbits(53) / (1 << 53)
