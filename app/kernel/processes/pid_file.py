"""
Pid file: a record of a child process, with which it can be ended after its parent was killed.

It identifies the process by its pid and its birth, so that a later process with the same pid is never mistaken for it.
It identifies the parent in the same way: while the parent lives, the child is not a leftover.
A zombie has no birth: it counts as dead even before it is reaped.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import psutil

from app.kernel.errors import ServerNotStarted
from app.kernel.processes import private_file


def birth(pid: int) -> str | None:
    """
    Return a text that differs for all processes that ever have this pid; None when there is no process, or a zombie.

    On Linux: the id of the boot and the clock tick of the process's start (proc_pid_stat(5), field 22), which do not
    change with the wall clock. Elsewhere: the time of its creation.
    """
    if sys.platform == "linux":
        try:
            stat = Path(f"/proc/{pid}/stat").read_bytes()
        except OSError:
            return None
        fields = stat[stat.rindex(b")") + 1 :].split()  # the preceding name may contain spaces and brackets
        return None if fields[0] in {b"Z", b"X"} else f"{_boot()}/{int(fields[19])}"
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.3f}"
    except psutil.Error:
        return None


def is_stopped(pid: int) -> bool:
    """Whether the process is stopped by a signal such as SIGSTOP: it exists, but does not run."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except psutil.Error:
        return False


def runs_program(pid: int, program: Path) -> bool:
    """Whether the process runs this file, and not a version of it that was replaced. Always false outside Linux."""
    try:
        return os.path.samestat(Path(f"/proc/{pid}/exe").stat(), program.stat())
    except OSError:
        return False


@dataclass(frozen=True, slots=True)
class PidRecord:
    """The content of a pid file."""

    name: str
    pid: int
    birth: str
    command: str
    stop_signal: int
    parent: int
    parent_birth: str

    @property
    def orphaned(self) -> bool:
        """Whether its parent is dead, or is this process."""
        return self.parent == os.getpid() or birth(self.parent) != self.parent_birth


def write(file: Path, record: PidRecord) -> None:
    """Write the record to the file."""
    private_file.write(file, json.dumps(asdict(record)) + "\n")


def find(file: Path) -> PidRecord | None:
    """
    Return the record, or None when the file does not exist or is not a pid file of Arriero.

    Raises ServerNotStarted when the file belongs to another user.
    """
    try:
        return PidRecord(**json.loads(file.read_text(encoding="utf-8")))
    except PermissionError as error:
        raise ServerNotStarted(file.stem, f"{file} belongs to another user") from error
    except (OSError, ValueError, TypeError):
        return None


def remove(file: Path, pid: int) -> None:
    """Remove the file if its record is for this process."""
    record = find(file)
    if record is not None and record.pid == pid:
        file.unlink(missing_ok=True)


@cache
def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
