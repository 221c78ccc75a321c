"""
An embedded server: one child process with data, a kept endpoint and a log, all below one directory.

Starting it takes over what a killed parent left running on its data, where that is the same program on the same port
and answers; else ends it, and starts anew. It returns when it answers.
Whatever goes wrong in between, an interrupt included, leaves no process.
Its password is in no command line, no log and no environment.

What is particular to a server is in its subclass; this one has no opinion about either.
The caller holds the lock of the data directory.
"""

from __future__ import annotations

import shlex
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import ClassVar

from app.kernel import log
from app.kernel.embedded.data_directory import make_directory
from app.kernel.embedded.endpoint import ENDPOINT_FILE, Endpoint, find_endpoint, free_port, is_free, keep_endpoint
from app.kernel.embedded.run_as import ENVIRONMENT, RunAs
from app.kernel.errors import ServerNotStarted
from app.kernel.ids import new_secret
from app.kernel.processes import pid_file
from app.kernel.processes.process import Adopted, Child, Leftover, adopt, end_leftovers

#: How long a server may take until it answers. Recovery after a crash is part of it.
START_DEADLINE = timedelta(seconds=90)

#: How often an address that a stranger took at the last instant is given up for another.
_MOVES = 5
_POLL = timedelta(milliseconds=20)
#: Seconds in which a server that a killed parent left behind has to answer, if it is to be taken over.
_TAKE_OVER = 3.0
#: Seconds in which the kept port may become free: the last threads of a killed server hold it for a moment.
_FREED = 2.0
_TAIL_LINES = 25
_PID_FILE = "server.pid"

_log = log.get(__name__)


class Server(ABC):
    """A server below a directory of its own. Make it first, then start it: `stop` is right at any moment."""

    #: What messages call it.
    name: ClassVar[str]
    #: Asks it to end at once, and in order.
    stop_signal: ClassVar[signal.Signals]
    #: How long that may take before it is killed.
    stop_deadline: ClassVar[timedelta]
    #: Root lets others pass through the directory, to what in it belongs to them.
    passable: ClassVar[bool] = False

    def __init__(self, directory: Path, *, deadline: timedelta = START_DEADLINE) -> None:
        """Name the server's directory and how long a start may take; nothing is made or started."""
        self.directory = directory.absolute()
        self.log_file = self.directory / "server.log"
        self._deadline = deadline
        self._endpoint: Endpoint | None = None
        self._child: Child | Adopted | None = None
        #: What the last attempt to reach it met.
        self._obstacle = ""

    @property
    @abstractmethod
    def url(self) -> str:
        """Where clients connect, with the password. It stays the same over restarts."""

    @property
    def endpoint(self) -> Endpoint:
        """Port and password. Raises ServerNotStarted before the first start."""
        if self._endpoint is None:
            raise ServerNotStarted(self.name, "it was not started yet")
        return self._endpoint

    @property
    def pid(self) -> int | None:
        """The pid of the server's first process, or None before the start."""
        return None if self._child is None else self._child.pid

    @property
    def alive(self) -> bool:
        """Whether its process runs now."""
        return self._child is not None and self._child.alive

    def log_tail(self, lines: int = _TAIL_LINES) -> str:
        """The last lines of its log since its start."""
        return "" if self._child is None else self._child.log_tail(lines)

    def start(self) -> None:
        """
        Start it and return when it answers. Nothing happens when it is running; one that died is started anew.

        Raises ServerNotStarted with the reason and the end of the log; then nothing runs.
        """
        if self.alive:
            return
        limit = time.monotonic() + self._deadline.total_seconds()
        try:
            make_directory(self.directory, passable=self.passable)
            self._find_program()
            if self._take_over():
                return
            self.end_leftovers()
            self._endpoint = self._settle()
            self._prepare(limit)
            self._launch(limit)
        except OSError as error:
            self.stop()
            raise ServerNotStarted(self.name, str(error), self.log_tail()) from error
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End it in order, by force when it does not end in time. Nothing happens when it is not running."""
        if self._child is not None:
            self._child.stop(self.stop_deadline)

    def is_stopped(self) -> bool:
        """Whether its process was stopped by a signal, and does nothing."""
        return self.pid is not None and self.alive and pid_file.is_stopped(self.pid)

    def kill(self) -> None:
        """End it by force, as one that does not react has to be."""
        if self._child is not None:
            self._child.stop(timedelta(0))

    def _take_over(self) -> bool:
        """Whether a server that a killed parent left behind goes on here: the one that would be started now."""
        file = self.directory / _PID_FILE
        record, kept = pid_file.find(file), find_endpoint(self.directory / ENDPOINT_FILE)
        if record is None or kept is None or not record.orphaned:
            return False
        self._endpoint = kept
        same = record.command == shlex.join(self._argv()) and pid_file.runs_program(record.pid, self._program())
        if not same or (left := adopt(file, self.log_file)) is None:
            return False
        self._child = left
        limit = time.monotonic() + _TAKE_OVER
        while left.alive and not pid_file.is_stopped(left.pid):
            if self._answers():
                _log.info("server_taken_over", server=self.name, pid=left.pid, port=kept.port)
                return True
            if time.monotonic() > limit:
                break
            time.sleep(_POLL.total_seconds())
        _log.warning("leftover_does_not_answer", server=self.name, pid=left.pid, obstacle=self._obstacle)
        left.stop(timedelta(0))
        return False

    def end_leftovers(self) -> tuple[Leftover, ...]:
        """End what a killed parent left running here. It does not start the server."""
        ended = end_leftovers(self.directory, self.stop_deadline)
        for leftover in ended:
            _log.warning("leftover_ended", server=self.name, pid=leftover.pid, forced=leftover.forced)
        return ended

    @abstractmethod
    def _find_program(self) -> None:
        """Find out what is run, and as whom. Raises ServerNotStarted."""

    @abstractmethod
    def _program(self) -> Path:
        """The file of the server's program, once it was found."""

    def _argv(self) -> tuple[str, ...]:
        return (*self._run_as().prefix, *self._command())

    @abstractmethod
    def _prepare(self, limit: float) -> None:
        """Make the data directory fit for a start, by the limit (of the monotonic clock)."""

    @abstractmethod
    def _command(self) -> Sequence[str]:
        """The server's command line. It is called for each attempt, and may write configuration."""

    @abstractmethod
    def _answers(self) -> bool:
        """Whether the server serves now. Raises ServerNotStarted when it never will."""

    def _can_try_again(self, tail: str) -> bool:  # noqa: ARG002 a subclass reads it
        """Whether a server that ended with this log may come up in another attempt."""
        return False

    def _run_as(self) -> RunAs:
        return RunAs()

    def _environment(self) -> dict[str, str]:
        return dict(ENVIRONMENT)

    def _settle(self, *, moved: bool = False) -> Endpoint:
        """The endpoint of the next attempt: the kept one, unless a stranger listens there or it is to be `moved`."""
        file = self.directory / ENDPOINT_FILE
        kept = find_endpoint(file)
        if kept is not None and not moved and _becomes_free(kept.port):
            return kept
        port = free_port(self.directory, other_than=kept.port if kept else None)
        endpoint = Endpoint(port, kept.password if kept else new_secret())
        keep_endpoint(file, endpoint)
        if kept is not None:
            _log.warning("server_moved", server=self.name, port=port, taken=kept.port)
        return endpoint

    def _launch(self, limit: float) -> None:
        moves = 0
        while True:
            self._child = child = Child(
                self.name,
                self._argv(),
                environment=self._environment(),
                log_file=self.log_file,
                pid_file=self.directory / _PID_FILE,
                stop_signal=self.stop_signal,
                directory=self._working_directory(),
                account=self._run_as().account,
            )
            child.start()
            if self._wait(child, limit):
                _log.info("server_started", server=self.name, pid=self.pid, port=self.endpoint.port)
                return
            status, tail = child.stop(), child.log_tail(_TAIL_LINES)
            if "Address already in use" in tail and moves < _MOVES:
                moves += 1
                self._endpoint = self._settle(moved=True)
            elif time.monotonic() > limit or not self._can_try_again(tail):
                raise ServerNotStarted(self.name, f"it ended with {_how(status)}", tail)

    @abstractmethod
    def _working_directory(self) -> Path:
        """Where the server runs: the directory of its data."""

    def _wait(self, child: Child, limit: float) -> bool:
        """True once it answers, False when it has ended. Raises ServerNotStarted when it does neither in time."""
        while child.wait(_POLL) is None:
            if self._answers():
                return True
            if time.monotonic() > limit:
                seconds = self._deadline.total_seconds()
                met = f" ({self._obstacle})" if self._obstacle else ""
                raise ServerNotStarted(self.name, f"no answer within {seconds:g} s{met}", child.log_tail(_TAIL_LINES))
        return False


def _becomes_free(port: int) -> bool:
    limit = time.monotonic() + _FREED
    while not is_free(port):
        if time.monotonic() > limit:
            return False
        time.sleep(_POLL.total_seconds())
    return True


def _how(status: int | None) -> str:
    if status is None or status >= 0:
        return f"status {status}"
    return signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
