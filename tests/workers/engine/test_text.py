"""Text as it is written: whole characters, no stop text, nothing lost."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from workers.engine.text import TextStream

TEXTS = st.text(alphabet="ab<|é日🙂 ", max_size=30)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in pairwise(edges)]


@given(TEXTS, st.lists(st.integers(0, 200), max_size=20))
def test_without_stops_all_characters_come_out_whole(text: str, cuts: list[int]) -> None:
    stream = TextStream()
    shown = "".join(stream.feed(piece) for piece in pieces(text.encode(), cuts)) + stream.finish()
    assert shown == text == stream.text


@given(TEXTS, st.text(alphabet="ab<|é日🙂 ", min_size=1, max_size=4), st.lists(st.integers(0, 200), max_size=20))
def test_the_text_ends_before_a_stop_however_it_is_cut(text: str, stop: str, cuts: list[int]) -> None:
    stream = TextStream([stop])
    shown = "".join(stream.feed(piece) for piece in pieces(text.encode(), cuts))
    assert stream.stopped == (stop in text)
    assert shown + stream.finish() == stream.text == text.split(stop)[0]


@given(TEXTS, st.lists(st.text(alphabet="ab<|", min_size=1, max_size=4), max_size=4), st.lists(st.integers(0, 200)))
def test_no_stop_text_is_ever_shown(text: str, stops: list[str], cuts: list[int]) -> None:
    stream = TextStream(stops)
    shown = ""
    for piece in pieces(text.encode(), cuts):
        shown += stream.feed(piece)
        assert text.startswith(shown)
        assert not any(stop in shown for stop in stops)
    assert stream.stopped or shown + stream.finish() == text


def test_what_may_become_a_stop_is_held_back_and_given_when_it_does_not() -> None:
    stream = TextStream(["<|end|>"])
    assert stream.feed(b"Yes <|en") == "Yes "
    assert stream.feed(b"ough") == "<|enough"


def test_an_unfinished_character_is_left_out_at_the_end() -> None:
    stream = TextStream()
    assert stream.feed("né".encode()[:-1]) == "n"
    assert stream.finish() == ""
    assert stream.text == "n"


def test_bytes_that_are_no_text_are_replaced() -> None:
    assert TextStream().feed(b"a\xffb") == "a\ufffdb"
