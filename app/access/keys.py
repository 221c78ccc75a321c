"""
API keys: their form, their hashes, and what a stored one allows.

A key is `arr_<id>_<secret>`. The id is public: lists, logs and answers show it. The secret has 256 random bits and is
shown once; only the SHA-256 of the whole key is stored, which needs no salt because nobody can guess a key.
After a rotation the old secret works for an overlap; both are compared in constant time.

Nothing here reads a database, a clock or chance.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from app.access import namespaces
from app.access.callers import Caller, KeyScope
from app.kernel.errors import InvalidInput, Problem

#: What every key begins with. Other bearer tokens are not keys of Arriero.
PREFIX = "arr_"
#: Characters of the public id (lower case and digits, 51 bits), and of the secret (base62, 256 bits).
ID_CHARACTERS, SECRET_CHARACTERS = 10, 43
#: Most characters of the name of a key, and its longest lifetime.
MAX_NAME, MAX_LIFETIME = 100, timedelta(days=36_500)

_FORM = re.compile(rf"{PREFIX}([0-9a-z]{{{ID_CHARACTERS}}})_[0-9A-Za-z]{{{SECRET_CHARACTERS}}}", re.ASCII)
#: Compared with the key of a request whose id is unknown, so that it takes as long as one with a wrong secret.
_NO_HASH = bytes(32)


def compose(key_id: str, secret: str) -> str:
    """Return a key."""
    return f"{PREFIX}{key_id}_{secret}"


def without_secrets(text: str) -> str:
    """Return a text in which each key has no secret any more."""
    return _FORM.sub(rf"{PREFIX}\g<1>_***", text)


def id_of(key: str) -> str | None:
    """Return the public id in a text that has the form of a key, or None."""
    match = _FORM.fullmatch(key)
    return match and match[1]


def hash_of(key: str) -> bytes:
    """Return what is stored of a key: its SHA-256."""
    return hashlib.sha256(key.encode()).digest()


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as it is listed: everything but its secret."""

    #: The public part of the key.
    id: str
    name: str
    #: The only namespace for which it acts; None for all of them.
    namespace: str | None
    scopes: frozenset[KeyScope]
    created_at: datetime
    #: The name of the caller who created it.
    created_by: str
    #: None: it never expires.
    expires_at: datetime | None
    revoked_at: datetime | None
    revoked_by: str | None
    rotated_at: datetime | None
    #: Until then the secret from before the last rotation works too.
    overlap_until: datetime | None
    #: When it was used last; written at most once a minute.
    used_at: datetime | None
    #: When the secret from before the last rotation was used last.
    previous_used_at: datetime | None


@dataclass(frozen=True, slots=True)
class StoredSecrets:
    """What is needed to check a key, as the database said when it was read. Spans are in seconds from then on."""

    caller: Caller
    current: bytes
    previous: bytes | None
    revoked: bool
    #: None: it never expires.
    expires_in: float | None
    overlap_ends_in: float | None
    #: Age of the last use that is written, of any secret and of the previous one; None: never used.
    used_ago: float | None
    previous_used_ago: float | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a key is valid."""

    #: None for a valid key; otherwise why it is refused.
    refusal: str | None
    #: The key has the secret from before the last rotation.
    is_previous: bool = False


#: The refusal of unknown ids and of wrong secrets. The two are not told apart.
UNKNOWN = "the API key is not valid"


def verify(given: bytes, stored: StoredSecrets | None, age: float) -> Verdict:
    """
    Check the hash of a key against what was stored `age` seconds ago.

    Only who knows the secret learns whether its key is revoked or expired.
    """
    current = _NO_HASH if stored is None else stored.current
    previous = _NO_HASH if stored is None or stored.previous is None else stored.previous
    is_current, is_previous = hmac.compare_digest(given, current), hmac.compare_digest(given, previous)
    is_previous = is_previous and stored is not None and stored.previous is not None
    if stored is None or not (is_current or is_previous):
        return Verdict(UNKNOWN)
    if stored.revoked:
        return Verdict(f"the API key {stored.caller.name!r} is revoked")
    if is_previous and not is_current and (stored.overlap_ends_in is None or stored.overlap_ends_in <= age):
        return Verdict(f"the API key {stored.caller.name!r} was rotated, and this is its old secret")
    if stored.expires_in is not None and stored.expires_in <= age:
        return Verdict(f"the API key {stored.caller.name!r} has expired")
    return Verdict(None, is_previous=not is_current)


@dataclass(frozen=True, slots=True)
class NewKey:
    """What a key is created with, checked against the caller who creates it."""

    name: str
    #: None: all namespaces.
    namespace: str | None
    scopes: frozenset[KeyScope]
    #: None: it never expires.
    lifetime: timedelta | None

    @classmethod
    def by(
        cls,
        caller: Caller,
        name: str,
        namespace: str | None,
        scopes: Iterable[KeyScope],
        lifetime: timedelta | None,
    ) -> NewKey:
        """
        Return what the caller may create. Without a namespace it is that of the caller.

        Raises InvalidInput, with every problem: nobody gives a key more than they have.
        """
        found = []
        if not 0 < len(name) <= MAX_NAME or not name.isprintable():
            accepted = f"1 to {MAX_NAME} characters without control characters"
            found.append(Problem("name", "the name of a key is empty, too long or not printable", accepted))
        if namespace is not None and not namespaces.is_valid(namespace):
            found.append(Problem("namespace", f"{namespace!r} is not a valid name", namespaces.ACCEPTED))
        elif caller.namespace is not None and namespace not in (None, caller.namespace):
            found.append(Problem("namespace", f"{namespace!r} is not that of your own key", caller.namespace))
        if lifetime is not None and not timedelta(seconds=1) <= lifetime <= MAX_LIFETIME:
            found.append(Problem("expires_in", "the lifetime of a key is out of range", "1s to 36500d"))
        scopes = frozenset(scopes)
        found += _lacking(caller, scopes)
        if not scopes:
            found.append(Problem("scopes", "a key needs a scope", ", ".join(sorted(caller.scopes))))
        if found:
            raise InvalidInput(found, "key")
        return cls(name, namespace if caller.namespace is None else caller.namespace, scopes, lifetime)


def require_may_rotate(caller: Caller, key: ApiKey) -> None:
    """Raise InvalidInput for a key with scopes that the caller lacks: who rotates a key gets its secret."""
    found = _lacking(caller, key.scopes)
    if found:
        raise InvalidInput(found, "key")


def _lacking(caller: Caller, scopes: frozenset[KeyScope]) -> list[Problem]:
    lacking = sorted(scopes - caller.scopes)
    message = f"{', '.join(lacking)}: your own key lacks this, and nobody gives more than they have"
    return [Problem("scopes", message, ", ".join(sorted(caller.scopes)))] if lacking else []
