"""State files: what is read is what was written, and nothing else is read."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from workers.engine.kv_store import state_file
from workers.engine.kv_store.sealing import SealingKey
from workers.engine.kv_store.state_file import PART_BYTES, Acceptance, StateHeader, StateRefused

TOKENS = tuple(range(100, 180))
STATE = np.random.default_rng(1).integers(0, 256, 2 * PART_BYTES + 1000, np.uint8)
PLAIN = Acceptance(b"i" * 32, 1000, 2**20)
SEALED = replace(PLAIN, key=SealingKey(b"a secret"))
HEADER_BYTES = 128
LAST = len(TOKENS) - 1


def nothing() -> None:
    """No reason to stop."""


def write(path: Path, acceptance: Acceptance = PLAIN) -> StateHeader:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        return state_file.write(file, acceptance, b"f" * 16, TOKENS, LAST, STATE, nothing)


def read(path: Path, acceptance: Acceptance = PLAIN) -> np.ndarray:
    return state_file.read(path, acceptance, state_file.read_header(path, acceptance), nothing)


@pytest.mark.parametrize("acceptance", [PLAIN, SEALED])
def test_what_was_written_is_read(tmp_path: Path, acceptance: Acceptance) -> None:
    written = write(tmp_path / "a", acceptance)
    assert state_file.read_header(tmp_path / "a", acceptance) == written
    assert written.tokens == TOKENS
    assert np.array_equal(read(tmp_path / "a", acceptance), STATE)
    assert written.size == (tmp_path / "a").stat().st_size
    assert written.size == state_file.size_of(TOKENS, len(STATE), sealed=acceptance is SEALED)


def test_an_encrypted_file_shows_neither_tokens_nor_state(tmp_path: Path) -> None:
    write(tmp_path / "a", SEALED)
    content = (tmp_path / "a").read_bytes()
    assert np.asarray(TOKENS[:3], "<i4").tobytes() not in content
    assert STATE[:16].tobytes() not in content
    assert hashlib.sha256(STATE).digest() not in content, "a checksum would tell equal states"


def changed(at: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def with_field(offset: int, form: str, value: int) -> Callable[[bytes], bytes]:
    """Another number in the header, with a checksum that fits: what a hostile writer would do."""

    def change(content: bytes) -> bytes:
        fixed, tokens = bytearray(content[:HEADER_BYTES]), content[HEADER_BYTES : HEADER_BYTES + 4 * len(TOKENS)]
        struct.pack_into(form, fixed, offset, value)
        rest = content[HEADER_BYTES + 4 * len(TOKENS) + 32 :]
        return bytes(fixed) + tokens + hashlib.sha256(bytes(fixed) + tokens).digest() + rest

    return change


#: What happens to a file, what the reason says, whether nobody can use it any more.
DAMAGES = {
    "empty": (lambda _: b"", "no state file", True),
    "shorter than a header": (lambda content: content[:50], "no state file", True),
    "another kind of file": (lambda content: b"GGUF" + content[4:], "no state file", True),
    "a future version": (with_field(8, "<H", 3), "version 3", False),
    "an unknown flag": (with_field(10, "<H", 4), "flags 4", False),
    "another identity": (changed(40), "another model", False),
    "more tokens than accepted": (with_field(12, "<I", 2**32 - 1), "more than are accepted", False),
    "no tokens": (with_field(12, "<I", 0), "more than are accepted", False),
    "more bytes than accepted": (with_field(16, "<Q", 2**63), "more than are accepted", False),
    "other lengths than the file": (with_field(12, "<I", 81), "by its header", True),
    "cut": (lambda content: content[:-1], "by its header", True),
    "longer": (lambda content: content + b"x", "by its header", True),
    "changed tokens": (changed(HEADER_BYTES + 3), "its header was changed", True),
    "a changed checksum": (changed(110), "its header was changed", True),
    "a changed state": (changed(-7 % 400 + 600), "checksum", True),
    "a state of zeros at its end": (lambda content: content[:-4096] + bytes(4096), "checksum", True),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_with_a_reason(tmp_path: Path, damage: str) -> None:
    change, reason, is_damaged = DAMAGES[damage]
    write(tmp_path / "a")
    (tmp_path / "a").write_bytes(change((tmp_path / "a").read_bytes()))
    with pytest.raises(StateRefused, match=reason) as caught:
        read(tmp_path / "a")
    assert caught.value.is_damaged is is_damaged


@pytest.mark.parametrize("at", [30, 50, 100, 118, HEADER_BYTES, HEADER_BYTES + 330, 1000, -PART_BYTES, -1])
def test_any_changed_byte_of_an_encrypted_file_is_found(tmp_path: Path, at: int) -> None:
    write(tmp_path / "a", SEALED)
    content = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(changed(at % len(content))(content))
    with pytest.raises(StateRefused):
        read(tmp_path / "a", SEALED)


def test_exchanged_parts_of_an_encrypted_file_are_found(tmp_path: Path) -> None:
    write(tmp_path / "a", SEALED)
    content, each = (tmp_path / "a").read_bytes(), PART_BYTES + 16
    at = len(content) - 2 * each - 1016
    exchanged = content[at + each : at + 2 * each] + content[at : at + each]
    (tmp_path / "a").write_bytes(content[:at] + exchanged + content[at + 2 * each :])
    with pytest.raises(StateRefused, match="encrypted content was changed"):
        read(tmp_path / "a", SEALED)


def test_a_key_opens_its_own_files_only(tmp_path: Path) -> None:
    write(tmp_path / "sealed", SEALED)
    write(tmp_path / "plain")
    with pytest.raises(StateRefused, match="another key") as caught:
        read(tmp_path / "sealed", replace(PLAIN, key=SealingKey(b"another")))
    assert not caught.value.is_damaged
    with pytest.raises(StateRefused, match="another key"):
        read(tmp_path / "sealed")
    with pytest.raises(StateRefused, match="not encrypted"):
        read(tmp_path / "plain", SEALED)


def test_files_of_others_links_and_pipes_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with pytest.raises(OSError, match="symbolic links"):
        read(tmp_path / "link")
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(StateRefused, match="no regular file"):
        read(tmp_path / "pipe")
    (tmp_path / "a").chmod(0o666)
    with pytest.raises(StateRefused, match="others may write"):
        read(tmp_path / "a")


def test_a_file_that_was_replaced_after_it_was_indexed_is_refused(tmp_path: Path) -> None:
    expected = write(tmp_path / "a")
    with (tmp_path / "a").open("wb") as file:
        state_file.write(file, PLAIN, b"g" * 16, TOKENS, LAST, STATE, nothing)
    with pytest.raises(StateRefused, match="replaced"):
        state_file.read(tmp_path / "a", PLAIN, expected, nothing)


def test_reading_and_writing_can_be_stopped(tmp_path: Path) -> None:
    header = write(tmp_path / "a")

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        state_file.read(tmp_path / "a", PLAIN, header, stop)
    with pytest.raises(KeyboardInterrupt), (tmp_path / "b").open("wb") as file:
        state_file.write(file, PLAIN, b"g" * 16, TOKENS, LAST, STATE, stop)
