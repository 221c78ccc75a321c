"""
KV cell accounting: the exact number of cells of the KV cache that each sequence holds or has reserved.

llama.cpp has no call that returns the cells in use, and a decode without free cells fails. So they are counted here.
A cell that several sequences share counts once. It is free when the last of them releases it.
A running sequence has a reservation: the length it may grow to. Used plus reserved cells never exceed the capacity, so
a decode always finds its cells.
With streams each sequence has its own cells: sharing is copying, and the capacity is that of one sequence.

This module does not know tokens or llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterable


class _Span:
    """Consecutive cells with the same holders."""

    __slots__ = ("holders", "length")

    def __init__(self, length: int, holders: int) -> None:
        self.length = length
        self.holders = holders


class Cells:
    """The cell accounting of one context."""

    def __init__(self, capacity: int, *, streams: bool = False) -> None:
        #: Cells of the whole cache; with streams, cells of one sequence.
        self.capacity = capacity
        self.streams = streams
        #: Cells that at least one sequence holds.
        self.used = 0
        self._chains: dict[int, list[_Span]] = {}
        self._lengths: dict[int, int] = {}
        self._reserved: dict[int, int] = {}

    def length(self, sequence: int) -> int:
        """Cells that the sequence holds, shared ones included."""
        return self._lengths.get(sequence, 0)

    def held_by(self, sequences: Iterable[int], also: tuple[int, int] | None = None) -> int:
        """Cells that any of the sequences holds, plus the first `count` cells of `also`: (sequence, count)."""
        spans = {id(span): span.length for sequence in sequences for span in self._chains.get(sequence, ())}
        if also is not None:
            sequence, left = also
            for span in self._chains.get(sequence, ()):
                if left <= 0:
                    break
                spans.setdefault(id(span), min(span.length, left))
                left -= span.length
        return sum(spans.values())

    def reserved_unused(self) -> int:
        """Cells that are reserved and not yet used."""
        return sum(reserved - self._lengths.get(sequence, 0) for sequence, reserved in self._reserved.items())

    def free(self) -> int:
        """Cells that can be reserved now without dropping any sequence."""
        return self.capacity if self.streams else self.capacity - self.used - self.reserved_unused()

    def reserve(self, sequence: int, length: int) -> None:
        """Reserve cells for the sequence to grow to `length`. The caller has checked that there is room."""
        more = length - self.length(sequence)
        if more < 0 or more > (self.free() if not self.streams else self.capacity - self.length(sequence)):
            raise AssertionError(f"no room to reserve {more} more cells for sequence {sequence}")
        self._reserved[sequence] = length

    def release_unused(self, sequence: int) -> None:
        """End the growth of the sequence: the unused part of its reservation is free."""
        self._reserved.pop(sequence, None)

    def extend(self, sequence: int, count: int) -> None:
        """Add `count` cells to the sequence, within its reservation."""
        length = self._lengths.get(sequence, 0) + count
        if length > self._reserved.get(sequence, 0):
            raise AssertionError(f"sequence {sequence} grows to {length} cells, past its reservation")
        chain = self._chains.setdefault(sequence, [])
        if chain and chain[-1].holders == 1:
            chain[-1].length += count
        else:
            chain.append(_Span(count, 1))
        self._lengths[sequence] = length
        self.used += count

    def share(self, source: int, target: int, count: int) -> None:
        """Share the first `count` cells of `source` with the empty sequence `target`."""
        if self.length(target) or count > self.length(source):
            raise AssertionError(f"sequence {target} cannot share {count} cells of sequence {source}")
        if not count:
            return
        self._lengths[target] = count
        if self.streams:
            self._chains[target] = [_Span(count, 1)]
            self.used += count
            return
        index = self._split(source, count)
        self._chains[target] = self._chains[source][:index]
        for span in self._chains[target]:
            span.holders += 1

    def restore(self, sequence: int, count: int) -> None:
        """Add `count` cells of a restored state to the empty sequence, within its reservation."""
        if self.length(sequence):
            raise AssertionError(f"sequence {sequence} is not empty")
        if count:
            self.extend(sequence, count)

    def truncate(self, sequence: int, count: int) -> None:
        """Truncate the sequence to its first `count` cells."""
        if count >= self.length(sequence):
            return
        index = self._split(sequence, count)
        chain = self._chains[sequence]
        for span in chain[index:]:
            self._release(span)
        del chain[index:]
        self._lengths[sequence] = count

    def drop(self, sequence: int) -> None:
        """Remove the sequence and its reservation."""
        self._reserved.pop(sequence, None)
        self._lengths.pop(sequence, None)
        for span in self._chains.pop(sequence, ()):
            self._release(span)

    def clear(self) -> None:
        """Remove all sequences and reservations."""
        self._chains.clear()
        self._lengths.clear()
        self._reserved.clear()
        self.used = 0

    def _release(self, span: _Span) -> None:
        span.holders -= 1
        if not span.holders:
            self.used -= span.length

    def _split(self, sequence: int, count: int) -> int:
        """Split the spans after `count` cells of the sequence. Returns the number of spans before that place."""
        position = 0
        for index, span in enumerate(self._chains[sequence]):
            if position == count:
                return index
            if position + span.length > count:
                tail = _Span(position + span.length - count, span.holders)
                span.length = count - position
                for chain in self._chains.values():
                    for at, other in enumerate(chain):
                        if other is span:
                            chain.insert(at + 1, tail)
                            break
                return index + 1
            position += span.length
        return len(self._chains[sequence])
