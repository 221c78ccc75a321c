"""
The GGUF container format: reads the keys and the tensor table of a file, and checks that the file is complete.

A file that llama.cpp cannot read is rejected with its path and the reason, with figures where there are any:
not GGUF, an unknown version, truncated in the header, or shorter than its own tensor table says. A file on which
llama.cpp would abort, and with it the whole process, is rejected too: a vocabulary with a duplicate token.
Strings of the vocabulary are skipped and not kept: a header of 262,144 tokens is read in 0.1 to 0.2 s; the reader of
the package `gguf` needs 10 s. So nothing is cached.
Every file is read in bounded time and memory: counts and lengths are checked before anything is allocated.

The format is specified in ggml's docs/gguf.md; versions 2 and 3 are read. Its constants come from the package `gguf`.
Nothing here writes, and no file is memory-mapped: a file that shrinks while it is read is an error, not a crash.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from app.catalog.metadata import Tensor
from app.kernel.errors import ModelFileDamaged, ModelFileMissing
from app.kernel.security import texts

#: Supported versions of the format.
VERSIONS = (2, 3)
#: Arrays of at most this length are kept in `metadata`, unless they belong to the tokenizer.
ARRAY_LIMIT = 4096

#: Bytes read from the file at once. A header usually has 2 to 12 MiB.
_READ_BYTES = 1 << 20
#: Maximum bytes of a header; a longer one is corrupt and is not read further. The longest real ones hold a whole
#: `tokenizer.json` in addition to the vocabulary, and have about 60 MiB.
_MAX_HEADER_BYTES = 1 << 27
#: Maximum keys, tensors and tokens of a header: many times what any model has (about 100, 50,000 and 260,000).
_MAX_KEYS, _MAX_TENSORS, _MAX_TOKENS = 1 << 16, 1 << 17, 1 << 20
#: Maximum bytes of a string that is kept; longer ones are skipped, like long arrays.
_MAX_TEXT_BYTES = 1 << 20
#: Maximum elements of a tensor: ggml counts them in an int64_t.
_MAX_ELEMENTS = (1 << 63) - 1
#: ggml's GGML_MAX_DIMS and GGML_MAX_NAME, and GGUF_DEFAULT_ALIGNMENT.
_MAX_DIMENSIONS, _MAX_NAME_BYTES, _DEFAULT_ALIGNMENT = 4, 64, 32
#: Maximum alignment; a greater one would need more padding than the tensors have bytes.
_MAX_ALIGNMENT = 1 << 20
#: The list of all tokens, and the lists that llama.cpp indexes by token without checking their length.
_TOKENS = "tokenizer.ggml.tokens"
_PER_TOKEN_KEYS = ("tokenizer.ggml.scores", "tokenizer.ggml.token_type")

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_SCALARS: Mapping[int, struct.Struct] = {
    GGUFValueType.UINT8: struct.Struct("<B"),
    GGUFValueType.INT8: struct.Struct("<b"),
    GGUFValueType.UINT16: struct.Struct("<H"),
    GGUFValueType.INT16: struct.Struct("<h"),
    GGUFValueType.UINT32: _U32,
    GGUFValueType.INT32: struct.Struct("<i"),
    GGUFValueType.FLOAT32: struct.Struct("<f"),
    GGUFValueType.BOOL: struct.Struct("<?"),
    GGUFValueType.UINT64: _U64,
    GGUFValueType.INT64: struct.Struct("<q"),
    GGUFValueType.FLOAT64: struct.Struct("<d"),
}
#: Kinds of directory entries that are not regular files.
_FILE_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"
}  # fmt: skip
#: Other formats that users save under the name of a model: the first bytes in lower case, and a sentence.
_OTHER_FORMATS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "it is a pointer of Git LFS, not the file itself (`git lfs pull` fetches that)"),
    (b"<!doctype html", "it is a web page"),
    (b"<html", "it is a web page"),
    (b"pk\x03\x04", "it is a ZIP archive or a PyTorch file"),
    (b"tjgg", "it is a GGJT file, which llama.cpp no longer supports"),
    (b"lmgg", "it is a GGML file, which llama.cpp no longer supports"),
    (b"fmgg", "it is a GGMF file, which llama.cpp no longer supports"),
)


@dataclass(frozen=True, slots=True)
class Container:
    """The contents of one GGUF file except the tensor data."""

    path: Path
    #: Version of the format.
    version: int
    #: Every key with its value, except skipped arrays and strings.
    metadata: Mapping[str, Any]
    #: Length of each skipped array or string, by key.
    lengths: Mapping[str, int]
    tensors: tuple[Tensor, ...]
    #: Bytes of the file.
    size: int
    #: The sha256 of the header: everything before the tensor data.
    digest: str


def read(path: Path) -> Container:
    """
    Reads the GGUF file at `path`.

    Raises ModelFileMissing when it does not exist, and ModelFileDamaged with the reason when it is not a complete GGUF
    file.
    """
    try:
        with _open_regular(path) as file:
            return _Reader(path, file).container()
    except (FileNotFoundError, NotADirectoryError):
        raise ModelFileMissing(f"there is no file {path}") from None
    except ValueError as error:  # the path contains NUL
        raise ModelFileDamaged(path, f"it cannot be opened: {error}") from None
    except OSError as error:
        raise ModelFileDamaged(path, f"it cannot be read: {error.strerror or error}") from error


def _open_regular(path: Path) -> BinaryIO:
    """Opens a regular file without blocking: opening a pipe that has no writer would block for an unlimited time."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind == stat.S_IFREG:
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise ModelFileDamaged(path, f"it is {_FILE_KINDS.get(kind, 'a special file')}, not a regular file")


def quoted(value: Any) -> str:
    """Returns a value from a file for use in a message: short, and safe for a terminal."""
    return texts.printable(repr(value[:100] if isinstance(value, str | bytes | tuple) else value), 100)


class _Reader:
    """Reads the header of one file."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._size = file.seek(0, 2)
        file.seek(0)
        self._data = bytearray()
        self._offset = 0
        #: What is being read, for the error message when the file ends there.
        self._reading = "its preamble"

    def container(self) -> Container:
        version = self._version()
        tensor_count, key_count = self._unpack(_U64), self._unpack(_U64)
        for count, most, what in ((key_count, _MAX_KEYS, "keys"), (tensor_count, _MAX_TENSORS, "tensors")):
            if count > most:
                raise self._damaged(f"it says that it has {count:,} {what}; at most {most:,} are possible")
        metadata: dict[str, Any] = {}
        lengths: dict[str, int] = {}
        for index in range(key_count):
            self._reading = f"key {index + 1} of {key_count}"
            key = self._key()
            if key in metadata or key in lengths:
                raise self._damaged(f"it has the key {key} twice")
            self._reading = f"the value of {key}, key {index + 1} of {key_count}"
            value = self._value(key, self._unpack(_U32))
            if isinstance(value, _Skipped):
                lengths[key] = value.length
            else:
                metadata[key] = value
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 1 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self._damaged(
                f"its alignment is {quoted(alignment)}, which is not a power of two up to {_MAX_ALIGNMENT:,}"
            )
        for key in _PER_TOKEN_KEYS:
            if (length := lengths.get(key)) is not None and length < lengths.get(_TOKENS, 0):
                raise self._damaged(f"{key} has {length:,} values for {lengths[_TOKENS]:,} tokens")
        tensors = tuple(self._tensors(tensor_count, alignment))
        digest = hashlib.sha256(memoryview(self._data)[: self._offset]).hexdigest()
        return Container(self._path, version, metadata, lengths, tensors, self._size, digest)

    def _version(self) -> int:
        self._fill(min(_READ_BYTES, self._size))
        if not self._size:
            raise self._damaged("it is empty")
        if self._data[:4] != b"GGUF":
            head = bytes(self._data[:64]).lstrip().lower()
            other_format = next((text for start, text in _OTHER_FORMATS if head.startswith(start)), None)
            raise self._damaged(other_format or f"it begins with {bytes(self._data[:4])!r} instead of b'GGUF'")
        self._offset = 4
        version: int = self._unpack(_U32)
        if version not in VERSIONS:
            if version & 0xFFFF == 0:
                raise self._damaged("it is a big-endian file, made for another type of processor")
            known = " and ".join(str(number) for number in VERSIONS)
            raise self._damaged(f"it is of version {version} of the format; versions {known} are supported")
        return version

    def _tensors(self, count: int, alignment: int) -> tuple[Tensor, ...]:
        offset = 0
        table: dict[str, tuple[int, Tensor]] = {}
        for index in range(count):
            self._reading = f"entry {index + 1} of {count} of its table of tensors"
            tensor, given = self._tensor()
            if tensor.name in table:
                raise self._damaged(f"it has the tensor {tensor.name} twice")
            if given != offset:
                raise self._damaged(f"tensor {tensor.name} begins at {given:,}, the previous one ends at {offset:,}")
            table[tensor.name] = (offset, tensor)
            offset += -(-tensor.size // alignment) * alignment
        start = -(-self._offset // alignment) * alignment
        ends = {name: start + begin + tensor.size for name, (begin, tensor) in table.items()}
        if cut := next((name for name, end in ends.items() if end > self._size), None):
            needed = max(ends.values())
            raise self._damaged(
                f"it has {self._size:,} bytes, its table of tensors needs {needed:,}: "
                f"{needed - self._size:,} are missing, from tensor {cut} on"
            )
        return tuple(tensor for _, tensor in table.values())

    def _tensor(self) -> tuple[Tensor, int]:
        name = self._name()
        dimensions = self._unpack(_U32)
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self._damaged(f"tensor {name} has {dimensions} dimensions, 1 to {_MAX_DIMENSIONS} are possible")
        shape = tuple(self._unpack(_U64) for _ in range(dimensions))
        number = self._unpack(_U32)
        offset = self._unpack(_U64)
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise self._damaged(f"tensor {name} is of type {number}, which this version does not know") from None
        if math.prod(shape) > _MAX_ELEMENTS:
            raise self._damaged(f"tensor {name} of shape {shape} has more elements than can be counted")
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[0] % block or not all(shape):
            raise self._damaged(
                f"tensor {name} of shape {shape} does not fit the blocks of {kind.name} ({block} values)"
            )
        return Tensor(name, kind.name, shape, math.prod(shape) // block * block_bytes), offset

    def _value(self, key: str, kind: int) -> Any:
        if kind == GGUFValueType.STRING:
            length = self._unpack(_U64)
            if length > _MAX_TEXT_BYTES:
                self._skip(length)
                return _Skipped(length)
            return self._string(length)
        if kind == GGUFValueType.ARRAY:
            return self._array(key)
        if (scalar := _SCALARS.get(kind)) is None:
            raise self._damaged(f"{self._reading} is of type {kind}, which the format does not have")
        return self._unpack(scalar)

    def _array(self, key: str) -> Any:
        kind, length = self._unpack(_U32), self._unpack(_U64)
        keep = length <= ARRAY_LIMIT and not key.startswith("tokenizer.ggml.")
        if kind == GGUFValueType.STRING:
            if key == _TOKENS:
                self._check_tokens(length)
            elif keep:
                return tuple(self._list_text() for _ in range(length))
            else:
                self._skip_texts(length)
        elif (scalar := _SCALARS.get(kind)) is not None:
            if keep:
                return tuple(self._unpack(scalar) for _ in range(length))
            self._skip(length * scalar.size)
        else:
            raise self._damaged(f"{self._reading} is a list of type {kind}, which the format does not have")
        return _Skipped(length)

    def _skip_texts(self, count: int) -> None:
        """Skips `count` strings. This is the hot loop of the module."""
        unpack, data, at = _U64.unpack_from, self._data, self._offset
        end = len(data) - 8
        for _ in range(count):
            if at > end:
                self._offset = at
                self._fill(8)
                end = len(data) - 8
            at += 8 + unpack(data, at)[0]
        self._offset = at
        self._fill(0)

    def _check_tokens(self, count: int) -> None:
        """Skips the vocabulary. Rejects duplicate tokens, on which llama.cpp aborts. It names empty tokens by index."""
        if count > _MAX_TOKENS:
            raise self._damaged(f"it says that it has {count:,} tokens; at most {_MAX_TOKENS:,} are possible")
        unpack, data, at = _U64.unpack_from, self._data, self._offset
        seen: dict[bytes, int] = {}
        for index in range(count):
            if at + 8 > len(data):
                self._offset = at
                self._fill(8)
            start = at + 8
            at = start + unpack(data, at)[0]
            if at > len(data):
                self._offset = start
                self._fill(at - start)
            token = bytes(data[start:at]) or b"[EMPTY_%d]" % index
            first = seen.setdefault(token, index)
            if first != index:
                raise self._damaged(f"its tokens {first:,} and {index:,} are the same, {quoted(token)}")
        self._offset = at

    def _name(self) -> str:
        length = self._unpack(_U64)
        if length >= _MAX_NAME_BYTES:
            most = _MAX_NAME_BYTES - 1
            raise self._damaged(f"{self._reading} has a name of {length:,} bytes; at most {most} are possible")
        return self._string(length)

    def _key(self) -> str:
        length = self._unpack(_U64)
        if length > 0xFFFF:
            raise self._damaged(f"{self._reading} has a name of {length:,} bytes; the header is corrupt")
        return self._string(length)

    def _list_text(self) -> str:
        """Reads a string of an array that is kept."""
        length = self._unpack(_U64)
        if length > _MAX_TEXT_BYTES:
            raise self._damaged(f"{self._reading} holds a string of {length:,} bytes; the header is corrupt")
        return self._string(length)

    def _string(self, length: int) -> str:
        self._fill(length)
        raw = bytes(self._data[self._offset : self._offset + length])
        self._offset += length
        return texts.storable(raw.decode("utf-8", errors="replace"))

    def _unpack(self, number: struct.Struct) -> Any:
        self._fill(number.size)
        (value,) = number.unpack_from(self._data, self._offset)
        self._offset += number.size
        return value

    def _skip(self, count: int) -> None:
        self._offset += count
        self._fill(0)

    def _fill(self, count: int) -> None:
        """Ensures that the next `count` bytes are in memory. Raises ModelFileDamaged when the file is shorter."""
        end = self._offset + count
        if end <= len(self._data):
            return
        if end > self._size:
            raise self._damaged(
                f"it ends in its header: {self._reading} reaches to byte {end:,}, the file has {self._size:,}"
            )
        if end > _MAX_HEADER_BYTES:
            raise self._damaged(f"its header is longer than {_MAX_HEADER_BYTES:,} bytes; it is corrupt")
        wanted = min(self._size, max(end, len(self._data) + _READ_BYTES)) - len(self._data)
        self._data += self._file.read(wanted)
        if end > len(self._data):
            raise self._damaged("it was truncated while it was read")

    def _damaged(self, reason: str) -> ModelFileDamaged:
        return ModelFileDamaged(self._path, texts.printable(reason, 500))


@dataclass(frozen=True, slots=True)
class _Skipped:
    """An array or a string that was skipped."""

    length: int
