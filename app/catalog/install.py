"""
The arrival of a file: how it comes to its place, whole and checked, or not at all.

A file grows beside its place as `NAME.part` and takes its name only when its size, its hash and its header are right.
One process at a time brings a file; the others wait, and then find it there.
What arrived, from where and with which hash is written beside it, as `NAME.json`.
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

#: Bytes that stay free on the disk whatever is fetched.
RESERVE = 64 * 1024 * 1024
#: Bytes read at once when a file is copied or hashed.
BLOCK = 1 << 20

#: Gives the bytes that are free in a folder.
FreeSpace = Callable[[Path], int]


class InstallState(StrEnum):
    """What is being done for a file."""

    #: Another process is bringing it.
    WAITING = "waiting"
    DOWNLOADING = "downloading"
    #: Something failed that may pass; `detail` says what.
    RETRYING = "retrying"
    ASSEMBLING = "assembling"
    VERIFYING = "verifying"
    #: It is in its place.
    DONE = "done"


@dataclass(frozen=True, slots=True)
class FileProgress:
    """How far one file is."""

    #: The name of the file, without its folder.
    file: str
    state: InstallState
    #: Bytes that are there, and bytes that there will be if that is known.
    done: int = 0
    total: int | None = None
    detail: str = ""


#: Is told of each step. It is called often: for every block that arrives.
OnProgress = Callable[[FileProgress], None]


@dataclass(frozen=True, slots=True)
class InstallRecord:
    """What is known of a file that arrived."""

    #: Where it came from: an address without its query, or a package with its version.
    source: str
    sha256: str
    size: int
    etag: str = ""


def free_bytes(folder: Path) -> int:
    """The bytes that this process may still write below `folder`."""
    return shutil.disk_usage(folder).free


def find_record(target: Path) -> InstallRecord | None:
    """What was written when the file arrived; None for one that came in another way, or has another size now."""
    try:
        record = InstallRecord(**json.loads(_beside(target, ".json").read_text(encoding="utf-8")))
        return record if record.size == target.stat().st_size else None
    except (OSError, ValueError, TypeError):
        return None


def part_of(target: Path) -> Path:
    """Where the file grows."""
    return _beside(target, ".part")


def ensure_room(folder: Path, needed: int, free_space: FreeSpace, what: str) -> None:
    """Raises DownloadFailed when `needed` bytes, and the reserve, are not free in `folder`."""
    free = free_space(folder)
    if free < needed + RESERVE:
        raise DownloadFailed(
            f"{what} needs {shown(needed)} more, and {shown(RESERVE)} are kept free, "
            f"but {folder} has only {shown(free)} free; make room there, or choose another data directory"
        )


@contextlib.contextmanager
def lock(target: Path, report: OnProgress) -> Iterator[None]:
    """Be the only one, of all processes of this host, to bring this file. Waits for another who does."""
    target.parent.mkdir(parents=True, exist_ok=True)
    path = _beside(target, ".lock")
    while True:
        with path.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                report(FileProgress(target.name, InstallState.WAITING, detail="another process is bringing it"))
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_still(path, file.fileno()):
                continue  # its holder removed it while we waited: others would lock a new one
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def sha256_of(path: Path, upto: int | None = None) -> hashlib._Hash:
    """The hash of a file, or of its first `upto` bytes, ready to be fed with more."""
    digest, left = hashlib.sha256(), path.stat().st_size if upto is None else upto
    with path.open("rb") as file:
        while left > 0 and (block := file.read(min(BLOCK, left))):
            digest.update(block)
            left -= len(block)
    return digest


def settle(target: Path, record: InstallRecord, *, sha256: str | None, size: int | None, told_by: str) -> None:
    """
    Check the grown part and give it its name.

    `record` is what arrived; `sha256` and `size` are what was wanted, `told_by` says who said so.

    Raises DownloadFailed and deletes the part when it is not what was wanted, or no whole GGUF file.
    """
    part = part_of(target)
    if objection := _objection(part, record, sha256, size, told_by):
        discard(target)
        raise DownloadFailed(f"{record.source}: {objection}")
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(target)
    _beside(target, ".json").write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")


def _objection(part: Path, record: InstallRecord, sha256: str | None, size: int | None, told_by: str) -> str | None:
    if size is not None and record.size != size:
        return f"{record.size:,} bytes came, {told_by} says {size:,}; they were deleted"
    if sha256 is not None and record.sha256 != sha256:
        return (
            f"what came has the sha256 {record.sha256}, {told_by} says {sha256}; it was deleted. "
            "Either the file was changed at its source, or the entry is wrong"
        )
    try:
        header.check(part)
    except ModelFileDamaged as error:
        return f"what came is no usable GGUF file and was deleted: {error.reason}"
    return None


def discard(target: Path) -> None:
    """Forget what has grown so far."""
    part_of(target).unlink(missing_ok=True)


def shown(count: int) -> str:
    """A number of bytes for people: `2.50 GB`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(target.name + suffix)


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
