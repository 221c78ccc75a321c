"""
Forks: a program that runs in a copy of this process, with the modules that this process has imported.

A fork starts without importing anything, and shares the memory of the modules with its parent and its siblings.
It is safe only while this process has one thread: another one could hold a lock that the copy would wait for.

The copy keeps no open file, signal handler, exit handler or environment of its parent. It begins when the
parent lets it, and never returns to the caller's code: it ends with the program.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from setproctitle import setproctitle

#: Runs a program; the result is its exit code, None for success.
Entry = Callable[[], object]

#: Signals that a parent may handle, and that must not reach its handlers in a copy.
_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD})
_TASKS, _FILES = Path("/proc/self/task"), Path("/proc/self/fd")
#: Seconds between two looks at a process that is waited for.
_POLL_SECONDS = 0.02


def is_offered() -> bool:
    """Whether processes can be forked on this system at all: libraries of macOS do not survive it."""
    return sys.platform == "linux"


def is_safe() -> bool:
    """Whether this process may be forked now: it has one thread, those of C libraries included."""
    return is_offered() and len(list(_TASKS.iterdir())) == 1


def freeze() -> None:
    """Exclude all objects of now from garbage collection: it would write to each, and so copy the shared memory."""
    gc.collect()
    gc.freeze()


class Fork:
    """A forked process, with the methods of `subprocess.Popen` that `Child` needs."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        """Return the exit code, or the negative number of the signal that ended it; None while it runs."""
        with self._lock:
            if self.returncode is None:
                try:
                    pid, status = os.waitpid(self.pid, os.WNOHANG)
                except ChildProcessError:  # as in Popen: somebody else has waited for it
                    self.returncode = 0
                else:
                    if pid == self.pid:
                        self.returncode = os.waitstatus_to_exitcode(status)
            return self.returncode

    def wait(self, timeout: float) -> int:
        """Wait for the end. Raises subprocess.TimeoutExpired."""
        limit = time.monotonic() + timeout
        while (found := self.poll()) is None:
            if time.monotonic() > limit:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(_POLL_SECONDS)
        return found

    def send_signal(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def start(
    entry: Entry,
    title: str,
    *,
    environment: Mapping[str, str],
    log: BinaryIO,
    directory: Path | None = None,
    descriptors: Collection[int] = (),
) -> tuple[Fork, BinaryIO]:
    """
    Fork this process. The copy waits for a line in the returned file, and then calls `entry`.

    It is the leader of a session, writes to `log`, has an empty input and these descriptors, and is called `title`.
    When the file is closed without a line, the copy ends. Raises OSError.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    waiting, gate = os.pipe()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        pid = os.fork()
        if pid == 0:
            os.close(gate)
            _run(entry, title, environment, waiting, log.fileno(), directory, descriptors, blocked)
        return Fork(pid), os.fdopen(gate, "wb", buffering=0)
    finally:
        os.close(waiting)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _run(
    entry: Entry,
    title: str,
    environment: Mapping[str, str],
    waiting: int,
    log: int,
    directory: Path | None,
    descriptors: Collection[int],
    blocked: Collection[int],
) -> NoReturn:
    """Be the copy, until the end."""
    code = 1
    try:
        os.setsid()
        _reset_signals()
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        if not os.read(waiting, 1):
            os._exit(1)
        _redirect(log, descriptors)
        setproctitle(title)  # it needs the parent's environment, whose place it uses
        os.environ.clear()  # noqa: TID251 the copy gets another one
        os.environ.update(environment)  # noqa: TID251 as above
        if directory is not None:
            os.chdir(directory)
        # The parent's: its copy of a temporary directory, for example, would remove the directory.
        atexit._clear()
        weakref.finalize._registry.clear()  # type: ignore[attr-defined] # unknown to the stubs
        code = _exit_code(entry())
    except SystemExit as error:
        code = _exit_code(error.code)
    except BaseException:  # noqa: BLE001 the outermost frame of a process
        traceback.print_exc()
    finally:
        _end(code)


def _end(code: int) -> NoReturn:
    """End as the interpreter does: wait for threads, call exit handlers, write what is buffered."""
    try:
        threading._shutdown()  # type: ignore[attr-defined] # as multiprocessing does
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code & 0xFF)


def _exit_code(result: object) -> int:
    if isinstance(result, int):
        return result
    if result is not None:
        sys.stderr.write(f"{result}\n")
        return 1
    return 0


def _reset_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number is signal.SIGINT else signal.SIG_DFL)


def _redirect(log: int, descriptors: Collection[int]) -> None:
    """
    Write to the log, read nothing, and let go of all other files of the parent, such as its locks.

    The numbers of those stay in use: an object of the parent that closes its own would close another file.
    """
    nothing = os.open(os.devnull, os.O_RDWR)
    opened = {int(file.name) for file in _FILES.iterdir()} - {0, 1, 2, nothing, *descriptors}
    os.dup2(nothing, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for number in opened:
        with contextlib.suppress(OSError):  # the one with which the list was read is closed
            os.fstat(number)
            os.dup2(nothing, number, inheritable=False)
    for number in descriptors:
        os.set_inheritable(number, True)
    streams: Any = sys
    streams.stdin = streams.__stdin__ = os.fdopen(0, "r", closefd=False)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = os.fdopen(number, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)
        setattr(streams, name, stream)
        setattr(streams, f"__{name}__", stream)
