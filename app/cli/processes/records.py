"""
The record of a running `arriero up`: a file in its data directory, for `status`, `down`, `restart` and `logs`.

Only `arriero up` writes it. It counts while the process that wrote it holds the lock of the directory: a killed tree
leaves its record behind. A request for a restart is another file, which `arriero up` takes when it gets SIGUSR1.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from app.kernel import log
from app.kernel.processes import private_file
from app.kernel.processes.data_directory import DirectoryHolder, find_holder

_log = log.get(__name__)

#: The folder of the pid files, in a data directory.
RUN = "run"
#: The log of `arriero up -d`, in a data directory.
LOG_FILE = Path("logs", "up.log")
_RECORD, _REQUEST = "up.json", "restart.json"
#: Most bytes of either file.
_MAX_BYTES = 64 * 1024


class TreeState(StrEnum):
    """What `arriero up` does."""

    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"


@dataclass(slots=True)
class TreeRecord:
    """What `arriero up` says of itself."""

    pid: int
    #: The id of this start, which its API has in the answers of `/healthz`.
    instance: str
    version: str
    state: str = TreeState.STARTING
    #: Where its API listens, as a URL for this host.
    api: str = ""
    flower: str | None = None
    #: Seconds from the start until everything was ready.
    ready_after: float | None = None
    #: The names of the programs and servers that are meant to run.
    programs: list[str] = field(default_factory=list)
    #: By program or server, how often it was restarted.
    restarts: dict[str, int] = field(default_factory=dict)
    #: By program, how it last ended.
    endings: dict[str, str] = field(default_factory=dict)

    def save(self, directory: Path) -> None:
        """Write it to the data directory. A full disk is logged: it prevents neither a restart nor a stop."""
        try:
            (directory / RUN).mkdir(mode=0o700, parents=True, exist_ok=True)
            private_file.write(directory / RUN / _RECORD, json.dumps(asdict(self)) + "\n")
        except OSError as error:
            _log.warning("record_not_written", error=str(error))


def find(directory: Path, holder: DirectoryHolder | None) -> TreeRecord | None:
    """Return the record of the process that holds the data directory; None when it has not written one."""
    read = _read(directory / RUN / _RECORD)
    try:
        record = TreeRecord(**read)
    except TypeError:
        return None
    return record if holder is not None and record.pid == holder.pid else None


def running(directory: Path) -> TreeRecord | None:
    """Return the record of the `arriero up` that holds the data directory now."""
    holder = find_holder(directory)
    return None if holder is None else find(directory, holder)


def remove(directory: Path) -> None:
    """Remove the record, and a request that was not taken."""
    for name in (_RECORD, _REQUEST):
        with contextlib.suppress(OSError):
            (directory / RUN / name).unlink(missing_ok=True)


def request_restart(directory: Path, names: Sequence[str]) -> None:
    """Write a request: the names of what is to be restarted, or none for everything."""
    private_file.write(directory / RUN / _REQUEST, json.dumps({"names": list(names)}) + "\n")


def take_request(directory: Path) -> list[str]:
    """Return the names in the request and remove it; empty means everything. Raises FileNotFoundError without one."""
    file = directory / RUN / _REQUEST
    if not file.exists():
        raise FileNotFoundError(file)
    names = _read(file).get("names")
    file.unlink(missing_ok=True)
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _read(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            read = json.loads(stream.read(_MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return read if isinstance(read, dict) else {}
