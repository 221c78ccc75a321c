"""
The data directory's lock: one process tree at a time.

The lock is the kernel's (flock) and dies with its holder: what a dead process wrote into the file is no obstacle.
The file tells who holds it, since when and by which command.

Nothing here touches what else lies in the directory.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from app.kernel.errors import DataDirectoryHeld, ServerNotStarted

#: The file that is locked and that names the holder.
LOCK_FILE = "arriero.lock"

#: Between taking the lock and writing down who took it lies an instant; a reader waits for it this long, in seconds.
_PATIENCE = 0.5


@dataclass(frozen=True, slots=True)
class DirectoryHolder:
    """Who holds a data directory."""

    pid: int
    since: datetime
    command: str


class DataDirectory:
    """The data directory, held by this process from `with` to its end."""

    def __init__(self, path: Path, *, now: datetime, command: str) -> None:
        """
        Name the directory and what a second comer is told about this process.

        `command` is written into a file and shown: it must hold no secret.
        """
        self.path = path.absolute()
        self._holder = DirectoryHolder(os.getpid(), now, command)
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock now."""
        return self._descriptor is not None

    def __enter__(self) -> DataDirectory:
        """
        Take the lock; the directory is made when there is none.

        Raises DataDirectoryHeld when somebody has it, ServerNotStarted when the directory cannot be used.
        """
        try:
            make_directory(self.path, passable=True)
            descriptor = os.open(self.path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise ServerNotStarted("arriero", f"the data directory {self.path} cannot be used: {error}") from error
        try:
            _lock(descriptor, self.path)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, _encode(self._holder), 0)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        return self

    def __exit__(self, *_: object) -> None:
        """Give the lock back. The file stays: removing it would let two hold it."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with contextlib.suppress(OSError):  # a full disk must not keep the lock
                os.ftruncate(descriptor, 0)
            os.close(descriptor)


def find_holder(path: Path) -> DirectoryHolder | None:
    """Who holds the data directory now, or None when nobody does or it cannot be told."""
    try:
        descriptor = os.open(path / LOCK_FILE, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read(descriptor)
    except OSError:
        return None
    else:
        return None
    finally:
        os.close(descriptor)


def make_directory(path: Path, *, passable: bool = False) -> None:
    """
    Make the directory if there is none, closed to others; one that is there is left as it is.

    Root makes a `passable` one 0711: nobody can list it, but a server that root starts as another user
    can reach its own files below.
    """
    if not path.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700)
        if passable and os.geteuid() == 0:
            path.chmod(0o711)


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _read(descriptor) or DirectoryHolder(0, datetime.fromtimestamp(0, UTC), "unknown")
        raise DataDirectoryHeld(path, holder.pid, holder.since, holder.command) from None
    except OSError as error:
        reason = f"{path} cannot be locked ({error.strerror}); choose a directory on a local disk"
        raise ServerNotStarted("arriero", reason) from error


def _encode(holder: DirectoryHolder) -> bytes:
    fields = {"pid": holder.pid, "since": holder.since.isoformat(), "command": holder.command}
    return (json.dumps(fields) + "\n").encode()


def _read(descriptor: int) -> DirectoryHolder | None:
    limit = time.monotonic() + _PATIENCE
    while True:
        try:
            fields = json.loads(os.pread(descriptor, 65536, 0))
            return DirectoryHolder(int(fields["pid"]), datetime.fromisoformat(fields["since"]), str(fields["command"]))
        except (ValueError, KeyError, TypeError):
            if time.monotonic() > limit:
                return None
            time.sleep(0.01)
