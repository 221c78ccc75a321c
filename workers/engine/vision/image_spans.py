"""
Image spans: the places of images in the tokens of a prompt, and the positions that follow from them.

A span has an entry in the prompt for each of its cells, a negative number that is no token. The numbers follow from the
hash of the image, so equal prompts have equal entries, and prefixes are shared and kept as those of texts are. The
numbers are whole SHA-256 digests and say the same in every process, so they may be stored.

With M-RoPE an image of many cells advances the positions by few, so cells and positions are counted apart.

This module does not know llama.cpp.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

#: Bits of an entry for the place of the cell, below the digest of the chunk. More cells than any image has.
_CELL_BITS = 24
#: Bytes of a digest.
DIGEST_BYTES = 32
#: Most cells of an image.
MAX_CELLS = 1 << _CELL_BITS

#: Embeddings of an image: a row for each cell.
Embeddings = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class ImageChunk:
    """A part of a preprocessed image that is encoded, and decoded, as a whole."""

    #: Names the pixels and the part: equal keys have equal embeddings.
    key: str
    #: Cells of the KV cache.
    cells: int
    #: Positions by which it advances the text; `cells` unless the model has M-RoPE.
    positions: int
    #: With M-RoPE, the positions of its cells, relative to its first: three rows of `cells`; else None.
    grid: npt.NDArray[np.int32] | None = None
    #: Its cells attend to each other in both directions, so they are computed in one micro-batch.
    non_causal: bool = False
    #: The chunk in llama.cpp's library, which is freed with this object.
    handle: Any = None

    def entries(self) -> tuple[int, ...]:
        """Return its entries in the tokens of a prompt."""
        return entries_of(hashlib.sha256(self.key.encode()).digest(), self.cells)


@dataclass(frozen=True, slots=True, eq=False)
class ImageSpan:
    """A chunk at its place in a prompt."""

    #: Index of its first entry in the tokens.
    start: int
    chunk: ImageChunk

    @property
    def end(self) -> int:
        """Index after its last entry."""
        return self.start + self.chunk.cells


def entries_of(digest: bytes, cells: int) -> tuple[int, ...]:
    """Return the entries of the first `cells` cells of a chunk with this digest."""
    first = -1 - (int.from_bytes(digest) << _CELL_BITS)
    return tuple(range(first, first - cells, -1))


def cell_of(entry: int) -> tuple[bytes, int]:
    """Return the digest of the chunk, and the place of the cell in it, of an entry that is no token."""
    number, cell = divmod(-1 - entry, MAX_CELLS)
    return number.to_bytes(DIGEST_BYTES), cell


def span_at(spans: Sequence[ImageSpan], index: int) -> ImageSpan | None:
    """Return the span that the entry at this index belongs to, or None for a text token."""
    return next((span for span in spans if span.start <= index < span.end), None)


def until_span(spans: Sequence[ImageSpan], index: int) -> int | None:
    """Return how many text tokens come before the next span, from this index on; None when no span follows."""
    return next((span.start - index for span in spans if span.start >= index), None)


def before_spans(spans: Sequence[ImageSpan], length: int) -> int:
    """Return the length of the longest prefix, up to `length`, that does not end inside a span."""
    inside = next((span for span in spans if span.start < length < span.end), None)
    return length if inside is None else inside.start


def next_position(spans: Sequence[ImageSpan], count: int) -> int:
    """Return the position after the first `count` entries; inside a span with a grid, that after its first cell."""
    found = count
    for span in spans:
        if span.end <= count:
            found -= span.chunk.cells - span.chunk.positions
        elif span.start < count and span.chunk.grid is not None:
            found -= count - span.start - 1
    return found


def last_position(spans: Sequence[ImageSpan], count: int) -> int:
    """
    Return the highest position in the cache of a sequence of `count` entries, as llama.cpp counts it.

    The cells of an image with a grid all have the position of its first in the dimension that is counted.
    """
    span = span_at(spans, count - 1)
    if span is None or span.chunk.grid is None:
        return next_position(spans, count) - 1
    return next_position(spans, span.start)
