"""
The folder of a model's state files on a host.

Files are immutable: each is written under a temporary name and renamed. Several pools may use a folder at once: each
writes files of its own, all may read them, and a file that vanishes is one that is not used. All files together stay
within the limit of bytes; the least recently used ones make room, by their time of modification, which a use renews.
Every change of the set of files is made under a lock of the folder, for which nobody waits long.

File names are random. Names of another form are never touched, and neither is what is no regular file. A power failure
may damage a file that was just written, which its checksum shows, so nothing is flushed.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter, sleep

import structlog

from app.kernel import ids
from workers.engine.kv_store import state_file
from workers.engine.kv_store.state_file import Acceptance, StateData, StateHeader, StateRefused

_LOG = structlog.get_logger(__name__)

#: The owner's id, the file's id; an ephemeral file is of no use after its owner has ended.
_NAME = re.compile(r"([0-9a-f]{32})-([0-9a-f]{32})\.(kv|kve)(\.tmp)?")
_LOCK = re.compile(r"([0-9a-f]{32})\.lock")
#: Most files of a folder.
MAX_FILES = 4096
#: Seconds in which a folder is indexed; the files used last come first.
_INDEX_SECONDS = 1.0
#: Seconds for which a lock is awaited, and between two attempts. Who works holds it for milliseconds.
_LOCK_SECONDS, _LOCK_POLL = 1.0, 0.005


class NoRoom(OSError):
    """The limit of the folder has no room for a file."""


@dataclass(frozen=True, slots=True)
class StateFile:
    """A file that can be used."""

    path: Path
    header: StateHeader


@dataclass(frozen=True, slots=True)
class _Found:
    path: Path
    owner: str
    size: int
    used_at: int
    is_ephemeral: bool
    is_temporary: bool


class StateFolder:
    """A folder of state files. Its methods may be called from any thread, and raise OSError unless they say else."""

    def __init__(self, path: Path, limit: int, acceptance: Acceptance) -> None:
        """Create the folder where it is missing, and remove what ended pools left unfinished. `limit` is in bytes."""
        self.path, self.limit, self.acceptance = path, limit, acceptance
        self._owner = ids.new_salt().hex()
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_private(path)
        self._lock_file = path / f"{self._owner}.lock"
        with self._locked():
            self._own_lock = os.open(self._lock_file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._own_lock, fcntl.LOCK_EX)
            self._remove_leftovers()

    def accepting(self, identity: bytes) -> StateFolder:
        """Return the same folder for states of another identity. One of the two is closed."""
        other = copy.copy(self)
        other.acceptance = replace(self.acceptance, identity=identity)
        return other

    def index(self) -> tuple[list[StateFile], int]:
        """Return the usable files, those used last first, and the number of refused ones. Damaged files are removed."""
        found: list[StateFile] = []
        refused, began = 0, perf_counter()
        for one in sorted(self._files(), key=lambda one: -one.used_at)[:MAX_FILES]:
            if perf_counter() - began > _INDEX_SECONDS:
                _LOG.warning("kv_files_not_indexed", folder=str(self.path), indexed=len(found))
                break
            if one.is_temporary:
                continue
            try:
                found.append(StateFile(one.path, state_file.read_header(one.path, self.acceptance)))
            except StateRefused as error:
                refused += 1
                self.note_refused(one.path, error)
            except OSError as error:
                _LOG.warning("kv_file_unreadable", file=one.path.name, reason=str(error))
        return found, refused

    def read(self, file: StateFile, check: Callable[[], None]) -> StateData:
        """Return the state of the file, and mark it as used. Raises StateRefused too."""
        state = state_file.read(file.path, self.acceptance, file.header, check)
        self.touch(file)
        return state

    def write(self, tokens: tuple[int, ...], last: int, state: StateData, check: Callable[[], None]) -> StateFile:
        """Write a file; `last` as in StateHeader. Raises NoRoom when it is larger than the limit."""
        key, file_id = self.acceptance.key, ids.new_salt()
        size = state_file.size_of(tokens, len(state), sealed=key is not None)
        suffix = "kve" if key is not None and key.ephemeral else "kv"
        path = self.path / f"{self._owner}-{file_id.hex()}.{suffix}"
        temporary = path.with_name(f"{path.name}.tmp")
        with self._locked():
            self._make_room(size)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            os.ftruncate(descriptor, size)  # so that it counts from now on
        try:
            with os.fdopen(descriptor, "wb", buffering=1024 * 1024) as file:
                header = state_file.write(file, self.acceptance, file_id, tokens, last, state, check)
            with self._locked():
                temporary.rename(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        return StateFile(path, header)

    def touch(self, file: StateFile) -> None:
        """Mark the file as used now. Raises nothing."""
        with contextlib.suppress(OSError):
            os.utime(file.path)

    def remove(self, file: StateFile) -> None:
        """Remove the file, if it is there."""
        with self._locked():
            file.path.unlink(missing_ok=True)

    def note_refused(self, path: Path, error: StateRefused) -> None:
        """Log why a file is not used, and remove it when nobody can use it. Raises nothing."""
        _LOG.warning("kv_file_refused", file=path.name, reason=error.reason, removed=error.is_damaged)
        if error.is_damaged:
            with contextlib.suppress(OSError), self._locked():
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove what is of no use without this process. Raises nothing."""
        with contextlib.suppress(OSError), self._locked():
            for one in self._files():
                if one.owner == self._owner and (one.is_ephemeral or one.is_temporary):
                    one.path.unlink(missing_ok=True)
            self._lock_file.unlink(missing_ok=True)
        os.close(self._own_lock)

    def _make_room(self, size: int) -> None:
        if size > self.limit:
            raise NoRoom(f"a file of {size} bytes is larger than store_disk_bytes, {self.limit}")
        files = self._files()
        used, count = sum(one.size for one in files), len(files)
        for one in sorted(files, key=lambda one: one.used_at):
            if used + size <= self.limit and count < MAX_FILES:
                return
            if not one.is_temporary:
                one.path.unlink(missing_ok=True)
                used, count = used - one.size, count - 1
        if used + size > self.limit or count >= MAX_FILES:
            raise NoRoom(f"files that are being written take the room of {self.path}")

    def _remove_leftovers(self) -> None:
        """Remove the locks, the unfinished and the ephemeral files of processes that have ended."""
        alive = {self._owner}
        for entry in list(self.path.iterdir()):
            if (match := _LOCK.fullmatch(entry.name)) and match[1] != self._owner:
                if _is_held(entry):
                    alive.add(match[1])
                else:
                    _remove_leftover(entry)
        for one in self._files():
            if one.owner not in alive and (one.is_temporary or one.is_ephemeral):
                _remove_leftover(one.path)

    def _files(self) -> list[_Found]:
        found = []
        with os.scandir(self.path) as entries:
            for entry in entries:
                if (match := _NAME.fullmatch(entry.name)) is None:
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if not stat.S_ISREG(status.st_mode):
                        continue
                    path, ephemeral, temporary = Path(entry.path), match[3] == "kve", bool(match[4])
                    found.append(_Found(path, match[1], status.st_size, status.st_mtime_ns, ephemeral, temporary))
        return found

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            _take(descriptor, self.path)
            yield
        finally:
            os.close(descriptor)


def _require_private(path: Path) -> None:
    """Raises PermissionError when others may use the folder, or may put another one in its place."""
    status, above = path.lstat(), path.parent.stat()
    if not stat.S_ISDIR(status.st_mode):
        raise PermissionError(f"{path} is a link or no folder; link or mount the folder above it instead")
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise PermissionError(f"{path} belongs to another user, or others may use it; it needs the mode 700")
    if above.st_uid not in (0, os.geteuid()) or (above.st_mode & 0o002 and not above.st_mode & stat.S_ISVTX):
        raise PermissionError(f"{path.parent} belongs to another user, or others may write it")


def _take(descriptor: int, path: Path) -> None:
    """Lock an open file. Raises TimeoutError when another process keeps the lock: it may be stopped, or hang."""
    until = perf_counter() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if perf_counter() >= until:
                raise TimeoutError(f"another process has held the lock of {path} for {_LOCK_SECONDS} s") from None
            sleep(_LOCK_POLL)
        else:
            return


def _remove_leftover(path: Path) -> None:
    """Remove a file of a process that has ended. Raises nothing: one that stays is no reason to use no file."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        _LOG.warning("kv_leftover_not_removed", file=path.name, reason=str(error))


def _is_held(lock: Path) -> bool:
    """Whether a process that runs holds the lock."""
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
