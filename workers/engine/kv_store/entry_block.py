"""
The entries of a prefix in a state file: its tokens, and the cells of its images.

A block has 4 bytes for each entry, in little-endian order: the token, or -1 for a cell of an image. Behind them comes a
row for each image: index of its first entry (4), cells (4), and the SHA-256 digest that names its pixels and the part
of the image (32). So an image counts as the same in another process only if all of its pixels are.

Lengths are checked before anything is made of them. Nothing here opens a file.
"""

from __future__ import annotations

import struct

import numpy as np

from workers.engine.vision.image_spans import DIGEST_BYTES, MAX_CELLS, cell_of, entries_of

_IMAGE = struct.Struct(f"<II{DIGEST_BYTES}s")
_CELL = -1


def size_of(entries: int, images: int) -> int:
    """Return the bytes of a block."""
    return 4 * entries + _IMAGE.size * images


def pack(entries: tuple[int, ...]) -> tuple[bytes, int]:
    """Return the block of a prefix, and the number of its images."""
    if min(entries) >= 0:
        return np.asarray(entries, "<i4").tobytes(), 0
    rows: list[tuple[int, int, bytes]] = []
    for index, entry in enumerate(entries):
        if entry >= 0:
            continue
        digest, cell = cell_of(entry)
        if not cell:
            rows.append((index, 1, digest))
        else:  # an image begins with its first cell, because a prefix begins at the beginning
            rows[-1] = (rows[-1][0], cell + 1, digest)
    tokens = np.asarray([max(entry, _CELL) for entry in entries], "<i4").tobytes()
    return tokens + b"".join(_IMAGE.pack(*row) for row in rows), len(rows)


def unpack(block: bytes, count: int, images: int) -> tuple[int, ...] | None:
    """Return the entries of a block of `count` entries and `images` images; None when it is no such block."""
    if len(block) != size_of(count, images):
        return None
    tokens = np.frombuffer(block, "<i4", count)
    is_cell, parts, at = tokens < 0, list[int](), 0
    for number in range(images):
        first, cells, digest = _IMAGE.unpack_from(block, 4 * count + _IMAGE.size * number)
        if not at <= first < first + cells <= count or cells > MAX_CELLS:
            return None
        if is_cell[at:first].any() or (tokens[first : first + cells] != _CELL).any():
            return None
        parts += tokens[at:first].tolist()
        parts += entries_of(digest, cells)
        at = first + cells
    if is_cell[at:].any():
        return None
    return (*parts, *tokens[at:].tolist())
