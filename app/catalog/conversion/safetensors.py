"""
Safetensors files: the table of tensors of a checkpoint, and the values of one tensor at a time.

Every length in the file is checked before anything is read or allocated, and nothing is memory-mapped.

The format is that of https://huggingface.co/docs/safetensors: eight bytes with the length of a JSON header, the header,
and the data of the tensors.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from app.kernel.errors import ModelFileDamaged
from app.kernel.security import texts

#: Maximum bytes of a header, maximum tensors, and maximum bytes of one tensor: many times what a converted model has.
_MAX_HEADER_BYTES, _MAX_TENSORS, _MAX_TENSOR_BYTES = 1 << 24, 1 << 16, 1 << 31
_MAX_DIMENSIONS = 4
_LENGTH = struct.Struct("<Q")
#: The types that are read, with numpy's name. BF16 is the upper half of a float32.
_TYPES: Mapping[str, str] = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4"}

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """The place, type and shape of one tensor."""

    type: str
    #: As in numpy: the last is the length of a row.
    shape: tuple[int, ...]
    #: Offsets of its first byte and of the byte after its last, from the start of the file.
    begin: int
    end: int


class Checkpoint:
    """An open safetensors file."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        """Read the table. Raises ModelFileDamaged when it is not that of a complete file."""
        self._path, self._file = path, file
        self.tensors: Mapping[str, StoredTensor] = self._table()

    def read(self, name: str) -> Array:
        """Returns the values of a tensor as float32. Raises ModelFileDamaged when its type is not supported."""
        tensor = self.tensors[name]
        if tensor.end - tensor.begin > _MAX_TENSOR_BYTES:
            raise self._damaged(f"its tensor {name} has more than {_MAX_TENSOR_BYTES:,} bytes")
        self._file.seek(tensor.begin)
        data = self._file.read(tensor.end - tensor.begin)
        if len(data) < tensor.end - tensor.begin:
            raise self._damaged("it was truncated while it was read")
        values = np.frombuffer(data, _TYPES[tensor.type])
        if tensor.type == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32, copy=False).reshape(tensor.shape)

    def _table(self) -> dict[str, StoredTensor]:
        size = self._file.seek(0, 2)
        self._file.seek(0)
        start = self._file.read(_LENGTH.size)
        length = _LENGTH.unpack(start)[0] if len(start) == _LENGTH.size else size
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - _LENGTH.size):
            raise self._damaged("it is not a safetensors file, or it ends in its header")
        try:
            header = json.loads(self._file.read(length))
        except (ValueError, RecursionError):
            raise self._damaged("its header is not JSON") from None
        if not isinstance(header, dict) or len(header) > _MAX_TENSORS:
            raise self._damaged("its header is not a table of tensors")
        header.pop("__metadata__", None)
        data = _LENGTH.size + length
        return {name: self._tensor(name, entry, data, size) for name, entry in header.items()}

    def _tensor(self, name: str, entry: Any, data: int, size: int) -> StoredTensor:
        try:
            kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise self._damaged(f"the entry of tensor {_shown(name)} is not complete") from None
        numbers = (*shape, begin, end)
        if len(shape) > _MAX_DIMENSIONS or any(type(number) is not int or number < 0 for number in numbers):
            raise self._damaged(f"the entry of tensor {_shown(name)} has impossible numbers")
        if not isinstance(kind, str) or kind not in _TYPES:
            raise self._damaged(f"tensor {_shown(name)} is of type {_shown(kind)}; known: {', '.join(_TYPES)}")
        if end - begin != math.prod(shape) * np.dtype(_TYPES[kind]).itemsize:
            raise self._damaged(f"tensor {_shown(name)} has another number of bytes than its shape says")
        if data + end > size:
            raise self._damaged(f"it has {size:,} bytes, and tensor {_shown(name)} ends at {data + end:,}")
        return StoredTensor(kind, shape, data + begin, data + end)

    def _damaged(self, reason: str) -> ModelFileDamaged:
        return ModelFileDamaged(self._path, reason, file_format="safetensors")


def _shown(value: Any) -> str:
    return texts.printable(str(value), 80)
