"""The prefix index, compared with a linear search over all sequences."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from workers.engine.prefix import PrefixIndex, common_length

SEQUENCES = st.integers(0, 7)
TOKENS = st.lists(st.integers(0, 2), max_size=12).map(tuple)


def reference_common_length(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    return next((at for at, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


@given(TOKENS, TOKENS)
def test_common_prefix(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    assert common_length(left, right) == reference_common_length(left, right)


class PrefixSearch(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.tokens: dict[int, tuple[int, ...]] = {}
        self.computed: dict[int, int] = {}
        self.kept: list[int] = []

    @rule(sequence=SEQUENCES, tokens=TOKENS, done=st.integers(0, 12))
    def insert(self, sequence: int, tokens: tuple[int, ...], done: int) -> None:
        done = min(done, len(tokens))
        self.index.insert(sequence, tokens, done)
        self.tokens[sequence], self.computed[sequence] = tokens, done
        self.kept = [kept for kept in self.kept if kept != sequence]

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def advance(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.tokens)))
        done = data.draw(st.integers(self.computed[sequence], len(self.tokens[sequence])))
        self.index.advance(sequence, done)
        self.computed[sequence] = done

    @rule(sequence=SEQUENCES, tokens=TOKENS.filter(bool))
    def keep(self, sequence: int, tokens: tuple[int, ...]) -> None:
        held = any(
            reference_common_length(tokens, other) == len(tokens)
            for owner, other in self.tokens.items()
            if owner != sequence
        )
        assert self.index.keep(sequence, tokens) == (not held)
        self.kept = [kept for kept in self.kept if kept != sequence]
        if held:
            self.tokens.pop(sequence, None)
            self.computed.pop(sequence, None)
        else:
            self.tokens[sequence], self.computed[sequence] = tokens, len(tokens)
            self.kept.append(sequence)

    @rule(sequence=SEQUENCES)
    def remove(self, sequence: int) -> None:
        self.index.remove(sequence)
        self.tokens.pop(sequence, None)
        self.computed.pop(sequence, None)
        self.kept = [kept for kept in self.kept if kept != sequence]

    @rule(sequence=SEQUENCES)
    def touch(self, sequence: int) -> None:
        self.index.touch(sequence)
        if sequence in self.kept:
            self.kept = [*(kept for kept in self.kept if kept != sequence), sequence]

    @rule(tokens=TOKENS)
    def find(self, tokens: tuple[int, ...]) -> None:
        found = self.index.find(tokens)
        shared = {sequence: reference_common_length(tokens, held) for sequence, held in self.tokens.items()}
        best = max((min(length, self.computed[sequence]) for sequence, length in shared.items()), default=0)
        pending = max((n for s, n in shared.items() if n > self.computed[s]), default=0)
        assert found.length == best
        if best:
            assert found.source is not None
            assert min(shared[found.source], self.computed[found.source]) == best
        assert found.pending_length == (pending if pending > best else 0)
        if found.pending_length:
            assert found.pending_source is not None
            assert shared[found.pending_source] == pending

    @invariant()
    def same_sequences_in_the_same_order(self) -> None:
        assert list(self.index.kept) == self.kept
        assert all(sequence in self.index for sequence in self.tokens)


PrefixSearch.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPrefixSearch = PrefixSearch.TestCase


def test_the_shortest_kept_sequence_is_preferred() -> None:
    index = PrefixIndex()
    index.keep(0, (1, 2, 3, 4, 5))
    index.insert(1, (1, 2, 3), 3)
    index.keep(2, (1, 2, 9))
    assert index.find((1, 2)).source == 2
    assert index.find((1, 2, 3)).source == 0
