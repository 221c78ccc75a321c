"""
A GGUF file as a container: its keys, its table of tensors, and whether it is whole.

A file that llama.cpp could not read is refused with its path and the reason, in figures where there are any:
no GGUF, an unknown version, cut off in the header, or shorter than its own table of tensors says; and one on which
llama.cpp would abort, which no caller of it survives: a vocabulary with the same token twice.
Strings of the vocabulary are stepped over and never kept: a header of 262,144 tokens is read in 0.1 to 0.2 s,
for which the reader of the package `gguf` takes 10 s. So nothing is cached.
Whatever a file holds, it is read in bounded time and memory: counts and lengths are checked before anything is built.

The format is that of ggml's docs/gguf.md, versions 2 and 3; its numbers come from the package `gguf`.
Nothing here writes, and no file is mapped: one that shrinks meanwhile is an error, not a crash.
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

#: Versions of the format whose layout is read here.
VERSIONS = (2, 3)
#: Arrays up to this length are kept in `metadata`, unless they belong to the tokenizer.
ARRAY_LIMIT = 4096

#: Bytes read from the file at once; a header has 2 to 12 MiB.
_READ = 1 << 20
#: Bytes that a header may have; a longer one is garbled, and is not read on. The longest ones hold a whole
#: `tokenizer.json` beside the vocabulary, and have some 60 MiB.
_HEADER_LIMIT = 1 << 27
#: Keys, tensors and tokens that it may have: many times what any model has (some 100, 50,000 and 260,000).
_MOST_KEYS, _MOST_TENSORS, _MOST_TOKENS = 1 << 16, 1 << 17, 1 << 20
#: Bytes of a string that is kept; a longer one is stepped over as long arrays are.
_TEXT_LIMIT = 1 << 20
#: Elements of a tensor at the most, as ggml counts them in an int64_t.
_MOST_ELEMENTS = (1 << 63) - 1
#: ggml's GGML_MAX_DIMS and GGML_MAX_NAME, and GGUF_DEFAULT_ALIGNMENT.
_MAX_DIMENSIONS, _MAX_NAME, _ALIGNMENT = 4, 64, 32
#: An alignment above that would leave more room between tensors than they have bytes.
_MOST_ALIGNMENT = 1 << 20
#: The list of all tokens, and those that llama.cpp reads beside it without a look at their length.
_TOKENS = "tokenizer.ggml.tokens"
_BESIDE_TOKENS = ("tokenizer.ggml.scores", "tokenizer.ggml.token_type")

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
#: What else may lie under the name of a file.
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"
}  # fmt: skip
#: What else people save under the name of a model.
_STRANGERS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "it is a pointer of Git LFS, not the file itself (`git lfs pull` fetches that)"),
    (b"<!doctype html", "it is a web page"),
    (b"<html", "it is a web page"),
    (b"pk\x03\x04", "it is a ZIP archive or a PyTorch file"),
    (b"tjgg", "it is a GGJT file, which llama.cpp no longer reads"),
    (b"lmgg", "it is a GGML file, which llama.cpp no longer reads"),
    (b"fmgg", "it is a GGMF file, which llama.cpp no longer reads"),
)


@dataclass(frozen=True, slots=True)
class Container:
    """What one file holds besides the data of its tensors."""

    path: Path
    #: Of the format.
    version: int
    #: Every key with its value, but for the arrays that were stepped over.
    metadata: Mapping[str, Any]
    #: Length of each array that was stepped over.
    lengths: Mapping[str, int]
    tensors: tuple[Tensor, ...]
    #: Bytes of the file.
    size: int
    #: The sha256 of all that stands before the data of the tensors.
    digest: str


def read(path: Path) -> Container:
    """
    What the file at `path` holds.

    Raises ModelFileMissing when there is none, and ModelFileDamaged with the reason when it is not a whole GGUF file.
    """
    try:
        with _opened(path) as file:
            return _Reader(path, file).container()
    except (FileNotFoundError, NotADirectoryError):
        raise ModelFileMissing(f"there is no file {path}") from None
    except ValueError as error:  # a path with a NUL
        raise ModelFileDamaged(path, f"it cannot be opened: {error}") from None
    except OSError as error:
        raise ModelFileDamaged(path, f"it cannot be read: {error.strerror or error}") from error


def _opened(path: Path) -> BinaryIO:
    """The file, if it is a regular one. A pipe that nobody writes to would hold the reader for ever, if it waited."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind == stat.S_IFREG:
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise ModelFileDamaged(path, f"it is {_KINDS.get(kind, 'something else')}, not a file")


def shown(value: Any) -> str:
    """A value of a file in a sentence: short, and harmless to a terminal."""
    return texts.printable(repr(value[:100] if isinstance(value, str | bytes | tuple) else value), 100)


class _Reader:
    """Reads one file from its start, as far as its header goes."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._size = file.seek(0, 2)
        file.seek(0)
        self._data = bytearray()
        self._at = 0
        #: What is being read, for the message about a file that ends there.
        self._what = "its preamble"

    def container(self) -> Container:
        version = self._version()
        tensor_count, key_count = self._take(_U64), self._take(_U64)
        for count, most, what in ((key_count, _MOST_KEYS, "keys"), (tensor_count, _MOST_TENSORS, "tensors")):
            if count > most:
                raise self._damaged(f"it says that it has {count:,} {what}, at most {most:,} are possible")
        metadata: dict[str, Any] = {}
        lengths: dict[str, int] = {}
        for index in range(key_count):
            self._what = f"key {index + 1} of {key_count}"
            key = self._key()
            if key in metadata or key in lengths:
                raise self._damaged(f"it has the key {key} twice")
            self._what = f"the value of {key}, key {index + 1} of {key_count}"
            value = self._value(key, self._take(_U32))
            if isinstance(value, _Skipped):
                lengths[key] = value.length
            else:
                metadata[key] = value
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or not 1 <= alignment <= _MOST_ALIGNMENT or alignment & (alignment - 1):
            raise self._damaged(
                f"its alignment is {shown(alignment)}, which is no power of two up to {_MOST_ALIGNMENT:,}"
            )
        for key in _BESIDE_TOKENS:
            if (length := lengths.get(key)) is not None and length < lengths.get(_TOKENS, 0):
                raise self._damaged(f"{key} has {length:,} values for {lengths[_TOKENS]:,} tokens")
        tensors = tuple(self._tensors(tensor_count, alignment))
        digest = hashlib.sha256(memoryview(self._data)[: self._at]).hexdigest()
        return Container(self._path, version, metadata, lengths, tensors, self._size, digest)

    def _version(self) -> int:
        self._fill(min(_READ, self._size))
        if not self._size:
            raise self._damaged("it is empty")
        if self._data[:4] != b"GGUF":
            head = bytes(self._data[:64]).lstrip().lower()
            stranger = next((text for start, text in _STRANGERS if head.startswith(start)), None)
            raise self._damaged(stranger or f"it begins with {bytes(self._data[:4])!r} instead of b'GGUF'")
        self._at = 4
        version: int = self._take(_U32)
        if version not in VERSIONS:
            if version & 0xFFFF == 0:
                raise self._damaged("it is a big-endian file, made for another kind of machine")
            known = " and ".join(str(number) for number in VERSIONS)
            raise self._damaged(f"it is of version {version} of the format; versions {known} are supported")
        return version

    def _tensors(self, count: int, alignment: int) -> tuple[Tensor, ...]:
        offset = 0
        table: dict[str, tuple[int, Tensor]] = {}
        for index in range(count):
            self._what = f"entry {index + 1} of {count} of its table of tensors"
            tensor, given = self._tensor()
            if tensor.name in table:
                raise self._damaged(f"it has the tensor {tensor.name} twice")
            if given != offset:
                raise self._damaged(f"tensor {tensor.name} begins at {given:,}, the one before ends at {offset:,}")
            table[tensor.name] = (offset, tensor)
            offset += -(-tensor.size // alignment) * alignment
        start = -(-self._at // alignment) * alignment
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
        dimensions = self._take(_U32)
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self._damaged(f"tensor {name} has {dimensions} dimensions, 1 to {_MAX_DIMENSIONS} are possible")
        shape = tuple(self._take(_U64) for _ in range(dimensions))
        number = self._take(_U32)
        offset = self._take(_U64)
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise self._damaged(f"tensor {name} is of type {number}, which this version does not know") from None
        if math.prod(shape) > _MOST_ELEMENTS:
            raise self._damaged(f"tensor {name} of shape {shape} has more elements than can be counted")
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[0] % block or not all(shape):
            raise self._damaged(
                f"tensor {name} of shape {shape} does not fit the blocks of {kind.name} ({block} values)"
            )
        return Tensor(name, kind.name, shape, math.prod(shape) // block * block_bytes), offset

    def _value(self, key: str, kind: int) -> Any:
        if kind == GGUFValueType.STRING:
            length = self._take(_U64)
            if length > _TEXT_LIMIT:
                self._skip(length)
                return _Skipped(length)
            return self._string(length)
        if kind == GGUFValueType.ARRAY:
            return self._array(key)
        if (scalar := _SCALARS.get(kind)) is None:
            raise self._damaged(f"{self._what} is of type {kind}, which the format does not have")
        return self._take(scalar)

    def _array(self, key: str) -> Any:
        kind, length = self._take(_U32), self._take(_U64)
        keep = length <= ARRAY_LIMIT and not key.startswith("tokenizer.ggml.")
        if kind == GGUFValueType.STRING:
            if key == _TOKENS:
                self._check_tokens(length)
            elif keep:
                return tuple(self._text() for _ in range(length))
            else:
                self._skip_texts(length)
        elif (scalar := _SCALARS.get(kind)) is not None:
            if keep:
                return tuple(self._take(scalar) for _ in range(length))
            self._skip(length * scalar.size)
        else:
            raise self._damaged(f"{self._what} is a list of type {kind}, which the format does not have")
        return _Skipped(length)

    def _skip_texts(self, count: int) -> None:
        """Step over `count` strings: the one hot loop of this module."""
        unpack, data, at = _U64.unpack_from, self._data, self._at
        end = len(data) - 8
        for _ in range(count):
            if at > end:
                self._at = at
                self._fill(8)
                end = len(data) - 8
            at += 8 + unpack(data, at)[0]
        self._at = at
        self._fill(0)

    def _check_tokens(self, count: int) -> None:
        """Step over the vocabulary. llama.cpp names an empty token by its place, and aborts where two are the same."""
        if count > _MOST_TOKENS:
            raise self._damaged(f"it says that it has {count:,} tokens, at most {_MOST_TOKENS:,} are possible")
        unpack, data, at = _U64.unpack_from, self._data, self._at
        seen: dict[bytes, int] = {}
        for index in range(count):
            if at + 8 > len(data):
                self._at = at
                self._fill(8)
            start = at + 8
            at = start + unpack(data, at)[0]
            if at > len(data):
                self._at = start
                self._fill(at - start)
            token = bytes(data[start:at]) or b"[EMPTY_%d]" % index
            first = seen.setdefault(token, index)
            if first != index:
                raise self._damaged(f"its tokens {first:,} and {index:,} are the same, {shown(token)}")
        self._at = at

    def _name(self) -> str:
        length = self._take(_U64)
        if length >= _MAX_NAME:
            raise self._damaged(f"{self._what} has a name of {length:,} bytes, {_MAX_NAME - 1} are possible")
        return self._string(length)

    def _key(self) -> str:
        length = self._take(_U64)
        if length > 0xFFFF:
            raise self._damaged(f"{self._what} has a name of {length:,} bytes; the header is garbled")
        return self._string(length)

    def _text(self) -> str:
        """A string of a short list."""
        length = self._take(_U64)
        if length > _TEXT_LIMIT:
            raise self._damaged(f"{self._what} holds a string of {length:,} bytes; the header is garbled")
        return self._string(length)

    def _string(self, length: int) -> str:
        self._fill(length)
        raw = bytes(self._data[self._at : self._at + length])
        self._at += length
        return texts.storable(raw.decode("utf-8", errors="replace"))

    def _take(self, number: struct.Struct) -> Any:
        self._fill(number.size)
        (value,) = number.unpack_from(self._data, self._at)
        self._at += number.size
        return value

    def _skip(self, count: int) -> None:
        self._at += count
        self._fill(0)

    def _fill(self, count: int) -> None:
        """See to it that the next `count` bytes are in memory; the file must have them."""
        end = self._at + count
        if end <= len(self._data):
            return
        if end > self._size:
            raise self._damaged(
                f"it ends in its header: {self._what} reaches to byte {end:,}, the file has {self._size:,}"
            )
        if end > _HEADER_LIMIT:
            raise self._damaged(f"its header is longer than {_HEADER_LIMIT:,} bytes: it is garbled")
        wanted = min(self._size, max(end, len(self._data) + _READ)) - len(self._data)
        self._data += self._file.read(wanted)
        if end > len(self._data):
            raise self._damaged("it became shorter while it was read")

    def _damaged(self, reason: str) -> ModelFileDamaged:
        return ModelFileDamaged(self._path, texts.printable(reason, 500))


@dataclass(frozen=True, slots=True)
class _Skipped:
    """An array that was stepped over."""

    length: int
