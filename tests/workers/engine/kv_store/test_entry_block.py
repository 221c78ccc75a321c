"""The entries of a prefix in a file: tokens and images come back as they were, and nothing else does."""

from __future__ import annotations

from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.engine.kv_store import entry_block
from workers.engine.vision.image_spans import entries_of

TEXTS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5).map(tuple)
IMAGES = st.builds(entries_of, st.binary(min_size=32, max_size=32), st.integers(1, 5))


@given(st.lists(TEXTS | IMAGES, min_size=1, max_size=6))
def test_tokens_and_images_come_back(parts: list[tuple[int, ...]]) -> None:
    """Also an image directly after another one, or after itself."""
    entries = tuple(chain.from_iterable(parts))
    block, images = entry_block.pack(entries)
    assert images == sum(part[0] < 0 for part in parts)
    assert len(block) == entry_block.size_of(len(entries), images)
    assert entry_block.unpack(block, len(entries), images) == entries


def test_other_pixels_are_another_image() -> None:
    """In all of the 32 bytes of the digest."""
    digest = bytes(range(32))
    for at in range(32):
        other = digest[:at] + bytes([digest[at] ^ 1]) + digest[at + 1 :]
        assert not set(entries_of(digest, 5)) & set(entries_of(other, 5))


ENTRIES = (*range(3), *entries_of(b"d" * 32, 4), *range(2))
BLOCK = entry_block.pack(ENTRIES)[0]
ROWS = 4 * len(ENTRIES)


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (ROWS, (2).to_bytes(4, "little")),  # it begins at a token
        (ROWS, (2**32 - 1).to_bytes(4, "little")),  # behind the entries
        (ROWS + 4, (5).to_bytes(4, "little")),  # it ends behind its cells
        (ROWS + 4, (3).to_bytes(4, "little")),  # a cell belongs to no image
        (ROWS + 4, (0).to_bytes(4, "little")),
        (ROWS + 4, (2**32 - 1).to_bytes(4, "little")),
        (0, (-1).to_bytes(4, "little", signed=True)),
        (12, (-2).to_bytes(4, "little", signed=True)),
    ],
)
def test_a_block_that_contradicts_itself_is_refused(at: int, value: bytes) -> None:
    assert entry_block.unpack(BLOCK[:at] + value + BLOCK[at + len(value) :], len(ENTRIES), 1) is None


def test_a_block_of_other_lengths_is_refused() -> None:
    assert entry_block.unpack(BLOCK[:-1], len(ENTRIES), 1) is None
    assert entry_block.unpack(BLOCK, len(ENTRIES), 2) is None
    assert entry_block.unpack(BLOCK, 2**32, 1) is None
