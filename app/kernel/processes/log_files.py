"""
Log files of child processes: bounded in size while their process runs.

A child writes to its own descriptor, which is opened for appending. A log that has become long is therefore copied to
`NAME.1` and emptied, instead of renamed. Lines that are written between the end of the copy and the emptying are lost.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from app.kernel import log

#: A log with more bytes is rotated: to `NAME.1`, whose content is lost.
LOG_BYTES = 8 * 1024 * 1024

_log = log.get(__name__)


def rotated(file: Path) -> Path:
    """Return the path of the older part of a log."""
    return file.with_name(f"{file.name}.1")


def rename_when_long(file: Path) -> None:
    """Rotate a log to which no process writes."""
    with contextlib.suppress(FileNotFoundError):
        if file.stat().st_size > LOG_BYTES:
            file.replace(rotated(file))


def copy_when_long(file: Path) -> bool:
    """Rotate a log to which a process writes, and return whether it was. A failure is logged: the log then grows on."""
    part = file.with_name(f"{file.name}.part")
    try:
        if file.stat().st_size <= LOG_BYTES:
            return False
        with file.open("r+b") as source:
            with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as target:
                shutil.copyfileobj(source, target, 1024 * 1024)
            part.replace(rotated(file))
            source.truncate(0)
    except FileNotFoundError:
        return False
    except OSError as error:
        _log.warning("log_not_rotated", file=str(file), error=error.strerror or str(error))
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        return False
    return True
