"""
Spawning: a process lets the parent of its tree start programs for it, as forks with the modules of that parent.

The program belongs to the process that asked: its pid file names that one as the parent, which signals it and which the
next such process follows. Only its exit code takes the way back, because the kernel reports it to the real parent.
When the parent cannot fork, or does not answer in time, the process starts the program itself.
A request names a moment after which it is void, so that no program is started twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import psutil

from app.kernel.errors import ServerNotStarted
from app.kernel.processes import forking, pid_file
from app.kernel.processes.process import AdoptedProcess, Child, adopt

#: Seconds to wait for the parent to start a program; and the part of it after which the request is void.
_ANSWER_SECONDS, _VALID = 5.0, 0.8
#: Seconds to wait for the exit code of a process that has ended.
_CODE_SECONDS = 1.0
#: Most bytes of a message; one with a large environment has some 20,000.
_MESSAGE_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class SpawnRequest:
    """A program to start."""

    name: str
    #: The arguments after `python -m`.
    arguments: Sequence[str]
    environment: Mapping[str, str]
    log_file: str
    pid_file: str
    #: The process that asks, and its birth.
    parent: int
    parent_birth: str
    #: When the request is void, by the monotonic clock, which all processes of a machine share.
    until: float


#: Describes the program of a request as a child, before its start.
Describe = Callable[[SpawnRequest], Child]


class Spawner:
    """The side of the parent: its own socket, and the one that a child inherits."""

    def __init__(self, describe: Describe) -> None:
        self._own, self.inherited = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._own.setblocking(False)
        self._describe = describe
        self._children: list[Child] = []
        #: By pid, what asked for children that it does not know yet. They are not reaped: their pid file would be gone.
        self._unknown: dict[int, SpawnRequest] = {}

    def fileno(self) -> int:
        """Return the descriptor that is readable when there is a request."""
        return self._own.fileno()

    @property
    def pids(self) -> list[int]:
        """The processes that were started and have not been seen to end."""
        return [child.pid for child in self._children if child.pid is not None]

    def has_request(self) -> bool:
        """Whether there is a request."""
        with contextlib.suppress(BlockingIOError):
            return bool(self._own.recv(1, socket.MSG_PEEK))
        return False

    def serve(self) -> None:
        """Start what is asked for, and report what has ended. Does not wait."""
        with contextlib.suppress(BlockingIOError):
            while message := self._own.recv(_MESSAGE_BYTES):
                told = json.loads(message)
                if "known" in told:
                    self._unknown.pop(told["known"], None)
                else:
                    self._start(SpawnRequest(**told))
        for child in [child for child in self._children if self._is_known(child) and not child.alive]:
            self._unknown.pop(child.pid or 0, None)
            self._children.remove(child)
            self._send({"ended": child.pid, "code": child.returncode})

    def close(self) -> None:
        """Close both sockets. What was started continues."""
        self._own.close()
        self.inherited.close()

    def _start(self, request: SpawnRequest) -> None:
        if time.monotonic() > request.until or pid_file.birth(request.parent) != request.parent_birth:
            return
        if not forking.is_safe():
            self._send({"started": None})
            return
        child = self._describe(request)
        try:
            child.start()
        except ServerNotStarted:
            self._send({"started": None})  # the same happens to the process that asks, which then says why
            return
        self._children.append(child)
        if self._send({"started": child.pid}):
            self._unknown[child.pid or 0] = request
        else:
            child.kill()

    def _is_known(self, child: Child) -> bool:
        """Whether the process that asked has read the pid file of the child, or will not any more."""
        request = self._unknown.get(child.pid or 0)
        if request is None or time.monotonic() > request.until + _ANSWER_SECONDS:
            return True
        return pid_file.birth(request.parent) != request.parent_birth

    def _send(self, message: Mapping[str, Any]) -> bool:
        try:
            self._own.send(json.dumps(message).encode())
        except OSError:
            return False
        return True


class SpawnedProcess(AdoptedProcess):
    """A process that the parent of the tree has started for this one."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._told = threading.Event()

    def note_end(self, code: int | None) -> None:
        """Take the exit code, None when it will never be known."""
        self.returncode = code
        self._told.set()

    @property
    def alive(self) -> bool:
        """Whether the process runs now. When it does not, its exit code is known, if it ever will be."""
        if super().alive:
            return True
        self._told.wait(_CODE_SECONDS)
        return False


class SpawnerClient:
    """The side of a child: asks its parent to start programs. One thread calls `start`."""

    def __init__(self, descriptor: int, on_end: Callable[[], object]) -> None:
        """Use an inherited socket. `on_end` is called, on a thread, when a started process has ended."""
        self._socket = socket.socket(fileno=descriptor)
        self._socket.setblocking(True)
        self._on_end = on_end
        self._started: SimpleQueue[int | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._processes: dict[int, SpawnedProcess] = {}
        #: By pid, exit codes of processes that ended before they were known here.
        self._codes: dict[int, int | None] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._listen, name="spawner", daemon=True)
        self._thread.start()

    def start(
        self, name: str, arguments: Sequence[str], environment: Mapping[str, str], log_file: Path, file: Path
    ) -> SpawnedProcess | None:
        """Have a program started; None when the parent cannot, and the caller has to."""
        if self._closed:
            return None
        own, until = os.getpid(), time.monotonic() + _ANSWER_SECONDS * _VALID
        request = SpawnRequest(
            name, list(arguments), dict(environment), str(log_file), str(file), own, pid_file.birth(own) or "", until
        )
        try:
            self._socket.send(json.dumps(asdict(request)).encode())
            pid = self._started.get(timeout=_ANSWER_SECONDS)
        except (OSError, Empty):
            self._closed = True  # a late answer must not be taken for the answer to the next request
            return None
        if pid is None:
            return None
        process = self._known(pid, file, log_file)
        with contextlib.suppress(OSError):
            self._socket.send(json.dumps({"known": pid}).encode())
        return process

    def close(self) -> None:
        """Ask for nothing any more. What was started continues."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def _known(self, pid: int, file: Path, log_file: Path) -> SpawnedProcess | None:
        record = pid_file.find(file)
        if record is None or record.pid != pid:
            return None
        try:
            process = SpawnedProcess(record, psutil.Process(pid), file, log_file)
        except psutil.Error:  # it has ended, and was reaped
            adopt(file, log_file)  # removes the file and ends the rest of its session
            return None
        with self._lock:
            self._processes[pid] = process
            if pid in self._codes:
                process.note_end(self._codes.pop(pid))
        return process

    def _listen(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while message := self._socket.recv(_MESSAGE_BYTES):
                told = json.loads(message)
                if "started" in told and self._closed and told["started"] is not None:
                    os.kill(told["started"], signal.SIGKILL)  # too late: the program was started here
                elif "started" in told:
                    self._started.put(told["started"])
                elif "ended" in told:
                    self._note_end(told["ended"], told["code"])
        self._closed = True
        with self._lock:
            for process in self._processes.values():
                process.note_end(None)
        self._on_end()

    def _note_end(self, pid: int, code: int | None) -> None:
        with self._lock:
            process = self._processes.pop(pid, None)
            if process is None:
                self._codes[pid] = code
            else:
                process.note_end(code)
        self._on_end()
