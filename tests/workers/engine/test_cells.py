"""The count of KV cells, against a cache of numbered cells."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from workers.engine.cells import Cells

CAPACITY = 60
SEQUENCES = st.integers(0, 5)


class CountedLikeNumbered(RuleBasedStateMachine):
    """Each sequence is a list of cell numbers; sharing copies numbers. The count says the same at each moment."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = Cells(CAPACITY)
        self.real: dict[int, list[int]] = {}
        self.promised: dict[int, int] = {}
        self.next = 0

    def free(self) -> int:
        used = {cell for chain in self.real.values() for cell in chain}
        growth = sum(length - len(self.real.get(sequence, [])) for sequence, length in self.promised.items())
        return CAPACITY - len(used) - growth

    @rule(sequence=SEQUENCES, more=st.integers(0, 20))
    def promise(self, sequence: int, more: int) -> None:
        if sequence in self.promised:
            return
        length = len(self.real.get(sequence, [])) + more
        if more > self.free():
            with pytest.raises(AssertionError):
                self.cells.promise(sequence, length)
        else:
            self.cells.promise(sequence, length)
            self.promised[sequence] = length

    @precondition(lambda self: self.promised)
    @rule(data=st.data(), count=st.integers(1, 8))
    def extend(self, data: st.DataObject, count: int) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.promised)))
        if len(self.real.get(sequence, [])) + count > self.promised[sequence]:
            with pytest.raises(AssertionError):
                self.cells.extend(sequence, count)
            return
        self.cells.extend(sequence, count)
        self.real.setdefault(sequence, []).extend(range(self.next, self.next + count))
        self.next += count

    @rule(source=SEQUENCES, to=SEQUENCES, count=st.integers(0, 20))
    def share(self, source: int, to: int, count: int) -> None:
        if self.real.get(to) or to in self.promised or count > len(self.real.get(source, [])):
            return
        self.cells.share(source, to, count)
        self.real[to] = self.real.get(source, [])[:count]

    @rule(sequence=SEQUENCES, count=st.integers(0, 20))
    def cut(self, sequence: int, count: int) -> None:
        self.cells.cut(sequence, count)
        self.real[sequence] = self.real.get(sequence, [])[:count]
        if sequence in self.promised:  # a cut sequence gives its promise back: nobody cuts a running one
            self.cells.settle(sequence)
            del self.promised[sequence]

    @rule(sequence=SEQUENCES)
    def settle(self, sequence: int) -> None:
        self.cells.settle(sequence)
        self.promised.pop(sequence, None)

    @rule(sequence=SEQUENCES)
    def drop(self, sequence: int) -> None:
        self.cells.drop(sequence)
        self.real.pop(sequence, None)
        self.promised.pop(sequence, None)

    @rule(some=st.sets(SEQUENCES), also=SEQUENCES, count=st.integers(0, 20))
    def held_by_some(self, some: set[int], also: int, count: int) -> None:
        cells = {cell for sequence in some for cell in self.real.get(sequence, [])}
        assert self.cells.held(some) == len(cells)
        if count <= len(self.real.get(also, [])):
            assert self.cells.held(some, also=(also, count)) >= len(cells | set(self.real.get(also, [])[:count]))
            assert self.cells.held((), also=(also, count)) == count

    @invariant()
    def exact(self) -> None:
        assert self.cells.used == len({cell for chain in self.real.values() for cell in chain})
        assert self.cells.free() == self.free() >= 0
        for sequence, chain in self.real.items():
            assert self.cells.length(sequence) == len(chain)


CountedLikeNumbered.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestCountedLikeNumbered = CountedLikeNumbered.TestCase


def test_streams_copy_and_have_a_capacity_each() -> None:
    cells = Cells(10, streams=True)
    cells.promise(0, 10)
    cells.extend(0, 8)
    cells.share(0, 1, 5)
    assert cells.used == 13
    cells.promise(1, 10)
    with pytest.raises(AssertionError):
        cells.promise(1, 11)
