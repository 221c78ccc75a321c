"""KV cell accounting, compared with a model of numbered cells."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from workers.engine.cells import Cells

CAPACITY = 60
SEQUENCES = st.integers(0, 5)


class CellAccounting(RuleBasedStateMachine):
    """The reference stores the cell numbers of each sequence; sharing copies numbers. Both must always agree."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = Cells(CAPACITY)
        self.real: dict[int, list[int]] = {}
        self.reserved: dict[int, int] = {}
        self.next = 0

    def free(self) -> int:
        used = {cell for chain in self.real.values() for cell in chain}
        unused = sum(length - len(self.real.get(sequence, [])) for sequence, length in self.reserved.items())
        return CAPACITY - len(used) - unused

    @rule(sequence=SEQUENCES, more=st.integers(0, 20))
    def reserve(self, sequence: int, more: int) -> None:
        if sequence in self.reserved:
            return
        length = len(self.real.get(sequence, [])) + more
        if more > self.free():
            with pytest.raises(AssertionError):
                self.cells.reserve(sequence, length)
        else:
            self.cells.reserve(sequence, length)
            self.reserved[sequence] = length

    @precondition(lambda self: self.reserved)
    @rule(data=st.data(), count=st.integers(1, 8))
    def extend(self, data: st.DataObject, count: int) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.reserved)))
        if len(self.real.get(sequence, [])) + count > self.reserved[sequence]:
            with pytest.raises(AssertionError):
                self.cells.extend(sequence, count)
            return
        self.cells.extend(sequence, count)
        self.real.setdefault(sequence, []).extend(range(self.next, self.next + count))
        self.next += count

    @rule(source=SEQUENCES, destination=SEQUENCES, count=st.integers(0, 20))
    def share(self, source: int, destination: int, count: int) -> None:
        if self.real.get(destination) or destination in self.reserved or count > len(self.real.get(source, [])):
            return
        self.cells.share(source, destination, count)
        self.real[destination] = self.real.get(source, [])[:count]

    @rule(sequence=SEQUENCES, count=st.integers(0, 20))
    def truncate(self, sequence: int, count: int) -> None:
        self.cells.truncate(sequence, count)
        self.real[sequence] = self.real.get(sequence, [])[:count]
        if sequence in self.reserved:  # only finished sequences are truncated, so the reservation ends
            self.cells.release_unused(sequence)
            del self.reserved[sequence]

    @rule(sequence=SEQUENCES)
    def release_unused(self, sequence: int) -> None:
        self.cells.release_unused(sequence)
        self.reserved.pop(sequence, None)

    @rule(sequence=SEQUENCES)
    def drop(self, sequence: int) -> None:
        self.cells.drop(sequence)
        self.real.pop(sequence, None)
        self.reserved.pop(sequence, None)

    @rule(some=st.sets(SEQUENCES), also=SEQUENCES, count=st.integers(0, 20))
    def held_by(self, some: set[int], also: int, count: int) -> None:
        cells = {cell for sequence in some for cell in self.real.get(sequence, [])}
        assert self.cells.held_by(some) == len(cells)
        if count <= len(self.real.get(also, [])):
            assert self.cells.held_by(some, also=(also, count)) >= len(cells | set(self.real.get(also, [])[:count]))
            assert self.cells.held_by((), also=(also, count)) == count

    @invariant()
    def exact(self) -> None:
        assert self.cells.used == len({cell for chain in self.real.values() for cell in chain})
        assert self.cells.free() == self.free() >= 0
        for sequence, chain in self.real.items():
            assert self.cells.length(sequence) == len(chain)


CellAccounting.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestCellAccounting = CellAccounting.TestCase


def test_streams_copy_cells_and_have_their_own_capacity() -> None:
    cells = Cells(10, streams=True)
    cells.reserve(0, 10)
    cells.extend(0, 8)
    cells.share(0, 1, 5)
    assert cells.used == 13
    cells.reserve(1, 10)
    with pytest.raises(AssertionError):
        cells.reserve(1, 11)
