"""
Sealing: the encryption of state files with AES-256-GCM, by the package `cryptography`.

Each file has a key of its own, which follows from the key of the installation and the random id of the file. So the
numbers of its parts are its nonces, and no nonce is used twice with a key.
A part that was changed, moved, or sealed with another key is refused.

Nothing here opens a file.
"""

from __future__ import annotations

import hashlib
import importlib
from typing import Any

from app.kernel.errors import Unavailable

#: Bytes that sealing adds to each part.
TAG_BYTES = 16
#: Bytes of a key's id in a header.
KEY_ID_BYTES = 16
_AES_GCM = "cryptography.hazmat.primitives.ciphers.aead"


class SealingKey:
    """The key of an installation, or of one pool until its end."""

    def __init__(self, secret: bytes, *, ephemeral: bool = False) -> None:
        """
        `secret` are bytes of any length that nobody can guess. An ephemeral key is known to this process only.

        Raises Unavailable when the package `cryptography` is not installed.
        """
        try:
            self._cipher: Any = importlib.import_module(_AES_GCM).AESGCM
        except ImportError:
            message = "store_encrypted needs the package cryptography: pip install 'arriero[encryption]'"
            raise Unavailable(message) from None
        self._secret = hashlib.sha256(secret).digest()
        self.ephemeral = ephemeral
        #: Tells whether a file was sealed with this key, and nothing about the key.
        self.id = self._derived(b"arriero kv id")[:KEY_ID_BYTES]

    def of_file(self, file_id: bytes) -> Sealer:
        """Return what seals and opens the parts of one file."""
        return Sealer(self._cipher(self._derived(b"arriero kv file", file_id)))

    def _derived(self, purpose: bytes, salt: bytes = b"") -> bytes:
        return hashlib.blake2b(salt, digest_size=32, key=self._secret, person=purpose.ljust(16, b"\0")[:16]).digest()


class Sealer:
    """Seals and opens the numbered parts of one file."""

    def __init__(self, cipher: Any) -> None:
        self._cipher = cipher

    def seal(self, number: int, part: bytes | memoryview, about: bytes = b"") -> bytes:
        """Return the sealed part, which is TAG_BYTES longer; `about` is authenticated with it."""
        sealed: bytes = self._cipher.encrypt(number.to_bytes(12, "big"), part, about)
        return sealed

    def open(self, number: int, sealed: bytes | memoryview, about: bytes = b"") -> bytes | None:
        """Return the part; None when it is not what was sealed under this number, with `about` and this key."""
        invalid = importlib.import_module("cryptography.exceptions").InvalidTag
        try:
            opened: bytes = self._cipher.decrypt(number.to_bytes(12, "big"), sealed, about)
        except invalid:
            return None
        return opened
