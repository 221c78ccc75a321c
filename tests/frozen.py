"""Frozen servers: SIGSTOP stops all processes of a server, which then accepts connections but does not answer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import psutil


@contextlib.contextmanager
def frozen(pid: int | None) -> Iterator[None]:
    """Stop a process that the test started, and its descendants, until the block ends."""
    assert pid is not None
    # The parent first, so that it starts no child meanwhile.
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
