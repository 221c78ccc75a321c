"""
Cells: who holds how many places of the KV cache, exactly.

llama.cpp has no call that says how many cells are in use; a decode that finds none fails. So they are counted here.
A cell that several sequences share counts once, and is free when the last of them lets go.
A sequence under way has a promise: the length it may grow to. What is used and what is promised never passes the
capacity, so a decode always finds its cells.
With streams each sequence has cells of its own: sharing is copying, and the capacity is that of one sequence.

Nothing here knows tokens or llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterable


class _Run:
    """Cells that follow each other and have the same holders."""

    __slots__ = ("holders", "length")

    def __init__(self, length: int, holders: int) -> None:
        self.length = length
        self.holders = holders


class Cells:
    """The count for one context."""

    def __init__(self, capacity: int, *, streams: bool = False) -> None:
        #: Cells of the whole cache, or of one sequence where each has a stream.
        self.capacity = capacity
        self.streams = streams
        #: Cells that some sequence holds.
        self.used = 0
        self._chains: dict[int, list[_Run]] = {}
        self._lengths: dict[int, int] = {}
        self._promised: dict[int, int] = {}

    def length(self, sequence: int) -> int:
        """Cells that the sequence holds, shared ones too."""
        return self._lengths.get(sequence, 0)

    def held(self, sequences: Iterable[int], also: tuple[int, int] | None = None) -> int:
        """Cells that one of the sequences holds, or that are the first `count` of `also`: (sequence, count)."""
        runs = {id(run): run.length for sequence in sequences for run in self._chains.get(sequence, ())}
        if also is not None:
            sequence, left = also
            for run in self._chains.get(sequence, ()):
                if left <= 0:
                    break
                runs.setdefault(id(run), min(run.length, left))
                left -= run.length
        return sum(runs.values())

    def growth(self) -> int:
        """Cells that are promised and not yet used."""
        return sum(promised - self._lengths.get(sequence, 0) for sequence, promised in self._promised.items())

    def free(self) -> int:
        """Cells that can be promised now without dropping anything."""
        return self.capacity if self.streams else self.capacity - self.used - self.growth()

    def promise(self, sequence: int, length: int) -> None:
        """Let the sequence grow to `length`. The caller has seen that there is room."""
        more = length - self.length(sequence)
        if more < 0 or more > (self.free() if not self.streams else self.capacity - self.length(sequence)):
            raise AssertionError(f"no room to promise {more} more cells to sequence {sequence}")
        self._promised[sequence] = length

    def settle(self, sequence: int) -> None:
        """The sequence grows no more: what it did not use of its promise is free."""
        self._promised.pop(sequence, None)

    def extend(self, sequence: int, count: int) -> None:
        """The sequence got `count` more tokens, within its promise."""
        length = self._lengths.get(sequence, 0) + count
        if length > self._promised.get(sequence, 0):
            raise AssertionError(f"sequence {sequence} grows to {length} past its promise")
        chain = self._chains.setdefault(sequence, [])
        if chain and chain[-1].holders == 1:
            chain[-1].length += count
        else:
            chain.append(_Run(count, 1))
        self._lengths[sequence] = length
        self.used += count

    def share(self, source: int, target: int, count: int) -> None:
        """Give the empty sequence `target` the first `count` cells of `source`."""
        if self.length(target) or count > self.length(source):
            raise AssertionError(f"sequence {target} cannot take {count} cells of sequence {source}")
        if not count:
            return
        self._lengths[target] = count
        if self.streams:
            self._chains[target] = [_Run(count, 1)]
            self.used += count
            return
        index = self._split(source, count)
        self._chains[target] = self._chains[source][:index]
        for run in self._chains[target]:
            run.holders += 1

    def adopt(self, sequence: int, count: int) -> None:
        """The empty sequence has `count` new cells, from a state that was written back, within its promise."""
        if self.length(sequence):
            raise AssertionError(f"sequence {sequence} is not empty")
        if count:
            self.extend(sequence, count)

    def cut(self, sequence: int, count: int) -> None:
        """Keep the first `count` cells of the sequence."""
        if count >= self.length(sequence):
            return
        index = self._split(sequence, count)
        chain = self._chains[sequence]
        for run in chain[index:]:
            self._release(run)
        del chain[index:]
        self._lengths[sequence] = count

    def drop(self, sequence: int) -> None:
        """The sequence is gone, and its promise with it."""
        self._promised.pop(sequence, None)
        self._lengths.pop(sequence, None)
        for run in self._chains.pop(sequence, ()):
            self._release(run)

    def clear(self) -> None:
        """Nothing is held and nothing promised."""
        self._chains.clear()
        self._lengths.clear()
        self._promised.clear()
        self.used = 0

    def _release(self, run: _Run) -> None:
        run.holders -= 1
        if not run.holders:
            self.used -= run.length

    def _split(self, sequence: int, count: int) -> int:
        """Let a run end after `count` cells of the sequence; give the number of runs before that place."""
        position = 0
        for index, run in enumerate(self._chains[sequence]):
            if position == count:
                return index
            if position + run.length > count:
                tail = _Run(position + run.length - count, run.holders)
                run.length = count - position
                for chain in self._chains.values():
                    for at, other in enumerate(chain):
                        if other is run:
                            chain.insert(at + 1, tail)
                            break
                return index + 1
            position += run.length
        return len(self._chains[sequence])
