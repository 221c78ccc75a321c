"""Frozen servers: all processes of a server are stopped by SIGSTOP; it accepts connections, and answers nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import psutil


@contextlib.contextmanager
def frozen(pid: int | None) -> Iterator[None]:
    """A process that the test started itself, and all of its children, until the end of the block."""
    assert pid is not None
    # The parent first: it starts no child meanwhile.
    stopped = [psutil.Process(pid)]
    stopped[0].suspend()
    stopped += stopped[0].children(recursive=True)
    try:
        for process in stopped[1:]:
            process.suspend()
        yield
    finally:
        for process in reversed(stopped):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
