"""The folder of state files: its limit, its names, and the pools that share it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from workers.engine.kv_store import state_file
from workers.engine.kv_store.sealing import SealingKey
from workers.engine.kv_store.state_file import Acceptance
from workers.engine.kv_store.state_folder import NoRoom, StateFile, StateFolder

ACCEPTANCE = Acceptance(b"i" * 32, 1000, 2**20)
STATE = np.zeros(10_000, np.uint8)
SIZE = state_file.size_of(tuple(range(10)), len(STATE), sealed=False)


def nothing() -> None:
    """No reason to stop."""


def write(folder: StateFolder, number: int) -> StateFile:
    file = folder.write(tuple(range(number, number + 10)), 9, STATE, nothing)
    os.utime(file.path, (number, number))
    return file


def first_tokens(folder: StateFolder) -> list[int]:
    return [file.header.tokens[0] for file in folder.index()[0]]


def test_the_least_recently_used_file_makes_room(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "kv", 3 * SIZE, ACCEPTANCE)
    files = [write(folder, number) for number in (1, 2, 3)]
    folder.touch(files[0])
    write(folder, 4)
    assert first_tokens(folder) == [1, 4, 3]
    with pytest.raises(NoRoom):
        folder.write((1,), 0, np.zeros(3 * SIZE, np.uint8), nothing)
    assert first_tokens(folder) == [1, 4, 3], "a file that is too large makes no room"


def test_only_the_user_may_use_folder_and_files(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "kv", 3 * SIZE, ACCEPTANCE)
    file = write(folder, 1)
    assert (tmp_path / "kv").stat().st_mode & 0o777 == 0o700
    assert file.path.stat().st_mode & 0o777 == 0o600
    (tmp_path / "kv").chmod(0o750)
    with pytest.raises(PermissionError, match="mode 700"):
        StateFolder(tmp_path / "kv", 3 * SIZE, ACCEPTANCE)


def test_a_folder_that_others_can_exchange_is_refused(tmp_path: Path) -> None:
    """A link, and a folder in one that everybody may write."""
    (tmp_path / "target").mkdir(mode=0o700)
    (tmp_path / "kv").symlink_to(tmp_path / "target")
    with pytest.raises(PermissionError, match="link"):
        StateFolder(tmp_path / "kv", SIZE, ACCEPTANCE)
    assert list((tmp_path / "target").iterdir()) == []
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(PermissionError, match="others may write it"):
        StateFolder(tmp_path / "open" / "kv", SIZE, ACCEPTANCE)


def test_what_only_has_the_name_of_a_state_file_is_left_alone(tmp_path: Path) -> None:
    """Folders, links and pipes keep no file from being written, and none is opened or removed."""
    (tmp_path / "kv").mkdir(mode=0o700)
    dead = "d" * 32
    named = [
        tmp_path / "kv" / f"{dead}-{str(number) * 32}{end}" for number, end in enumerate((".kv", ".kv.tmp", ".kv"))
    ]
    named[0].mkdir()
    named[1].symlink_to(tmp_path / "elsewhere")
    os.mkfifo(named[2])
    (tmp_path / "kv" / f"{dead}.lock").mkdir()
    folder = StateFolder(tmp_path / "kv", SIZE, ACCEPTANCE)
    write(folder, 1)
    write(folder, 2)
    assert (first_tokens(folder), folder.index()[1]) == ([2], 0)
    folder.close()
    assert all(os.path.lexists(one) for one in named)


def test_other_files_are_never_touched(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "kv", SIZE, ACCEPTANCE)
    others = [tmp_path / "kv" / name for name in ("notes.txt", "a.kv", f"{'a' * 32}-{'b' * 32}.kv.bak")]
    for other in others:
        other.write_bytes(bytes(10 * SIZE))
    write(folder, 1)
    write(folder, 2)
    folder.close()
    StateFolder(tmp_path / "kv", SIZE, ACCEPTANCE).close()
    assert all(other.stat().st_size == 10 * SIZE for other in others)


def test_damaged_files_are_removed_and_those_of_others_kept(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "kv", 9 * SIZE, ACCEPTANCE)
    damaged, foreign = write(folder, 1), write(folder.accepting(b"j" * 32), 2)
    damaged.path.write_bytes(damaged.path.read_bytes()[:-1])
    write(folder, 3)
    assert (first_tokens(folder), folder.index()[1]) == ([3], 1)
    assert not damaged.path.exists()
    assert foreign.path.exists()


def test_what_an_ended_pool_left_unfinished_is_removed(tmp_path: Path) -> None:
    """A living pool's temporary and ephemeral files stay; a lock says who lives."""
    key = SealingKey(b"of this process", ephemeral=True)
    living = StateFolder(tmp_path / "kv", 9 * SIZE, replace(ACCEPTANCE, key=key))
    kept = write(living, 1)
    dead = "d" * 32
    left = [tmp_path / "kv" / name for name in (f"{dead}.lock", f"{dead}-{'1' * 32}.kv.tmp", f"{dead}-{'2' * 32}.kve")]
    for path in left:
        path.write_bytes(b"")
    finished = tmp_path / "kv" / f"{dead}-{'3' * 32}.kv"
    finished.write_bytes(b"")
    other = StateFolder(tmp_path / "kv", 9 * SIZE, ACCEPTANCE)
    assert not any(path.exists() for path in left)
    assert kept.path.exists()
    assert finished.exists()
    other.close()
    assert kept.path.exists()
    living.close()
    assert not kept.path.exists()


def test_a_stopped_or_failed_write_leaves_nothing(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "kv", 9 * SIZE, ACCEPTANCE)
    before = sorted((tmp_path / "kv").iterdir())

    def stop() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        folder.write((1, 2), 1, STATE, stop)
    assert sorted((tmp_path / "kv").iterdir()) == before


def test_pools_share_the_limit_of_a_folder(tmp_path: Path) -> None:
    one, other = (StateFolder(tmp_path / "kv", 2 * SIZE, ACCEPTANCE) for _ in range(2))
    file = write(one, 1)
    write(other, 2)
    write(other, 3)
    assert first_tokens(one) == first_tokens(other) == [3, 2]
    with pytest.raises(FileNotFoundError):
        one.read(file, nothing)
    one.remove(file)
