"""
Attention to the cells of a KV cache: deploy/ggml-attention.cpp beside ggml's own kernels.

Texts with so many cells each write a token, or a prompt continues a text with so many cells. `shared` texts have all
cells but the last 32 in common; `unified` ones have their own in one buffer, their newest cells among each other; texts
in `streams` have a buffer each. Each figure is the shortest of the turns by both.

`python -m benchmarks.attention [--threads N] [--heads QUERIES,KEYS] [--columns N] [--cells N,…] [--turns N]`
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from ctypes import c_float, c_int, c_void_p
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.ggml import FLOAT, HALF, Backend, Floats, Operation, measure, numbers
from workers.engine.bindings import gemm, native

#: Newest cells of each text that others do not share, or that lie between those of others.
_NEWEST = 32

Halves = npt.NDArray[np.float16]
Seen = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Shape:
    """Heads of queries, heads of keys, and columns of a head: of its key and of its value."""

    queries: int
    keys: int
    columns: int
    value_columns: int


class Attention(Operation):
    """
    The attention of tokens to cells.

    Queries have the shape (streams, tokens, heads, columns), keys and values (streams, cells, heads, columns), the mask
    (streams, tokens, cells) or (1, tokens, cells), sinks (heads,), and results (streams, tokens, heads, columns).
    In memory the heads of a cell are neighbours, or with `by_heads` the cells of a head.
    """

    def __init__(
        self,
        backend: Backend,
        queries: Floats,
        keys: Halves,
        values: Halves,
        mask: Halves | None,
        sinks: Floats | None = None,
        *,
        by_heads: bool = False,
    ) -> None:
        super().__init__(backend)
        permute = native.bound("ggml_permute", c_void_p, c_void_p, c_void_p, *(c_int,) * 4)
        given: list[tuple[int, npt.NDArray[Any]]] = []
        pointers: list[int | None] = []
        for type_, array in ((FLOAT, queries), (HALF, keys), (HALF, values)):
            stored = np.ascontiguousarray(array.swapaxes(1, 2)) if by_heads else array
            given.append((self.tensor(type_, *reversed(stored.shape)), stored))
            pointers.append(given[-1][0] if by_heads else permute(self._context, given[-1][0], 0, 2, 1, 3))
        streams, tokens, heads, columns = queries.shape
        if mask is not None:
            given.append((self.tensor(HALF, mask.shape[2], mask.shape[1], 1, mask.shape[0]), mask))
        pointers.append(None if mask is None else given[-1][0])
        attend = native.bound("ggml_flash_attn_ext", *(c_void_p,) * 6, *(c_float,) * 3)
        result = attend(self._context, *pointers, columns**-0.5, 0.0, 0.0)
        if sinks is not None:
            given.append((self.tensor(FLOAT, heads), sinks))
            native.bound("ggml_flash_attn_ext_add_sinks", None, c_void_p, c_void_p)(result, given[-1][0])
        self.build(result, (streams, tokens, heads, values.shape[-1]), *given)


def shared(texts: int, cells: int) -> Seen:
    """Which cells the texts see, shape (1, texts, cells): they share all but the newest of each."""
    newest = np.repeat(np.eye(texts, dtype=bool), _NEWEST, 0).T
    return np.concatenate([np.ones((texts, cells), bool), newest], 1)[None]


def unified(texts: int, cells: int) -> Seen:
    """The newest cells of each text lie between those of the others."""
    older = np.repeat(np.eye(texts, dtype=bool), cells - _NEWEST, 1)
    return np.concatenate([older, np.tile(np.eye(texts, dtype=bool), _NEWEST)], 1)[None]


def streams(texts: int, cells: int) -> Seen:
    """Each text has a buffer."""
    return np.ones((texts, 1, cells), bool)


def prompt(tokens: int, cells: int) -> Seen:
    """A prompt after so many cells: each token sees those before it."""
    return np.concatenate([np.ones((tokens, cells), bool), np.tri(tokens, dtype=bool)], 1)[None]


def masked(seen: Seen) -> Halves:
    """The mask that shows these cells."""
    return np.where(seen, 0, -np.inf).astype(np.float16)


def random_cells(shape: Shape, streams: int, tokens: int, cells: int) -> tuple[Floats, Halves, Halves]:
    """Random queries, keys and values."""
    random = np.random.default_rng(cells + tokens)
    queries = random.standard_normal((streams, tokens, shape.queries, shape.columns), np.float32)
    keys = random.standard_normal((streams, cells, shape.keys, shape.columns), np.float32)
    values = random.standard_normal((streams, cells, shape.keys, shape.value_columns), np.float32)
    return queries, keys.astype(np.float16), values.astype(np.float16)


CASES: dict[str, tuple[Callable[[int, int], Seen], Sequence[int]]] = {
    "streams": (streams, (1, 2, 8)),
    "unified": (unified, (4, 16)),
    "shared": (shared, (4, 8, 16, 32)),
    "prompt": (prompt, (16, 64, 512)),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""

    def heads(value: str) -> list[int]:
        if len(found := numbers(value)) != 2 or found[0] % found[1]:
            raise argparse.ArgumentTypeError(f"{value} is not heads of queries, a multiple, and heads of keys: 9,3")
        return found

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--heads", type=heads, default=[9, 3], metavar="QUERIES,KEYS")
    parser.add_argument("--columns", type=int, default=64, metavar="N", help="of each head")
    parser.add_argument("--cells", type=numbers, default=[100, 500, 1500], metavar="N,…", help="of each text")
    parser.add_argument("--turns", type=int, default=12, help="by each of the two")
    asked = parser.parse_args(arguments)
    if min(asked.cells) < _NEWEST:
        parser.error(f"argument --cells: {min(asked.cells)} is less than the {_NEWEST} newest of each text")
    if gemm.use() != gemm.AVX512:
        parser.exit(1, "llama.cpp was built without deploy/ggml-attention.cpp, or the processor lacks AVX-512\n")
    backend, (queries, keys) = Backend(asked.threads), asked.heads
    print("times as fast as ggml's kernels, by cells; in brackets ms of both, and the difference of the results")
    for name, (seen, counts) in CASES.items():
        for count in counts:
            row = []
            for cells in asked.cells:
                shape = Shape(queries, keys, asked.columns, asked.columns)
                shown = seen(count, cells)
                attention = Attention(backend, *random_cells(shape, *shown.shape), masked(shown))
                ggml, ours, error = measure(attention, attention, gemm.AVX512, asked.turns)
                attention.close()
                row.append(f"{cells}: {ggml / ours:5.2f} ({ggml * 1e3:.3f}, {ours * 1e3:.3f}; {error:.0e})")
            print(f"{name:8} {count:3}", *row, sep="  ", flush=True)


if __name__ == "__main__":
    main()
