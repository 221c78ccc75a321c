"""Writes GGUF files byte by byte, also malformed ones that no library writes."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable
from pathlib import Path

U32, U64 = struct.Struct("<I"), struct.Struct("<Q")
#: Types of values: gguf's GGUFValueType.
UINT8, INT32, UINT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64 = 0, 5, 4, 6, 7, 8, 9, 10, 11
_FORMATS = {
    UINT8: "<B", 1: "<b", 2: "<H", 3: "<h", UINT32: "<I", INT32: "<i", FLOAT32: "<f", BOOL: "<?", UINT64: "<Q",
    INT64: "<q", 12: "<d",
}  # fmt: skip
#: Numbers that often break parsers.
NUMBERS = (
    0,
    1,
    2**7,
    2**8 - 1,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 8,
    2**64 - 1,
)


def string(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return U64.pack(len(raw)) + raw


def number(kind: int, value: float) -> bytes:
    return struct.pack(_FORMATS[kind], value)


def key(name: str, kind: int, value: bytes) -> bytes:
    return string(name) + U32.pack(kind) + value


def listed(kind: int, values: Iterable[bytes], count: int | None = None) -> bytes:
    made = list(values)
    return U32.pack(kind) + U64.pack(len(made) if count is None else count) + b"".join(made)


def tensor(name: str | bytes, shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + U32.pack(len(shape)) + b"".join(map(U64.pack, shape)) + U32.pack(kind) + U64.pack(offset)


def model(path: Path, *keys: bytes, tensors: Iterable[bytes] = (), data: int = 1 << 12) -> Path:
    """Writes a small complete model of the architecture `llama`, with these additional keys."""
    tables = list(tensors) or [tensor("token_embd.weight")]
    all_keys = [key("general.architecture", STRING, string("llama")), *keys]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tables), len(all_keys)) + b"".join(all_keys) + b"".join(tables)
    path.write_bytes(head + bytes(data))
    return path


def tokens(*words: str | bytes) -> bytes:
    return key("tokenizer.ggml.tokens", ARRAY, listed(STRING, map(string, words)))


def heads(*values: int) -> bytes:
    return key("llama.attention.head_count", ARRAY, listed(INT32, (number(INT32, value) for value in values)))


def u32(name: str, value: int) -> bytes:
    return key(name, UINT32, number(UINT32, value))


class Walk:
    """Parses a real header, so that it can be written with short lists, which makes mutations fast."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 4
        self._u32()
        self.tensor_count, count = self._u64(), self._u64()
        self.keys: list[bytes] = []
        for _ in range(count):
            start = self._at
            self._string()
            kind = self._u32()
            name = self._data[start : self._at]
            self.keys.append(name + (self._list() if kind == ARRAY else self._value(kind)))

    def short(self) -> bytes:
        """Returns the header with short lists and its complete tensor table."""
        start = self._at
        for _ in range(self.tensor_count):
            self._string()
            dimensions = self._u32()
            self._at += 8 * dimensions + 12
        head = b"GGUF" + struct.pack("<IQQ", 3, self.tensor_count, len(self.keys))
        return head + b"".join(self.keys) + self._data[start : self._at]

    def _list(self) -> bytes:
        kind, count = self._u32(), self._u64()
        kept = [self._value(kind) for _ in range(count)][:40]
        return listed(kind, kept)

    def _value(self, kind: int) -> bytes:
        start = self._at
        if kind == STRING:
            self._string()
        else:
            self._at += struct.calcsize(_FORMATS[kind])
        return self._data[start : self._at]

    def _string(self) -> None:
        length = self._u64()
        self._at += length

    def _u32(self) -> int:
        self._at += 4
        return int(U32.unpack_from(self._data, self._at - 4)[0])

    def _u64(self) -> int:
        self._at += 8
        return int(U64.unpack_from(self._data, self._at - 8)[0])


def mutated(header: bytes, chance: random.Random) -> bytes:
    """Returns a mutated file: flipped bits, other numbers, deleted, doubled or copied pieces, or a truncated end."""
    made = bytearray(header)
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = chance.randrange(4, len(made))
        length = chance.choice((1, 4, 8, 30, 300))
        match chance.randrange(7):
            case 0:
                made[at] ^= 1 << chance.randrange(8)
            case 1:
                made[at : at + 8] = U64.pack(chance.choice(NUMBERS))
            case 2:
                made[at : at + 4] = U32.pack(chance.choice(NUMBERS) & 0xFFFFFFFF)
            case 3:
                del made[at : at + length]
            case 4:
                made[at:at] = made[at : at + length]
            case 5:
                other = chance.randrange(4, len(made))
                made[at : at + length] = made[other : other + length]
            case 6:
                del made[at:]
                break
        if len(made) < 32:
            break
    return bytes(made)
