"""
An embedded server: one child process with its data, its stored endpoint and its log in one directory.

A start takes over the server of a killed parent when it is the same program on the same port and answers; otherwise it
ends that server and starts a new one. It returns when the server answers.
A failed start leaves no process, also after an interrupt.
The password is in no command line, no log and no environment.

Subclasses contain everything that is specific to Postgres or Valkey.
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
from app.kernel.embedded.endpoint import ENDPOINT_FILE, Endpoint, find_endpoint, free_port, is_free, store_endpoint
from app.kernel.embedded.run_as import ENVIRONMENT, RunAs
from app.kernel.errors import ServerNotStarted
from app.kernel.ids import new_secret
from app.kernel.processes import pid_file
from app.kernel.processes.data_directory import make_directory
from app.kernel.processes.process import AdoptedProcess, Child, Leftover, adopt, end_leftovers

#: Time for a server to answer after its start, including recovery after a crash.
START_DEADLINE = timedelta(seconds=90)

#: Most changes of the port during a start, each because another program uses the port.
_MAX_PORT_CHANGES = 5
_POLL = timedelta(milliseconds=20)
#: Seconds within which the server of a killed parent must answer to be taken over.
_TAKE_OVER_TIMEOUT = 3.0
#: Seconds to wait for the stored port to become free: the last threads of a killed server use it for a moment.
_PORT_RELEASE_TIMEOUT = 2.0
_TAIL_LINES = 25
_PID_FILE = "server.pid"

_log = log.get(__name__)


class Server(ABC):
    """A server with a directory of its own. `stop` may be called at any time, also before and during a start."""

    #: Its name in messages.
    name: ClassVar[str]
    #: The signal for an immediate and orderly shutdown.
    stop_signal: ClassVar[signal.Signals]
    #: Time for the shutdown before the server is killed.
    stop_deadline: ClassVar[timedelta]
    #: Whether other accounts can traverse a directory of root, to reach their own files in it.
    traversable: ClassVar[bool] = False

    def __init__(self, directory: Path, *, deadline: timedelta = START_DEADLINE) -> None:
        """Describe a server by its directory and the deadline of its start, without creating anything."""
        self.directory = directory.absolute()
        self.log_file = self.directory / "server.log"
        self._deadline = deadline
        self._endpoint: Endpoint | None = None
        self._child: Child | AdoptedProcess | None = None
        #: The error of the last attempt to reach it.
        self._last_error = ""

    @property
    @abstractmethod
    def url(self) -> str:
        """The URL for clients, with the password. It changes with a restart only when another program uses the port."""

    @property
    def endpoint(self) -> Endpoint:
        """Port and password. Raises ServerNotStarted before the first start."""
        if self._endpoint is None:
            raise ServerNotStarted(self.name, "it has not been started")
        return self._endpoint

    @property
    def pid(self) -> int | None:
        """The pid of the server's main process, or None before the start."""
        return None if self._child is None else self._child.pid

    @property
    def alive(self) -> bool:
        """Whether its main process runs now."""
        return self._child is not None and self._child.alive

    def log_tail(self, lines: int = _TAIL_LINES) -> str:
        """Return the last lines of its log since its start."""
        return "" if self._child is None else self._child.log_tail(lines)

    def rotate_log(self) -> None:
        """Rotate its log when it has become long."""
        if self._child is not None:
            self._child.rotate_log()

    def start(self) -> None:
        """
        Start the server and return when it answers. A running server is not changed; one that died is restarted.

        Raises ServerNotStarted with the reason and the end of the log; then nothing runs.
        """
        if self.alive:
            return
        limit = time.monotonic() + self._deadline.total_seconds()
        try:
            make_directory(self.directory, traversable=self.traversable)
            self._find_program()
            if self._take_over():
                return
            self.end_leftovers()
            self._endpoint = self._choose_endpoint()
            self._prepare(limit)
            self._launch(limit)
        except OSError as error:
            self.stop()
            raise ServerNotStarted(self.name, str(error), self.log_tail()) from error
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Shut the server down, and kill it when it does not end in time. Does nothing when it is not running."""
        if self._child is not None:
            self._child.stop(self.stop_deadline)

    def is_stopped(self) -> bool:
        """Whether its process is stopped by a signal such as SIGSTOP."""
        return self.pid is not None and self.alive and pid_file.is_stopped(self.pid)

    def kill(self) -> None:
        """End the server without an orderly shutdown, when it does not react."""
        if self._child is not None:
            self._child.stop(timedelta(0))

    def _take_over(self) -> bool:
        """Take over the server of a killed parent if it equals the one to be started. Returns whether it did."""
        file = self.directory / _PID_FILE
        record, stored = pid_file.find(file), find_endpoint(self.directory / ENDPOINT_FILE)
        if record is None or stored is None or not record.orphaned:
            return False
        self._endpoint = stored
        same = record.command == shlex.join(self._argv()) and pid_file.runs_program(record.pid, self._program())
        if not same or (adopted := adopt(file, self.log_file)) is None:
            return False
        self._child = adopted
        limit = time.monotonic() + _TAKE_OVER_TIMEOUT
        while adopted.alive and not pid_file.is_stopped(adopted.pid):
            if self._answers():
                _log.info("server_taken_over", server=self.name, pid=adopted.pid, port=stored.port)
                return True
            if time.monotonic() > limit:
                break
            time.sleep(_POLL.total_seconds())
        _log.warning("leftover_unresponsive", server=self.name, pid=adopted.pid, error=self._last_error)
        adopted.stop(timedelta(0))
        return False

    def end_leftovers(self) -> tuple[Leftover, ...]:
        """End processes of a killed parent in this directory, without starting the server."""
        ended = end_leftovers(self.directory, self.stop_deadline)
        for leftover in ended:
            _log.warning("leftover_ended", server=self.name, pid=leftover.pid, forced=leftover.forced)
        return ended

    @abstractmethod
    def _find_program(self) -> None:
        """Find the program and the account under which it runs. Raises ServerNotStarted."""

    @abstractmethod
    def _program(self) -> Path:
        """Return the file of the server's program, after `_find_program`."""

    def _argv(self) -> tuple[str, ...]:
        return (*self._run_as().prefix, *self._command())

    @abstractmethod
    def _prepare(self, limit: float) -> None:
        """Prepare the data directory for a start. `limit` is an instant of the monotonic clock."""

    @abstractmethod
    def _command(self) -> Sequence[str]:
        """Return the server's command line. It is called for each attempt, and may write configuration files."""

    @abstractmethod
    def _answers(self) -> bool:
        """Whether the server answers now. Raises ServerNotStarted when it never will."""

    def _can_try_again(self, tail: str) -> bool:  # noqa: ARG002 a subclass reads it
        """Whether another attempt can succeed after the server ended with this log."""
        return False

    def _run_as(self) -> RunAs:
        return RunAs()

    def _environment(self) -> dict[str, str]:
        return dict(ENVIRONMENT)

    def _choose_endpoint(self, *, port_in_use: bool = False) -> Endpoint:
        """Return the stored endpoint, or one with a new port when another program uses the port."""
        file = self.directory / ENDPOINT_FILE
        stored = find_endpoint(file)
        if stored is not None and not port_in_use and _becomes_free(stored.port):
            return stored
        port = free_port(self.directory, other_than=stored.port if stored else None)
        endpoint = Endpoint(port, stored.password if stored else new_secret())
        store_endpoint(file, endpoint)
        if stored is not None:
            _log.warning("server_port_changed", server=self.name, port=port, port_in_use=stored.port)
        return endpoint

    def _launch(self, limit: float) -> None:
        port_changes = 0
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
            if "Address already in use" in tail and port_changes < _MAX_PORT_CHANGES:
                port_changes += 1
                self._endpoint = self._choose_endpoint(port_in_use=True)
            elif time.monotonic() > limit or not self._can_try_again(tail):
                raise ServerNotStarted(self.name, f"it ended with {_exit_description(status)}", tail)

    @abstractmethod
    def _working_directory(self) -> Path:
        """Return the working directory of the server."""

    def _wait(self, child: Child, limit: float) -> bool:
        """Wait until it answers (True) or has ended (False). Raises ServerNotStarted when neither happens in time."""
        while child.wait(_POLL) is None:
            if self._answers():
                return True
            if time.monotonic() > limit:
                seconds = self._deadline.total_seconds()
                error = f" ({self._last_error})" if self._last_error else ""
                raise ServerNotStarted(self.name, f"no answer within {seconds:g} s{error}", child.log_tail(_TAIL_LINES))
        return False


def _becomes_free(port: int) -> bool:
    limit = time.monotonic() + _PORT_RELEASE_TIMEOUT
    while not is_free(port):
        if time.monotonic() > limit:
            return False
        time.sleep(_POLL.total_seconds())
    return True


def _exit_description(status: int | None) -> str:
    if status is None or status >= 0:
        return f"status {status}"
    return signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
