"""
Character sets: sorted ranges of code points, and the sets that a grammar uses.

A range is a pair of its first and last code point. The ranges of a set neither touch nor overlap.
NUL is never written, because Postgres stores no text with it. Surrogates are not characters.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

Ranges: TypeAlias = tuple[tuple[int, int], ...]

#: All characters that a string may contain; the universe of negated classes. Control characters that "any character"
#: does not usually mean are left out.
ANY: Ranges = ((0x09, 0x0A), (0x0D, 0x0D), (0x20, 0x7E), (0xA0, 0xD7FF), (0xE000, 0x10FFFF))

#: Characters that need no escape in a JSON string (RFC 8259 §7), without DEL and the C1 controls.
PLAIN: Ranges = ((0x20, 0x21), (0x23, 0x5B), (0x5D, 0x7E), (0xA0, 0xD7FF), (0xE000, 0x10FFFF))

#: The short escapes of JSON, without the slash, which needs no escape.
SHORT = {0x08: "b", 0x09: "t", 0x0A: "n", 0x0C: "f", 0x0D: "r", 0x22: '"', 0x5C: "\\"}


def union(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Returns the set of all code points in the ranges, which may overlap."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return tuple(merged)


def intersection(one: Ranges, other: Ranges) -> Ranges:
    pairs = ((max(a, c), min(b, d)) for a, b in one for c, d in other)
    return union((low, high) for low, high in pairs if low <= high)


def difference(one: Ranges, other: Ranges) -> Ranges:
    """Returns the code points that are in the first set and not in the second."""
    left: list[tuple[int, int]] = []
    for low, high in one:
        start = low
        for cut_low, cut_high in other:
            if cut_high < start or cut_low > high:
                continue
            if cut_low > start:
                left.append((start, cut_low - 1))
            start = cut_high + 1
        if start <= high:
            left.append((start, high))
    return tuple(left)
