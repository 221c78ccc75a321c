"""Where the window of a prompt begins."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from app.memory.assembly.window import CountedMessage, PromptWindow, cut, fitted


def conversation(lengths: Sequence[int], first: int = 1) -> list[CountedMessage]:
    """Turns of a user and an answer, with these lengths."""
    return [CountedMessage(first + at, tokens, at % 2 == 0) for at, tokens in enumerate(lengths)]


def test_a_window_that_is_not_full_begins_at_the_first_message() -> None:
    found = fitted(conversation([10] * 8), 100, None, [], has_earlier=False)
    assert (found.first_seq, found.tokens, found.moved) == (1, 80, False)


def test_a_full_window_moves_far_and_then_stays() -> None:
    window: PromptWindow | None = None
    moves = []
    for turns in range(1, 200):
        messages = conversation([10, 10] * turns)
        window = fitted(messages, 1_000, window, [], has_earlier=False)
        assert window.tokens <= 1_000
        if window.moved:
            moves.append(turns)
    assert len(moves) == len(range(51, 200, 26)), moves
    assert all(later - earlier > 20 for earlier, later in itertools.pairwise(moves))


def test_a_full_window_moves_to_the_end_of_the_summary() -> None:
    messages = conversation([10, 10] * 51)
    before = PromptWindow(1, 0)
    assert fitted(messages, 1_000, before, [60], has_earlier=False) == PromptWindow(61, 420, 60, 600, True)


def test_a_summary_is_not_used_before_the_window_is_full() -> None:
    found = fitted(conversation([10, 10] * 40), 1_000, PromptWindow(1, 0), [40], has_earlier=False)
    assert (found.first_seq, found.summarised_upto, found.moved) == (1, 0, False)


def test_the_summary_of_a_window_stays_with_it_when_a_later_one_exists() -> None:
    found = fitted(conversation([10, 10] * 40), 1_000, PromptWindow(21, 0, 20, 200), [20, 60], has_earlier=False)
    assert (found.first_seq, found.summarised_upto, found.moved) == (21, 20, False)


def test_a_summary_that_covers_too_little_does_not_stop_the_window() -> None:
    found = fitted(conversation([10, 10] * 60), 1_000, PromptWindow(1, 0), [10], has_earlier=False)
    assert found.first_seq > 11
    assert found.tokens <= 500
    assert found.summarised_upto == 10


def test_a_turn_longer_than_the_room_leaves_an_empty_window() -> None:
    found = fitted(conversation([5_000, 5_000]), 1_000, None, [], has_earlier=False)
    assert (found.first_seq, found.tokens) == (3, 0)


def test_a_summary_ends_before_a_turn_and_leaves_the_last_ones() -> None:
    assert cut(conversation([10, 10] * 10), 65, 0) == 14
    assert cut(conversation([10, 10] * 10), 65, 14) is None
    assert cut(conversation([10]), 0, 0) is None


@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=120),
    room=st.integers(0, 1_500),
    summaries=st.lists(st.integers(1, 120), max_size=3),
)
def test_a_window_begins_at_a_turn_fits_and_repeats_no_summary(
    lengths: list[int], room: int, summaries: list[int]
) -> None:
    """Whatever was said, turn by turn."""
    window: PromptWindow | None = None
    for end in range(1, len(lengths) + 1, 2):
        messages = conversation(lengths[:end])
        known = [upto for upto in summaries if upto % 2 == 0 and upto < end]
        window = fitted(messages, room, window, known, has_earlier=False)
        assert window.tokens <= room
        assert window.summarised_upto < window.first_seq
        assert window.first_seq % 2 == 1 or window.first_seq == end + 1
        again = fitted(messages, room, window, known, has_earlier=False)
        assert (again.first_seq, again.summarised_upto) == (window.first_seq, window.summarised_upto)
        assert again.moved is False
