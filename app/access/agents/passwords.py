"""
Passwords of roles: Postgres stores a verifier, from which nobody gets the password back.

The verifier is made here (RFC 5803, as Postgres writes it), so that no statement and no log of the server ever has the
password.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re

#: Postgres's own number of iterations.
_ITERATIONS = 4096
#: What a stored verifier looks like: iterations, salt, StoredKey and ServerKey.
FORM = re.compile(r"SCRAM-SHA-256\$[0-9]{1,7}:[A-Za-z0-9+/=]{16,88}\$[A-Za-z0-9+/=]{44}:[A-Za-z0-9+/=]{44}", re.ASCII)
#: Shortest and longest password that an operator may choose, and what it may have: SASLprep leaves these as they are.
MIN_PASSWORD, MAX_PASSWORD = 16, 200
_CHARACTERS = re.compile(r"[!-~]+", re.ASCII)
ACCEPTED = f"{MIN_PASSWORD} to {MAX_PASSWORD} printable ASCII characters without spaces"


def is_valid(password: str) -> bool:
    """Whether a password may be used."""
    return MIN_PASSWORD <= len(password) <= MAX_PASSWORD and _CHARACTERS.fullmatch(password) is not None


def verifier(password: str, salt: bytes) -> str:
    """Return what Postgres stores for a password. `salt` has 16 random bytes."""
    salted = hashlib.pbkdf2_hmac("sha256", password.encode("ascii"), salt, _ITERATIONS)
    stored = hashlib.sha256(_mac(salted, b"Client Key")).digest()
    server = _mac(salted, b"Server Key")
    return f"SCRAM-SHA-256${_ITERATIONS}:{_text(salt)}${_text(stored)}:{_text(server)}"


def _mac(key: bytes, message: bytes) -> bytes:
    return hmac.digest(key, message, "sha256")


def _text(value: bytes) -> str:
    return base64.b64encode(value).decode("ascii")
