"""What leaves a tier next, and what is worth it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from workers.engine.kv_store.rates import Rates, SavingAllowance
from workers.engine.kv_store.state_file import StateHeader
from workers.engine.kv_store.state_folder import StateFile
from workers.engine.kv_store.tiers import StoredPrefix, choose_dropped, choose_written, make_room

FILE = StateFile(Path("a"), StateHeader((1,), 0, 1, b"", b"", 1))


def entry(number: int, size: int, state: str) -> StoredPrefix:
    """A prefix whose state is clean, dirty, being written, on disk, or for memory only."""
    data = None if state == "disk" else np.zeros(0, np.uint8)
    file = FILE if state in ("clean", "disk") else None
    return StoredPrefix(
        number, (number,), 0, size, data, file, is_writing=state == "writing", is_unwritten=state == "memory"
    )


STATES = st.sampled_from(["clean", "dirty", "writing", "disk", "memory"])
ENTRIES = st.lists(st.tuples(st.integers(1, 50), STATES), max_size=12)


def test_copies_of_files_are_dropped_first_and_the_oldest_of_them_first() -> None:
    kinds = ["dirty", "clean", "disk", "clean", "writing"]
    entries = [entry(number, 10, state) for number, state in enumerate(kinds)]
    assert [one.id for one in choose_dropped(entries, 25) or []] == [1, 3, 0]
    assert choose_dropped(entries, 31) is None
    assert choose_dropped(entries, 0) == []


@given(ENTRIES, st.integers(0, 300))
def test_enough_is_dropped_and_not_one_more(kinds: list[tuple[int, str]], excess: int) -> None:
    entries = [entry(number, size, state) for number, (size, state) in enumerate(kinds)]
    movable = [one for one in entries if one.data is not None and not one.is_writing]
    dropped = choose_dropped(entries, excess)
    if dropped is None:
        assert sum(one.size for one in movable) < excess
        return
    assert all(one in movable for one in dropped)
    assert sum(one.size for one in dropped) >= excess
    assert not dropped or sum(one.size for one in dropped[:-1]) < excess


@given(ENTRIES, st.integers(0, 60), st.integers(0, 60), st.integers(0, 200))
def test_states_that_pass_through_take_what_parked_texts_leave(
    kinds: list[tuple[int, str]], size: int, memory: int, total: int
) -> None:
    """Small ones stay within the memory, all together within the total. What is being written is not dropped."""
    entries = [entry(number, held, state) for number, (held, state) in enumerate(kinds)]
    dropped = make_room(entries, size, memory, total)
    writing = [one for one in entries if one.is_writing]
    if dropped is None:
        least = sum(one.memory for one in writing)
        small = sum(one.memory for one in writing if one.size <= memory)
        assert least + size > total or (size <= memory < small + size)
        return
    left = [one for one in entries if one not in dropped]
    assert all(one in left for one in writing)
    assert sum(one.memory for one in left) + size <= total
    if size <= memory:
        assert sum(one.memory for one in left if one.size <= memory) + size <= memory


@given(ENTRIES, st.integers(0, 300))
def test_what_would_be_lost_stays_within_the_limit(kinds: list[tuple[int, str]], limit: int) -> None:
    entries = [entry(number, size, state) for number, (size, state) in enumerate(kinds)]
    written = choose_written(entries, limit)
    assert all(one.is_dirty and not one.is_writing for one in written)
    left = [one for one in entries if one.is_dirty and one not in written and not one.is_writing]
    assert sum(one.size for one in left) <= limit
    assert not written or max(one.id for one in written) < min((one.id for one in left), default=99)


def test_a_state_is_restored_when_that_is_sooner_than_computing() -> None:
    rates = Rates()
    for _ in range(50):
        rates.note_restored(10**7, 0.01)  # 1 GB/s
        rates.note_read(10**7, 0.1)  # 100 MB/s
    assert rates.is_worth(500, 10**7, 4000, from_file=True), "0.11 s beside 0.125 s"
    assert not rates.is_worth(500, 10**7, 5000, from_file=True), "0.11 s beside 0.1 s"
    assert rates.is_worth(500, 10**7, 5000, from_file=False)
    assert not rates.is_worth(31, 10, 1, from_file=False)
    assert rates.is_worth(500, 10**9, 0, from_file=True), "the speed of prompts is not known"


def test_saving_takes_a_tenth_of_the_time_at_most() -> None:
    allowance = SavingAllowance(0.2, now=0.0)
    assert allowance.permits(0.2, 0.0)
    assert not allowance.permits(0.21, 100.0)
    allowance.spend(0.2)
    assert not allowance.permits(0.1, 100.9)
    assert allowance.permits(0.1, 101.1)
