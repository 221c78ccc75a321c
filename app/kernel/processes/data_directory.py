"""
The data directory and its lock, which one process tree holds at a time.

The kernel's lock (flock) is released when its holder dies: the content of the file never blocks a start.
The file contains the pid of the holder, its start time and its command.

Nothing here touches the other files of the directory.
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
from app.kernel.processes import pid_file

#: The locked file, with the data of the holder.
LOCK_FILE = "arriero.lock"

#: Seconds for which a reader waits for the content: it is written shortly after the lock is acquired.
_READ_TIMEOUT = 0.5


@dataclass(frozen=True, slots=True)
class DirectoryHolder:
    """The process that holds the lock of a data directory."""

    pid: int
    since: datetime
    command: str
    #: The birth of the process (`pid_file.birth`), which tells it from a later one with the same pid, and from one of
    #: another container; empty when it is unknown.
    birth: str = ""


class DataDirectory:
    """The data directory. This process holds its lock inside the `with`."""

    def __init__(self, path: Path, *, now: datetime, command: str) -> None:
        """
        Describe the directory and this process, without acquiring the lock.

        `command` is written to a file and shown to others: it must not contain a secret.
        """
        self.path = path.absolute()
        self._holder = DirectoryHolder(os.getpid(), now, command, pid_file.birth(os.getpid()) or "")
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock now."""
        return self._descriptor is not None

    def __enter__(self) -> DataDirectory:
        """
        Acquire the lock, and create the directory if it does not exist.

        Raises DataDirectoryHeld when another process has the lock, ServerNotStarted when the directory cannot be used.
        """
        try:
            make_directory(self.path, traversable=True)
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
        """Release the lock. The file stays: after its removal, two processes could hold locks on different files."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with contextlib.suppress(OSError):  # a full disk must not prevent the release
                os.ftruncate(descriptor, 0)
            os.close(descriptor)


def find_holder(path: Path) -> DirectoryHolder | None:
    """Return the holder of the lock of a data directory, or None when there is none or it is unknown."""
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


def make_directory(path: Path, *, traversable: bool = False) -> None:
    """
    Create the directory with mode 0700 if it does not exist; an existing one is not changed.

    Root creates a `traversable` directory with mode 0711: other users cannot list it, but a server that root starts as
    another user can reach its own files in it.
    """
    if not path.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700)
        if traversable and os.geteuid() == 0:
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
    fields = {
        "pid": holder.pid,
        "since": holder.since.isoformat(),
        "command": holder.command,
        "birth": holder.birth,
    }
    return (json.dumps(fields) + "\n").encode()


def _read(descriptor: int) -> DirectoryHolder | None:
    limit = time.monotonic() + _READ_TIMEOUT
    while True:
        try:
            fields = json.loads(os.pread(descriptor, 65536, 0))
            since, birth = datetime.fromisoformat(fields["since"]), str(fields.get("birth", ""))
            return DirectoryHolder(int(fields["pid"]), since, str(fields["command"]), birth)
        except (ValueError, KeyError, TypeError):
            if time.monotonic() > limit:
                return None
            time.sleep(0.01)
