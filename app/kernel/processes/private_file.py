"""
A private file: readable by its owner only, and there whole or not at all.

What holds a password or tells about a process is written here.
A reader sees the old content or the new one, never a part; a power cut leaves one of the two.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path


def write(path: Path, content: str) -> None:
    """
    Put `content` into the file, with mode 0600, in place of what was there.

    Raises OSError; the old file is then still whole.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)  # mkstemp makes it 0600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Bring to disk which names the directory holds, after one was made, moved or removed."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
