"""
Ids: UUIDs of version 7 (RFC 9562, section 5.7), which sort by the time of their creation.

Rows that are written together are adjacent in an index, and a list by id is a list by age.
All randomness of ids, API keys, passwords of embedded servers and jitter comes from here.
"""

from __future__ import annotations

import secrets
import string
import time
from datetime import datetime
from uuid import UUID


def new_id() -> UUID:
    """Return a new id: 48 bits of Unix time in milliseconds, 74 random bits."""
    milliseconds = time.time_ns() // 1_000_000
    value = (milliseconds & (1 << 48) - 1) << 80 | secrets.randbits(80)
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return UUID(int=value)


def first_of(at: datetime) -> UUID:
    """Return the least id that can be made at this instant or later, by the same clock."""
    milliseconds = min(max(int(at.timestamp() * 1000), 0), (1 << 48) - 1)
    return UUID(int=milliseconds << 80)


def new_secret() -> str:
    """Return a password for an embedded server: 192 random bits, safe in URLs and configuration files."""
    return secrets.token_urlsafe(24)


def new_salt() -> bytes:
    """Return 16 random bytes, for the verifier of a password."""
    return secrets.token_bytes(16)


def new_text(characters: int, *, lower_case: bool = False) -> str:
    """Return random letters and digits: almost 6 bits a character, or 5.2 in lower case."""
    letters = string.ascii_lowercase if lower_case else string.ascii_letters
    return "".join(secrets.choice(string.digits + letters) for _ in range(characters))


def chance() -> float:
    """Return a uniformly distributed random number from [0, 1), for jitter."""
    return secrets.randbits(53) / (1 << 53)
