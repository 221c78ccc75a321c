"""
The installation of a file: it appears at its path complete and verified, or not at all.

A file is written next to its path as `NAME.part`, and renamed only after its size, hash and header were verified.
One process at a time installs a file; the others wait, and then find it installed.
The source, hash and size of an installed file are recorded next to it, in `NAME.json`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from app.catalog import header
from app.kernel.errors import DownloadFailed, ModelFileDamaged

#: Bytes that stay free on the disk.
MIN_FREE_BYTES = 64 * 1024 * 1024
#: Bytes read at once when a file is copied or hashed.
BLOCK = 1 << 20

#: Returns the free bytes in a folder.
FreeSpace = Callable[[Path], int]


class InstallState(StrEnum):
    """The state of the installation of a file."""

    #: Another process is installing the file.
    WAITING = "waiting"
    DOWNLOADING = "downloading"
    #: A transient error occurred; `detail` says which.
    RETRYING = "retrying"
    ASSEMBLING = "assembling"
    CONVERTING = "converting"
    VERIFYING = "verifying"
    #: The file is installed.
    DONE = "done"


@dataclass(frozen=True, slots=True)
class FileProgress:
    """The progress of the installation of one file."""

    #: The name of the file, without its folder.
    file: str
    state: InstallState
    #: Bytes that are installed so far, and the total if it is known.
    done: int = 0
    total: int | None = None
    detail: str = ""


#: Receives the progress. It is called often: for each received block.
OnProgress = Callable[[FileProgress], None]


@dataclass(frozen=True, slots=True)
class InstallRecord:
    """The record of an installed file."""

    #: Its origin: a URL without its query, or a package with its version.
    source: str
    sha256: str
    size: int
    etag: str = ""


def free_bytes(folder: Path) -> int:
    """Returns the bytes that this process can still write in `folder`."""
    return shutil.disk_usage(folder).free


def find_record(target: Path) -> InstallRecord | None:
    """Returns the record of a file; None when it was installed in another way, or its size has changed."""
    try:
        record = InstallRecord(**json.loads(_sibling(target, ".json").read_text(encoding="utf-8")))
        return record if record.size == target.stat().st_size else None
    except (OSError, ValueError, TypeError):
        return None


def partial_path(target: Path) -> Path:
    """Returns the path under which the file is written until it is complete."""
    return _sibling(target, ".part")


def ensure_free_space(folder: Path, needed: int, free_space: FreeSpace, what: str) -> None:
    """Raises DownloadFailed unless `needed` bytes plus `MIN_FREE_BYTES` are free in `folder`."""
    free = free_space(folder)
    if free < needed + MIN_FREE_BYTES:
        raise DownloadFailed(
            f"{what} needs {format_bytes(needed)} more, and {format_bytes(MIN_FREE_BYTES)} are kept free, "
            f"but {folder} has only {format_bytes(free)} free; free some space, or choose another data directory"
        )


@contextlib.contextmanager
def lock(target: Path, report: OnProgress) -> Iterator[None]:
    """Locks the installation of this file among all processes of this host. Waits until the lock is free."""
    target.parent.mkdir(parents=True, exist_ok=True)
    path = _sibling(target, ".lock")
    while True:
        with path.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                report(FileProgress(target.name, InstallState.WAITING, detail="another process is installing it"))
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_same_file(path, file.fileno()):
                continue  # the previous holder deleted the lock file meanwhile: another process may lock a new one
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def sha256_of(path: Path, upto: int | None = None) -> hashlib._Hash:
    """Returns the hash of a file, or of its first `upto` bytes; further bytes can be added to it."""
    digest, left = hashlib.sha256(), path.stat().st_size if upto is None else upto
    with path.open("rb") as file:
        while left > 0 and (block := file.read(min(BLOCK, left))):
            digest.update(block)
            left -= len(block)
    return digest


def verify_and_rename(
    target: Path, record: InstallRecord, *, sha256: str | None, size: int | None, expected_by: str
) -> None:
    """
    Verifies the partial file and renames it to `target`.

    `record` describes the partial file. `sha256` and `size` are the expected values; `expected_by` names their source.

    Deletes the partial file and raises DownloadFailed when it is not the expected file, or not a complete GGUF file.
    """
    partial = partial_path(target)
    if mismatch := _mismatch(partial, record, sha256, size, expected_by):
        delete_partial(target)
        raise DownloadFailed(f"{record.source}: {mismatch}")
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(target)
    _sibling(target, ".json").write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")


def _mismatch(
    partial: Path, record: InstallRecord, sha256: str | None, size: int | None, expected_by: str
) -> str | None:
    if size is not None and record.size != size:
        return f"{record.size:,} bytes were received, {expected_by} says {size:,}; they were deleted"
    if sha256 is not None and record.sha256 != sha256:
        return (
            f"the received file has the sha256 {record.sha256}, {expected_by} says {sha256}; it was deleted. "
            "Either the file was changed at its source, or the entry is wrong"
        )
    try:
        header.check(partial)
    except ModelFileDamaged as error:
        return f"the received file is not a usable GGUF file and was deleted: {error.reason}"
    return None


def delete_partial(target: Path) -> None:
    """Deletes the partial file, if there is one."""
    partial_path(target).unlink(missing_ok=True)


def format_bytes(count: int) -> str:
    """Formats a number of bytes for people: `2.50 GB`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"


def _sibling(target: Path, suffix: str) -> Path:
    return target.with_name(target.name + suffix)


def _is_same_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
