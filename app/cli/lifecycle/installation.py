"""
The installation of a data directory: the process that holds it, and the processes with pid files in it.

It is read from files and from the kernel, so it is known while the API, the database or everything is down. A process
counts only when its birth is that of its pid file: stale files and reused pids are no processes.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psutil

from app.cli.processes import records
from app.cli.processes.records import LOG_FILE, RUN, TreeRecord
from app.kernel.errors import Conflict, Unavailable
from app.kernel.processes import pid_file
from app.kernel.processes.data_directory import LOCK_FILE, DirectoryHolder, find_holder
from app.kernel.processes.pid_file import PidRecord

#: The directories of the embedded servers, whose pid file and log have fixed names.
SERVERS = ("postgres", "valkey")
POOLS = f"{RUN}/pools"
#: The name of `arriero up` itself, next to those of its processes.
UP = "up"


@dataclass(frozen=True, slots=True)
class ListedProcess:
    """A running process of an installation, with its children that are no listed processes themselves."""

    #: The name for `logs` and `restart`; that of a pool is `pool_name` of its id.
    name: str
    pid: int
    #: The model of a pool.
    model: str | None
    #: Whether a signal such as SIGSTOP has stopped it.
    stopped: bool
    #: Whether its parent is dead.
    orphaned: bool
    #: Seconds since it began.
    uptime: float
    #: Bytes of memory, of its children too; what processes share is divided among them where the kernel says it.
    memory: int


@dataclass(frozen=True, slots=True)
class Installation:
    """A data directory, and what runs on it now."""

    directory: Path
    holder: DirectoryHolder | None
    record: TreeRecord | None
    processes: tuple[ListedProcess, ...]

    def running(self, name: str) -> ListedProcess | None:
        """Return a process by its name."""
        return next((process for process in self.processes if process.name == name), None)


def read(directory: Path, now: datetime) -> Installation:
    """Return what runs on a data directory. Raises Unavailable when it belongs to another user."""
    holder = holder_of(directory)
    leaders: dict[int, tuple[str, str | None, bool]] = {}
    if holder is not None and process_of(holder) is not None:
        leaders[holder.pid] = (UP, None, False)
    for name, record in pid_records(directory):
        if pid_file.birth(record.pid) == record.birth:
            model = record.name.removeprefix("pool ") if name.startswith("pool-") else None
            leaders[record.pid] = (name, model, record.orphaned)
    memory = _memory_of(leaders.keys())
    found = []
    for pid, (name, model, orphaned) in leaders.items():
        with contextlib.suppress(psutil.Error):
            uptime = max(now.timestamp() - psutil.Process(pid).create_time(), 0.0)
            stopped = pid_file.is_stopped(pid)
            found.append(ListedProcess(name, pid, model, stopped, orphaned, uptime, memory.get(pid, 0)))
    return Installation(directory, holder, records.find(directory, holder), tuple(found))


def holder_of(directory: Path) -> DirectoryHolder | None:
    """Return the holder of a data directory. Raises Unavailable when the directory belongs to another user."""
    try:
        with contextlib.suppress(FileNotFoundError):
            os.close(os.open(directory / LOCK_FILE, os.O_RDONLY))
    except OSError as error:
        raise Unavailable(f"the data directory {directory} cannot be read: {error.strerror}") from error
    return find_holder(directory)


def process_of(holder: DirectoryHolder) -> psutil.Process | None:
    """Return the process of a holder; None when it cannot be seen here, for it runs in another container."""
    if holder.birth and pid_file.birth(holder.pid) == holder.birth:
        with contextlib.suppress(psutil.Error):
            return psutil.Process(holder.pid)
    return None


def visible_process(directory: Path, holder: DirectoryHolder) -> psutil.Process:
    """Return the process of a holder. Raises Conflict when it cannot be seen here."""
    process = process_of(holder)
    if process is None:
        raise Conflict(
            f"{directory} is in use by process {holder.pid} ({holder.command}), which cannot be seen here; "
            "run this command in the container, or on the machine, where it was started"
        )
    return process


def pid_records(directory: Path) -> Iterator[tuple[str, PidRecord]]:
    """Yield the pid files of a data directory, with the names of their processes, also of dead ones."""
    files = [(name, directory / name / "server.pid") for name in SERVERS]
    files += [(file.stem, file) for file in sorted((directory / RUN).glob("*.pid"))]
    files += [(pool_name(file.stem.partition("@")[0]), file) for file in sorted((directory / POOLS).glob("*.pid"))]
    for name, file in files:
        if (record := pid_file.find(file)) is not None:
            yield name, record


def pool_name(id_: str) -> str:
    """Return the short name of a pool, with the end of its id."""
    return f"pool-{id_[-6:]}"


def log_files_of(directory: Path) -> Mapping[str, Path]:
    """Return the logs of a data directory, by the names of their processes. Those of ended pools are among them."""
    found = {name: directory / name / "server.log" for name in SERVERS}
    for file in sorted((directory / LOG_FILE.parent).glob("*.log")):
        name = file.name.removesuffix(".log")
        found[pool_name(name) if name.startswith("pool.") else name] = file
    return {name: file for name, file in found.items() if file.is_file()}


def _memory_of(leaders: Collection[int]) -> Counter[int]:
    """Return the bytes of memory of each of these processes with its children, except those that are listed too."""
    parents = {process.pid: process.info["ppid"] for process in psutil.process_iter(["ppid"])}
    found: Counter[int] = Counter()
    for pid in parents:
        above: int | None = pid
        while above and above not in leaders:
            above = parents.get(above)
        if above:
            found[above] += _memory(pid)
    return found


def _memory(pid: int) -> int:
    try:
        process = psutil.Process(pid)
        try:
            full = process.memory_full_info()
            return int(getattr(full, "pss", 0) or full.rss)
        except psutil.AccessDenied:  # Postgres may run as another user
            return int(process.memory_info().rss)
    except psutil.Error:
        return 0
