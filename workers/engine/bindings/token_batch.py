"""The batch of a decode: tokens, or embeddings of an image, in arrays that llama.cpp reads in place."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, cast

import llama_cpp as api
import numpy as np
import numpy.typing as npt


class Batch:
    """The token batch of a decode, in arrays that llama.cpp reads in place."""

    def __init__(self, size: int, sequences: int) -> None:
        self.tokens, self.positions = np.zeros(size, np.int32), np.zeros(size, np.int32)
        self.outputs, self._counts = np.zeros(size, np.int8), np.ones(size, np.int32)
        self._ids = np.arange(sequences, dtype=np.int32)
        self._owners, self._steps = np.zeros(size, np.uint64), np.arange(size, dtype=np.int32)
        self._addresses = [int(self._ids.ctypes.data) + 4 * sequence for sequence in range(sequences)]
        integers = ctypes.POINTER(ctypes.c_int32)
        batch = cast(Any, api.llama_batch())
        batch.token, batch.pos = self.tokens.ctypes.data_as(integers), self.positions.ctypes.data_as(integers)
        batch.n_seq_id = self._counts.ctypes.data_as(integers)
        batch.seq_id = self._owners.ctypes.data_as(ctypes.POINTER(integers))
        batch.logits = self.outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
        self._batch = batch

    def put(self, at: int, sequence: int, first: int, part: Sequence[int]) -> None:
        """Write tokens of a sequence at index `at`, from position `first` of the sequence. They produce no output."""
        end = at + len(part)
        self.tokens[at:end] = part
        self.positions[at:end] = self._steps[: end - at] + first
        self._owners[at:end] = self._addresses[sequence]
        self.outputs[at:end] = 0

    def put_singles(self, pieces: Sequence[tuple[int, int, Sequence[int], int]]) -> None:
        """Write pieces of one token each, from index 0."""
        size, addresses = len(pieces), self._addresses
        self.tokens[:size] = [part[0] for _, _, part, _ in pieces]
        self.positions[:size] = [first for _, first, _, _ in pieces]
        self._owners[:size] = [addresses[sequence] for sequence, *_ in pieces]
        self.outputs[:size] = [outputs for *_, outputs in pieces]

    def image_view(self, size: int, rows: npt.NDArray[np.float32], positions: npt.NDArray[np.int32]) -> Any:
        """Return llama.cpp's struct for embeddings instead of tokens; the arrays must outlive its use."""
        batch = cast(Any, api.llama_batch())
        batch.n_tokens, batch.n_seq_id, batch.seq_id = size, self._batch.n_seq_id, self._batch.seq_id
        batch.logits = self._batch.logits
        batch.embd = rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        batch.pos = positions.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        return batch

    def view(self, size: int) -> Any:
        """Return llama.cpp's struct for the first `size` tokens."""
        self._batch.n_tokens = size
        return self._batch
