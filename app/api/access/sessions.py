"""
Sessions of the dashboard: who has logged in, in the broker's memory.

A session belongs to one secret of one API key. It is checked like a request with that key, so it ends when the key is
revoked, expires or is rotated away. Neither the key nor the id of a session is stored: only their hashes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import timedelta

from app.access import keys
from app.kernel import ids
from app.kernel.broker import CeleryPublisher

#: A session that nobody uses ends after this time.
IDLE = timedelta(hours=12)
#: Characters of the id of a session.
_CHARACTERS = 43
_PREFIX = "arriero:session:"


@dataclass(frozen=True, slots=True)
class Session:
    """Who has logged in: the key, by its id, and the hash of the secret with which they did."""

    key_id: str
    key_hash: bytes


def start(publisher: CeleryPublisher, key: str) -> str:
    """Return the id of a new session of a valid key. Raises Unavailable."""
    key_id = keys.id_of(key)
    assert key_id is not None, "the key was checked"
    made = ids.new_text(_CHARACTERS)
    with publisher.connection() as client:
        client.set(_place(made), f"{key_id} {keys.hash_of(key).hex()}", ex=IDLE)
    return made


def find(publisher: CeleryPublisher, session: str) -> Session | None:
    """Return a session that has not ended, and begin its idle time again. Raises Unavailable."""
    if len(session) != _CHARACTERS or not session.isascii():
        return None
    with publisher.connection() as client:
        found = client.getex(_place(session), ex=IDLE)
    if not isinstance(found, bytes | str):
        return None
    key_id, _, key_hash = (found.decode() if isinstance(found, bytes) else found).partition(" ")
    return Session(key_id, bytes.fromhex(key_hash))


def end(publisher: CeleryPublisher, session: str) -> None:
    """End a session. Raises Unavailable."""
    with publisher.connection() as client:
        client.delete(_place(session))


def token_of(session: str) -> str:
    """Return what a change in a session must bring beside its cookie: only pages of the dashboard know it."""
    return hashlib.sha256(f"arriero change {session}".encode()).hexdigest()[:40]


def _place(session: str) -> str:
    return _PREFIX + hashlib.sha256(session.encode()).hexdigest()
