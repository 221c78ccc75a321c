"""
A pid file: what a parent writes down about its child, for the day on which it cannot stop it itself.

It names the process by pid and birth, so that a process that was later given the same pid is never taken for it.
It names the parent in the same way: as long as that one lives, the child is nobody's leftover.
A zombie has no birth: it is dead, whoever should have reaped it.
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
    What tells a process from every other that ever had its pid; None when there is none, or a zombie.

    On Linux: the boot's id and the clock tick of its start, which no change of the wall clock moves
    (proc_pid_stat(5), field 22). Elsewhere: the time of its creation.
    """
    if sys.platform == "linux":
        try:
            stat = Path(f"/proc/{pid}/stat").read_bytes()
        except OSError:
            return None
        fields = stat[stat.rindex(b")") + 1 :].split()  # the name before it may hold spaces and brackets
        return None if fields[0] in {b"Z", b"X"} else f"{_boot()}/{int(fields[19])}"
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.3f}"
    except psutil.Error:
        return None


def is_stopped(pid: int) -> bool:
    """Whether the process is stopped by a signal (SIGSTOP and its like): it lives, and does nothing."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except psutil.Error:
        return False


def runs_program(pid: int, program: Path) -> bool:
    """Whether the process runs this very file, and not one that was replaced since. It is told on Linux alone."""
    try:
        return os.path.samestat(Path(f"/proc/{pid}/exe").stat(), program.stat())
    except OSError:
        return False


@dataclass(frozen=True, slots=True)
class PidRecord:
    """What a pid file says."""

    name: str
    pid: int
    birth: str
    command: str
    stop_signal: int
    parent: int
    parent_birth: str

    @property
    def orphaned(self) -> bool:
        """Whether no other living process is its parent."""
        return self.parent == os.getpid() or birth(self.parent) != self.parent_birth


def write(file: Path, record: PidRecord) -> None:
    """Keep the record in the file."""
    private_file.write(file, json.dumps(asdict(record)) + "\n")


def find(file: Path) -> PidRecord | None:
    """
    The record, or None when the file is gone or is none of ours.

    Raises ServerNotStarted when it is another user's.
    """
    try:
        return PidRecord(**json.loads(file.read_text(encoding="utf-8")))
    except PermissionError as error:
        raise ServerNotStarted(file.stem, f"{file} belongs to another user") from error
    except (OSError, ValueError, TypeError):
        return None


def forget(file: Path, pid: int) -> None:
    """Remove the file, if it tells of this process."""
    record = find(file)
    if record is not None and record.pid == pid:
        file.unlink(missing_ok=True)


@cache
def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
