"""
Ancestry: for each step of a graph, those that come before it.

A chain of n steps has n²/2 pairs. They are kept as bits, one integer for each step, and looked up one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any


class Ancestors(Set[str]):
    """The steps before one step."""

    __slots__ = ("_bits", "_keys", "_places")

    def __init__(self, keys: Sequence[str], places: Mapping[str, int], bits: int) -> None:
        self._keys, self._places, self._bits = keys, places, bits

    def __contains__(self, key: object) -> bool:
        place = self._places.get(key) if isinstance(key, str) else None
        return place is not None and bool(self._bits >> place & 1)

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
    The ancestors of each step of `ordered`, where each stands after those that it needs.

    Those of `late` come after all that are `regular`, too.
    """
    places = {key: place for place, key in enumerate(ordered)}
    bits: dict[str, int] = {}
    for key in ordered:
        own = 0
        for need in needs[key]:
            own |= bits[need] | 1 << places[need]
        bits[key] = own
    before_late = _bits(regular, places)
    for key in late:
        if key in bits:
            bits[key] |= before_late
    return {key: Ancestors(ordered, places, bits[key]) for key in ordered}


def _bits(keys: Iterable[str], places: Mapping[str, int]) -> int:
    bits = 0
    for key in keys:
        if key in places:
            bits |= 1 << places[key]
    return bits
