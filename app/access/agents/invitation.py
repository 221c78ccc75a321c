"""
Invitations: a token with which one host joins, once.

A token is `join_<id>_<secret>`. The id is public; the secret has 256 random bits and is shown once. Only the SHA-256 of
the token is stored. It expires, is used by one host, and may name that host.

Nothing here reads a database, a clock or chance.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass
from datetime import datetime, timedelta

#: Characters of the public id (lower case and digits), and of the secret (base62, 256 bits).
ID_CHARACTERS, SECRET_CHARACTERS = 10, 43
#: Longest time until a token expires, and the default.
MAX_LIFETIME, LIFETIME = timedelta(days=7), timedelta(hours=1)
#: The names of hosts that can be invited.
HOST = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
#: Characters of a token.
TOKEN_CHARACTERS = len("join__") + ID_CHARACTERS + SECRET_CHARACTERS

_FORM = re.compile(rf"join_([0-9a-z]{{{ID_CHARACTERS}}})_[0-9A-Za-z]{{{SECRET_CHARACTERS}}}", re.ASCII)
#: Compared with a token whose id is unknown, so that it takes as long as one with a wrong secret.
_NO_HASH = bytes(32)


@dataclass(frozen=True, slots=True)
class Invitation:
    """An invitation as it is listed: without its token."""

    id: str
    #: The only host that may use it; None: a host that is new.
    host: str | None
    created_at: datetime
    created_by: str
    expires_at: datetime
    used_at: datetime | None
    #: The host that used it.
    used_by: str | None


def compose(id_: str, secret: str) -> str:
    """Return a token."""
    return f"join_{id_}_{secret}"


def id_of(token: str) -> str | None:
    """Return the public id in a text that has the form of a token, or None."""
    found = _FORM.fullmatch(token)
    return found and found[1]


def hash_of(token: str) -> bytes:
    """Return what is stored of a token: its SHA-256."""
    return hashlib.sha256(token.encode()).digest()


def is_genuine(token: str, stored: bytes | None) -> bool:
    """Whether a token is the one whose hash is stored, in constant time; None is stored for an unknown id."""
    return hmac.compare_digest(hash_of(token), _NO_HASH if stored is None else stored)
