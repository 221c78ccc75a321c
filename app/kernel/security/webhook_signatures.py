"""
Signatures of web hooks: those of Standard Webhooks (https://www.standardwebhooks.com), and HMAC-SHA256 in hexadecimal.

Signatures are compared in constant time. Nothing here reads a clock or a secret: the caller passes both.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from datetime import datetime, timedelta

#: The prefix of a secret in base64, and the fewest bytes of a secret.
PREFIX, SHORTEST = "whsec_", 24
#: Most signatures of one message; senders give two while they change a secret.
_MAX_SIGNATURES = 8


class UnusableSecret(ValueError):
    """A secret cannot sign."""


class WrongSignature(Exception):
    """A message is not signed as it must be, with the reason."""


def sign(secret: str, id_: str, timestamp: int, body: bytes) -> str:
    """Return the value of `webhook-signature`. Raises UnusableSecret."""
    return f"v1,{base64.b64encode(_digest(_key(secret), id_, timestamp, body)).decode()}"


def verify(
    secret: str, id_: str, timestamp: str, signatures: str, body: bytes, now: datetime, tolerance: timedelta
) -> None:
    """Check the three headers of a message. Raises WrongSignature, UnusableSecret."""
    key = _key(secret)
    if not id_ or not timestamp or not signatures:
        raise WrongSignature("webhook-id, webhook-timestamp and webhook-signature are needed")
    if not (timestamp.isascii() and timestamp.isdigit() and len(timestamp) <= 12):
        raise WrongSignature("webhook-timestamp is not a number of seconds")
    if abs(now.timestamp() - int(timestamp)) > tolerance.total_seconds():
        raise WrongSignature(f"webhook-timestamp is more than {tolerance.total_seconds():g} s from now")
    expected = _digest(key, id_, int(timestamp), body)
    found = False
    for one in signatures.split(" ", _MAX_SIGNATURES)[:_MAX_SIGNATURES]:
        version, _, given = one.partition(",")
        if version == "v1":
            found |= hmac.compare_digest(_decoded(given), expected)
    if not found:
        raise WrongSignature("no signature is that of this message")


def verify_hexadecimal(secret: str, header: str, body: bytes) -> None:
    """Check a header `sha256=…` over the whole body, such as `X-Hub-Signature-256`. Raises WrongSignature."""
    expected = f"sha256={hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()}"
    if not hmac.compare_digest(header.strip().lower().encode(errors="replace"), expected.encode()):
        raise WrongSignature("the signature is not that of this message")


def _key(secret: str) -> bytes:
    key = secret.encode()
    if secret.startswith(PREFIX):
        try:
            key = base64.b64decode(secret.removeprefix(PREFIX), validate=True)
        except (binascii.Error, ValueError):
            raise UnusableSecret(f"the secret begins with {PREFIX} and is not base64 after it") from None
    if len(key) < SHORTEST:
        raise UnusableSecret(f"the secret has {len(key)} bytes; at least {SHORTEST} are needed to sign")
    return key


def _digest(key: bytes, id_: str, timestamp: int, body: bytes) -> bytes:
    return hmac.new(key, f"{id_}.{timestamp}.".encode(errors="replace") + body, hashlib.sha256).digest()


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return b""
