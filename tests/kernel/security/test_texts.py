"""Texts from outside: safe to store in Postgres and to print to a terminal."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import text

from app.kernel.database import Database
from app.kernel.processes.process import log_tail
from app.kernel.security import texts


@pytest.mark.parametrize(
    ("given", "stored", "shown"),
    [
        ("", "", ""),
        ("größer 🦙\n\tall of it", "größer 🦙\n\tall of it", "größer 🦙\n\tall of it"),
        ("a\0b", "a\ufffdb", "a\ufffdb"),
        ("half \ud83e", "half \ufffd", "half \ufffd"),
        ("\x1b[31mred\x1b[0m\a", "\x1b[31mred\x1b[0m\a", "red\ufffd"),
        ("\x1b]0;title\x07\x85", "\x1b]0;title\x07\x85", "\ufffd]0;title\ufffd\ufffd"),
    ],
)
def test_characters_that_cannot_be_stored_or_printed_are_replaced(given: str, stored: str, shown: str) -> None:
    assert (texts.storable(given), texts.printable(given)) == (stored, shown)


def test_a_long_text_is_cut_and_marked() -> None:
    assert texts.storable("abcdef", 4) == "abc…"
    assert texts.printable("abcd", 4) == "abcd"
    assert texts.storable("abc", 0) == "…"


@given(st.text(st.characters(codec=None), max_size=50))
def test_every_result_is_valid_utf_8_without_nul(given: str) -> None:
    for made in (texts.storable(given), texts.printable(given)):
        assert b"\0" not in made.encode()


def test_postgres_stores_every_cleaned_character(database: Database) -> None:
    every = "".join(map(chr, [*range(0x2100), *range(0xD7F0, 0xE010), 0xFFFE, 0xFFFF, 0x1F999, 0x10FFFF]))
    cleaned = texts.storable(every)
    with database.work() as work:
        row = work.row(text("SELECT CAST(:given AS text) AS stored"), {"given": cleaned})
    assert row is not None
    assert row.stored == cleaned


@pytest.mark.parametrize(
    "content",
    [
        b"one\0two\nthree",
        b"\xff\xfe\xed\xa0\x80 no UTF-8",
        b"\x1b[2J\x1b[31mred\r\n\x07",
        b"x" * 10_000_000,
        b"\0" * 10_000_000,
        b"\n" * 1_000_000,
    ],
    ids=["nul", "no utf-8", "terminal", "long line", "nuls", "empty lines"],
)
def test_the_tail_of_any_log_is_short_and_printable(tmp_path: Path, content: bytes) -> None:
    log = tmp_path / "pool.log"
    log.write_bytes(content)
    tail = log_tail(log, 40)
    assert texts.printable(tail) == tail
    assert len(tail) < 100_000
    assert len(tail.splitlines()) <= 40


def test_of_a_line_of_100_megabytes_only_the_end_is_read(tmp_path: Path) -> None:
    log = tmp_path / "pool.log"
    with log.open("wb") as file:
        file.truncate(100_000_000)  # a sparse file of NUL
        file.seek(0, 2)
        file.write(b"\nits last words\0\n")
    assert log_tail(log, 1) == "its last words\ufffd"


def test_the_tail_of_an_unreadable_log_is_the_reason(tmp_path: Path) -> None:
    assert "cannot be read" in log_tail(tmp_path)
    assert log_tail(tmp_path / "none") == ""
