"""
A state file: the KV state of a prefix, with the tokens that it belongs to.

Everything is checked before it is used or allocated: owner and mode of the file, magic, version, identity, lengths
against the size of the file and against limits, then a checksum, or the tags of the encryption. llama.cpp gets no byte
of a file that does not pass, because a damaged state could end the process.

A file is, in little-endian order:

    magic (8), version (2), flags (2), entries (4), state bytes (8), images (4), last position (4), identity (32),
    file id (16), key id (16), SHA-256 of the state (32; zeros when it is encrypted)
    the entries (see entry_block.py), and the SHA-256 of all until here; or the entries sealed, with all before
    authenticated
    the state; or its parts of 256 KiB, each sealed

Anyone who can read the tokens can read the text.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from workers.engine.kv_store import entry_block
from workers.engine.kv_store.sealing import KEY_ID_BYTES, TAG_BYTES, Sealer, SealingKey

#: The state of a sequence, as llama.cpp writes it.
StateData = npt.NDArray[np.uint8]

MAGIC = b"ARRIEROK"
#: Rises when the format changes.
VERSION = 2
_HEADER = struct.Struct(f"<8sHHIQIi32s16s{KEY_ID_BYTES}s32s")
_SEALED = 1
_NO_DIGEST, _NO_KEY = bytes(32), bytes(KEY_ID_BYTES)
#: Bytes of the parts in which a state is read, written and sealed. Other Python threads wait for one at most.
PART_BYTES = 256 * 1024


class StateRefused(Exception):
    """A file that cannot be used."""

    def __init__(self, reason: str, *, is_damaged: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        #: Nobody can use it.
        self.is_damaged = is_damaged


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Which files may be used."""

    #: SHA-256 of all that a state depends on beside its tokens.
    identity: bytes
    max_tokens: int
    max_state_bytes: int
    #: None accepts only files that are not encrypted.
    key: SealingKey | None = None


@dataclass(frozen=True, slots=True)
class StateHeader:
    """What the first part of a file says."""

    #: Tokens, and the entries of images.
    tokens: tuple[int, ...]
    #: The highest position of the state in a cache. With M-RoPE, images advance it by less than their cells.
    last: int
    state_bytes: int
    file_id: bytes
    digest: bytes
    #: Bytes of the whole file.
    size: int


@dataclass(frozen=True, slots=True)
class _Lengths:
    token_count: int
    images: int
    state_bytes: int
    sealed: bool

    @property
    def tokens_size(self) -> int:
        return entry_block.size_of(self.token_count, self.images) + (TAG_BYTES if self.sealed else 32)

    @property
    def size(self) -> int:
        parts = -(-self.state_bytes // PART_BYTES)
        return _HEADER.size + self.tokens_size + self.state_bytes + TAG_BYTES * parts * self.sealed


def size_of(tokens: tuple[int, ...], state_bytes: int, *, sealed: bool) -> int:
    """Return the bytes of a file."""
    return _Lengths(len(tokens), entry_block.pack(tokens)[1], state_bytes, sealed).size


def write(
    file: BinaryIO,
    acceptance: Acceptance,
    file_id: bytes,
    tokens: tuple[int, ...],
    last: int,
    state: StateData,
    check: Callable[[], None],
) -> StateHeader:
    """
    Write a file, encrypted if `acceptance` has a key; `last` as in StateHeader.

    `check` is called between parts, and may raise.

    Raises OSError.
    """
    content, key = state.data, acceptance.key
    sealer = None if key is None else key.of_file(file_id)
    digest = _NO_DIGEST if sealer is not None else _digest(content, check)
    key_id, flags = (_NO_KEY, 0) if key is None else (key.id, _SEALED)
    packed, images = entry_block.pack(tokens)
    lengths = (len(tokens), len(state), images, last)
    raw = _HEADER.pack(MAGIC, VERSION, flags, *lengths, acceptance.identity, file_id, key_id, digest)
    if sealer is None:
        file.write(raw + packed + hashlib.sha256(raw + packed).digest())
    else:
        file.write(raw + sealer.seal(0, packed, raw))
    for number, part in enumerate(_parts(content), 1):
        check()
        file.write(part if sealer is None else sealer.seal(number, part))
    size = _Lengths(len(tokens), images, len(state), sealer is not None).size
    return StateHeader(tokens, last, len(state), file_id, digest, size)


def read_header(path: Path, acceptance: Acceptance) -> StateHeader:
    """Read tokens and lengths. Raises StateRefused, OSError."""
    with _opened(path) as file:
        return _header(file, acceptance)[0]


def read(path: Path, acceptance: Acceptance, expected: StateHeader, check: Callable[[], None]) -> StateData:
    """
    Read the state of the file whose header was `expected`. `check` is called between parts, and may raise.

    Raises StateRefused, OSError.
    """
    with _opened(path) as file:
        found, sealer = _header(file, acceptance)
        if found != expected:
            raise StateRefused("it was replaced by another file")
        state = np.empty(found.state_bytes, np.uint8)
        for number, part in enumerate(_parts(state.data), 1):
            check()
            if sealer is None:
                if file.readinto(part) != len(part):
                    raise StateRefused("it ends too early", is_damaged=True)
                continue
            opened = sealer.open(number, file.read(len(part) + TAG_BYTES))
            if opened is None or len(opened) != len(part):
                raise StateRefused("its encrypted content was changed", is_damaged=True)
            part[:] = opened
        if sealer is None and _digest(state.data, check) != found.digest:
            raise StateRefused("its content does not have the checksum of its header", is_damaged=True)
        return state


def _header(file: BufferedReader, acceptance: Acceptance) -> tuple[StateHeader, Sealer | None]:
    raw = file.read(_HEADER.size)
    if len(raw) < _HEADER.size or not raw.startswith(MAGIC):
        raise StateRefused("it is no state file", is_damaged=True)
    _, version, flags, count, state_bytes, images, last, identity, file_id, key_id, digest = _HEADER.unpack(raw)
    if version != VERSION or flags & ~_SEALED:
        raise StateRefused(f"it has version {version} and flags {flags}; this is version {VERSION}")
    if identity != acceptance.identity:
        raise StateRefused("it belongs to another model, build or configuration")
    sealed = bool(flags & _SEALED)
    if sealed != (acceptance.key is not None) or (acceptance.key is not None and key_id != acceptance.key.id):
        raise StateRefused("it is encrypted with another key" if sealed else "it is not encrypted")
    lengths = _Lengths(count, images, state_bytes, sealed)
    if not 0 < count <= acceptance.max_tokens or not 0 < state_bytes <= acceptance.max_state_bytes or images > count:
        raise StateRefused(f"it has {count} entries, {images} images and {state_bytes} bytes, more than are accepted")
    if (size := os.fstat(file.fileno()).st_size) != lengths.size:
        raise StateRefused(f"it has {size} bytes; by its header it has {lengths.size}", is_damaged=True)
    block = file.read(lengths.tokens_size)
    sealer = None if acceptance.key is None else acceptance.key.of_file(file_id)
    packed = sealer.open(0, block, raw) if sealer is not None else _verified(raw, block)
    if packed is None:
        raise StateRefused("its header was changed", is_damaged=True)
    if (tokens := entry_block.unpack(packed, count, images)) is None:
        raise StateRefused("its entries are no tokens and images", is_damaged=True)
    return StateHeader(tokens, last, state_bytes, file_id, digest, lengths.size), sealer


def _verified(raw: bytes, block: bytes) -> bytes | None:
    packed, digest = block[:-32], block[-32:]
    return packed if hashlib.sha256(raw + packed).digest() == digest else None


def _parts(content: memoryview) -> Iterator[memoryview]:
    return (content[at : at + PART_BYTES] for at in range(0, len(content), PART_BYTES))


def _digest(content: memoryview, check: Callable[[], None]) -> bytes:
    digest = hashlib.sha256()
    for part in _parts(content):
        check()
        digest.update(part)
    return digest.digest()


@contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    """Open a file of this user that nobody else can write. Raises StateRefused for another one, OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise StateRefused("it is no regular file")
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise StateRefused("it belongs to another user, or others may write it")
        yield file
