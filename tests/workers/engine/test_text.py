"""The text stream: whole characters, no stop text, nothing lost."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from workers.engine.text import TextStream

TEXTS = st.text(alphabet="ab<|é日🙂 ", max_size=30)


def pieces(data: bytes, splits: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(split % (len(data) + 1) for split in splits)})
    return [data[a:b] for a, b in pairwise(edges)]


@given(TEXTS, st.lists(st.integers(0, 200), max_size=20))
def test_without_stops_all_characters_are_emitted_whole(text: str, splits: list[int]) -> None:
    stream = TextStream()
    emitted = "".join(stream.feed(piece) for piece in pieces(text.encode(), splits)) + stream.finish()
    assert emitted == text == stream.text


@given(TEXTS, st.text(alphabet="ab<|é日🙂 ", min_size=1, max_size=4), st.lists(st.integers(0, 200), max_size=20))
def test_the_text_ends_before_a_stop_however_it_is_split(text: str, stop: str, splits: list[int]) -> None:
    stream = TextStream([stop])
    emitted = "".join(stream.feed(piece) for piece in pieces(text.encode(), splits))
    assert stream.stopped == (stop in text)
    assert emitted + stream.finish() == stream.text == text.split(stop)[0]


@given(TEXTS, st.lists(st.text(alphabet="ab<|", min_size=1, max_size=4), max_size=4), st.lists(st.integers(0, 200)))
def test_no_stop_text_is_ever_emitted(text: str, stops: list[str], splits: list[int]) -> None:
    stream = TextStream(stops)
    emitted = ""
    for piece in pieces(text.encode(), splits):
        emitted += stream.feed(piece)
        assert text.startswith(emitted)
        assert not any(stop in emitted for stop in stops)
    assert stream.stopped or emitted + stream.finish() == text


def test_a_possible_stop_is_held_back_until_it_is_decided() -> None:
    stream = TextStream(["<|end|>"])
    assert stream.feed(b"Yes <|en") == "Yes "
    assert stream.feed(b"ough") == "<|enough"


def test_an_incomplete_character_at_the_end_is_dropped() -> None:
    stream = TextStream()
    assert stream.feed("né".encode()[:-1]) == "n"
    assert stream.finish() == ""
    assert stream.text == "n"


def test_invalid_bytes_are_replaced() -> None:
    assert TextStream().feed(b"a\xffb") == "a\ufffdb"
