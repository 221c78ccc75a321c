"""
Ancestry: the ancestors of each step of a graph, as bit sets.

A chain of n steps has n²/2 pairs of step and ancestor. Each step keeps one integer with one bit for each ancestor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any


class Ancestors(Set[str]):
    """The ancestors of one step, as a read-only set."""

    __slots__ = ("_bits", "_keys", "_places")

    def __init__(self, keys: Sequence[str], positions: Mapping[str, int], bits: int) -> None:
        self._keys, self._places, self._bits = keys, positions, bits

    def __contains__(self, key: object) -> bool:
        position = self._places.get(key) if isinstance(key, str) else None
        return position is not None and bool(self._bits >> position & 1)

    def __iter__(self) -> Iterator[str]:
        bits = self._bits
        while bits:
            lowest = bits & -bits
            yield self._keys[lowest.bit_length() - 1]
            bits ^= lowest

    def __len__(self) -> int:
        return self._bits.bit_count()

    @classmethod
    def _from_iterable(cls, it: Iterable[Any]) -> frozenset[Any]:
        return frozenset(it)


def ancestors(
    ordered: Sequence[str], needs: Mapping[str, Iterable[str]], late: Iterable[str], regular: Iterable[str]
) -> dict[str, Ancestors]:
    """
    Return the ancestors of each step. `ordered` must be a topological order.

    All steps of `regular` are ancestors of each step of `late`, too.
    """
    positions = {key: position for position, key in enumerate(ordered)}
    bits: dict[str, int] = {}
    for key in ordered:
        own = 0
        for need in needs[key]:
            own |= bits[need] | 1 << positions[need]
        bits[key] = own
    before_late = _bits(regular, positions)
    for key in late:
        if key in bits:
            bits[key] |= before_late
    return {key: Ancestors(ordered, positions, bits[key]) for key in ordered}


def _bits(keys: Iterable[str], positions: Mapping[str, int]) -> int:
    bits = 0
    for key in keys:
        if key in positions:
            bits |= 1 << positions[key]
    return bits
