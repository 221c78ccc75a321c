"""
Child processes: each runs in its own session, has a pid file, and is reliably ended.

A terminal's Ctrl-C reaches only the parent, which then ends its children in its own order.
No child runs without a pid file, so the next start can end the children of a killed parent.
A pid file contains the birth of the process next to its pid: a recycled pid is never signalled.
After a child is stopped, no process of its session is left. After it is killed, no descendant is left either.
A zombie counts as dead even before it is reaped.

PR_SET_PDEATHSIG is not used to end children with their parent: it fires when the *thread* that forked ends.
Nothing here restarts a child or interprets its output. A child inherits no environment: the caller passes it.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import IO, BinaryIO

import psutil

from app.kernel.errors import ServerNotStarted
from app.kernel.processes import forking, log_files, pid_file
from app.kernel.processes.forking import Entry, Fork
from app.kernel.processes.pid_file import PidRecord, birth
from app.kernel.security import texts

#: Time for a child to end after its stop signal.
STOP_DEADLINE = timedelta(seconds=10)
#: Seconds for the kernel to remove killed processes. Only a process that is stuck in the kernel takes longer.
KILL_SECONDS = 5.0

#: Waits for a line from the parent, which writes it after the pid file, and then executes the program. If the parent
#: dies or fails before that, the pipe is closed and the program never runs.
_GATE = 'read -r go && exec "$@" </dev/null'
_TAIL_BYTES = 64 * 1024
#: Most characters of a line in a tail.
_LINE_CHARACTERS = 2_000
_POLL_SECONDS = 0.02


class Child:
    """
    A child process, from before its start until after its end.

    Create it first and start it inside a `try` or `with`, so that it is stopped when an interrupt comes at any moment.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str],
        log_file: Path,
        pid_file: Path,
        stop_signal: signal.Signals = signal.SIGTERM,
        directory: Path | None = None,
        account: tuple[int, int] | None = None,
        descriptors: Sequence[int] = (),
        entry: Entry | None = None,
        parent: int | None = None,
    ) -> None:
        """
        Describe a process without starting it.

        `argv` is visible to every user of the machine: it must not contain a secret. `stop_signal` requests its end.
        `directory` is its working directory, by default that of the parent. `account` is its uid and gid, without
        further groups; only root can set another one than its own. `descriptors` are open files that it inherits.

        `entry` does what `argv` does. It is run in a fork of this process instead, where a fork is safe: that is
        faster, and shares the memory of imported modules. `parent` is the process to which it belongs according to its
        pid file, by default this one.
        """
        self.name = name
        self.argv = tuple(argv)
        self.log_file = log_file
        self.pid_file = pid_file
        self.stop_signal = stop_signal
        self._environment = dict(environment)
        self._directory = directory
        self._account = account
        self._descriptors = tuple(descriptors)
        self._entry = entry
        self._parent = parent
        self._log_offset = 0
        self._popen: subprocess.Popen[bytes] | Fork | None = None
        self._born: str | None = None

    def __enter__(self) -> Child:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """
        Start the process. Its output is appended to the log file, and its input is empty.

        Returns as soon as it runs. Raises ServerNotStarted when the program does not exist, a file cannot be used, or
        the account is not permitted; then nothing runs.
        """
        if self._popen is not None:
            raise ServerNotStarted(self.name, "this child was started before")
        if shutil.which(self.argv[0], path=self._environment.get("PATH", os.defpath)) is None:
            raise ServerNotStarted(self.name, f"there is no program {self.argv[0]}")
        try:
            self._start()
        except (OSError, subprocess.SubprocessError) as error:
            self.stop()
            raise ServerNotStarted(self.name, str(error)) from error
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        self.pid_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.log_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        log_files.rename_when_long(self.log_file)
        descriptor = os.open(self.log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        gate: IO[bytes]
        with os.fdopen(descriptor, "ab", buffering=0) as log:
            self._log_offset = log.tell()
            if self._entry is not None and self._account is None and forking.is_safe():
                self._popen, gate = forking.start(
                    self._entry,
                    shlex.join(self.argv),
                    environment=self._environment,
                    log=log,
                    directory=self._directory,
                    descriptors=self._descriptors,
                )
            else:
                self._popen, gate = self._execute(log)
        with gate:
            self._born = birth(self._popen.pid)
            pid_file.write(self.pid_file, self._record(self._popen.pid))
            with contextlib.suppress(BrokenPipeError):  # it has already ended, which the caller will see
                gate.write(b"go\n")

    def _execute(self, log: BinaryIO) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
        uid, gid = self._account or (None, None)
        popen = self._popen = subprocess.Popen(
            ["/bin/sh", "-c", _GATE, self.name, *self.argv],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=self._environment,
            cwd=self._directory,
            start_new_session=True,
            user=uid,
            group=gid,
            extra_groups=None if self._account is None else (),
            pass_fds=self._descriptors,
            bufsize=0,
        )
        assert popen.stdin is not None
        return popen, popen.stdin

    def _record(self, pid: int) -> PidRecord:
        parent = self._parent or os.getpid()
        return PidRecord(
            name=self.name,
            pid=pid,
            birth=self._born or "",
            command=shlex.join(self.argv),
            stop_signal=int(self.stop_signal),
            parent=parent,
            parent_birth=birth(parent) or "",
        )

    @property
    def pid(self) -> int | None:
        """The pid, which is also the id of the session; None before the start. It is kept after the end."""
        return None if self._popen is None else self._popen.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs now. A zombie does not, and reading this reaps it."""
        return self._popen is not None and self._popen.poll() is None

    @property
    def returncode(self) -> int | None:
        """The exit status, or the negative number of the signal that ended it; None before its end."""
        return None if self._popen is None else self._popen.poll()

    def wait(self, deadline: timedelta) -> int | None:
        """Wait for its end and return its `returncode`, or None when it still runs at the deadline."""
        if self._popen is None:
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(deadline.total_seconds())
        return self._popen.poll()

    def log_tail(self, lines: int = 20) -> str:
        """Return the last lines that it has written since this start; empty when there is no log."""
        return log_tail(self.log_file, lines, since=self._log_offset)

    def rotate_log(self) -> None:
        """Rotate its log when it has become long."""
        if log_files.copy_when_long(self.log_file):
            self._log_offset = 0

    def request_stop(self) -> None:
        """Send its stop signal without waiting."""
        if self._popen is not None and self._popen.poll() is None:
            self._popen.send_signal(self.stop_signal)

    def kill(self) -> None:
        """Kill this process only, without waiting: its own children continue."""
        if self._popen is not None:
            self._popen.kill()

    def stop(self, deadline: timedelta = STOP_DEADLINE, *, stop_signal: signal.Signals | None = None) -> int | None:
        """
        End the process and return its `returncode`: send a signal, wait until the deadline, then kill what is left.

        Returns when all processes of its session are gone. It may be called at any time, from any thread, repeatedly.
        An interrupt ends the wait early: the child is killed, and the interrupt is raised again.
        A process that the kernel cannot kill keeps its pid file, and the next start tries again.
        """
        popen = self._popen
        if popen is None:
            return None
        try:
            if popen.poll() is None:
                popen.send_signal(stop_signal or self.stop_signal)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    popen.wait(deadline.total_seconds())
        finally:
            self._kill_rest(popen)
        return popen.poll()

    def _kill_rest(self, popen: subprocess.Popen[bytes] | Fork) -> None:
        descendants: list[psutil.Process] = []
        if popen.poll() is None:
            descendants = _descendants(popen.pid)
            popen.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                popen.wait(KILL_SECONDS)
        if _kill([*descendants, *_session(popen.pid, self._born)]) and popen.poll() is not None:
            pid_file.remove(self.pid_file, popen.pid)


class AdoptedProcess:
    """A running process of a dead parent that this process has adopted. It is ended in the same way as a Child."""

    def __init__(self, record: PidRecord, process: psutil.Process, pid_file: Path, log_file: Path) -> None:
        """Created by `adopt`."""
        self.name, self.pid = record.name, record.pid
        self.pid_file, self.log_file = pid_file, log_file
        self._record, self._process = record, process
        #: None also after its end: the kernel reports the exit status to the original parent only.
        self.returncode: int | None = None

    @property
    def alive(self) -> bool:
        """Whether the process runs now. A zombie does not."""
        return _runs(self._process) and birth(self.pid) == self._record.birth

    @property
    def command(self) -> str:
        """The command line with which it was started."""
        return self._record.command

    def log_tail(self, lines: int = 20) -> str:
        """Return the last lines of its log; empty when there is no log."""
        return log_tail(self.log_file, lines)

    def rotate_log(self) -> None:
        """Rotate its log when it has become long."""
        log_files.copy_when_long(self.log_file)

    def request_stop(self) -> None:
        """Send its stop signal without waiting."""
        with contextlib.suppress(psutil.NoSuchProcess):
            if self.alive:
                self._process.send_signal(self._record.stop_signal)

    def stop(self, deadline: timedelta = STOP_DEADLINE) -> None:
        """End it: send its stop signal, wait, then kill what is left. Returns when all of its session is gone."""
        self.request_stop()
        others: list[psutil.Process] = []
        if not _wait_until(lambda: not self.alive, deadline.total_seconds()):
            others = [self._process, *_descendants(self.pid)]
        if _kill([*others, *_session(self.pid, self._record.birth)]):
            pid_file.remove(self.pid_file, self.pid)


def adopt(file: Path, log_file: Path) -> AdoptedProcess | None:
    """
    Adopt the process of a pid file when it runs and its parent is dead: this process becomes its recorded parent.

    Returns None otherwise, and removes the pid file of a dead process. Raises ServerNotStarted when the file belongs to
    another user.
    """
    record = pid_file.find(file)
    if record is None or not record.orphaned:
        return None
    process = _process(record.pid, record.birth)
    if process is None:
        _kill(_session(record.pid, record.birth))
        pid_file.remove(file, record.pid)
        return None
    parent = os.getpid()
    pid_file.write(file, replace(record, parent=parent, parent_birth=birth(parent) or ""))
    return AdoptedProcess(record, process, file, log_file)


@dataclass(frozen=True, slots=True)
class Leftover:
    """A process of a killed parent that was ended."""

    name: str
    pid: int
    command: str
    #: It was killed: it did not end after its stop signal, or got none.
    forced: bool


def end_leftovers(
    directory: Path, deadline: timedelta = STOP_DEADLINE, *, kill_at_once: Collection[str] = ()
) -> tuple[Leftover, ...]:
    """
    End the processes of dead parents that have pid files in the directory, and return those that were running.

    Each gets its stop signal. Those that still run at the deadline are killed together with their descendants.
    Processes named in `kill_at_once` are killed at once; their descendants in other sessions continue.
    A process whose parent lives is not ended, unless that parent is this process: call this function before starting
    children in the directory, while holding the directory's lock. Pid files of dead processes are removed.

    Raises ServerNotStarted when a pid file or process belongs to another user, or a process cannot be killed.
    """
    found = [(file, record) for file in sorted(directory.glob("*.pid")) if (record := pid_file.find(file)) is not None]
    running: list[tuple[PidRecord, psutil.Process]] = []
    for _, record in found:
        if not record.orphaned:
            continue
        if (process := _process(record.pid, record.birth)) is not None:
            running.append((record, process))
            try:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL if record.name in kill_at_once else record.stop_signal)
            except psutil.AccessDenied as error:
                raise ServerNotStarted(
                    record.name, f"process {record.pid} of an earlier start still runs, as another user"
                ) from error

    _wait_until(lambda: not any(_runs(process) for _, process in running), deadline.total_seconds())
    ended: list[Leftover] = []
    for record, process in running:
        late = _runs(process)
        forced = late or record.name in kill_at_once
        others = [process, *_descendants(record.pid)] if late else []
        if not _kill([*others, *_session(record.pid, record.birth)]):
            raise ServerNotStarted(record.name, f"process {record.pid} of an earlier start cannot be killed")
        ended.append(Leftover(record.name, record.pid, record.command, forced))
    for file, record in found:
        if record.orphaned:
            pid_file.remove(file, record.pid)
    return tuple(ended)


def end_all(processes: Iterable[psutil.Process], seconds: float) -> bool:
    """End any processes: SIGTERM, and SIGKILL after `seconds`. Returns whether all of them are gone."""
    ending = list(processes)
    for process in ending:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    return _wait_until(lambda: not any(_runs(process) for process in ending), seconds) or _kill(ending)


def log_tail(file: Path, lines: int = 20, *, since: int = 0) -> str:
    """
    Return the last lines of a file, from its byte `since` on; empty when there is no such file.

    At most the last 64 KiB are read. The text is safe to store and to print, whatever the file contains.
    """
    try:
        with file.open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(since if since <= end else 0, end - _TAIL_BYTES))
            content = log.read(_TAIL_BYTES)
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"{file} cannot be read: {error.strerror or error}"
    read = content.decode(errors="replace").splitlines()
    return "\n".join(texts.printable(line, _LINE_CHARACTERS) for line in read[-lines:])


def _process(pid: int, born: str) -> psutil.Process | None:
    """Return the process if it runs and has this birth. Psutil refuses to signal a later process with the same pid."""
    try:
        process = psutil.Process(pid)
    except psutil.Error:
        return None
    return process if birth(pid) == born else None


def _runs(process: psutil.Process) -> bool:
    return process.is_running() and birth(process.pid) is not None


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def _session(leader: int, born: str | None) -> list[psutil.Process]:
    """Return the processes of a session without its leader. The kernel does not reuse the id while one of them runs."""
    if birth(leader) not in {None, born}:
        return []
    members: list[psutil.Process] = []
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, PermissionError, psutil.Error):
            if pid != leader and os.getsid(pid) == leader:
                members.append(psutil.Process(pid))
    return members


def _kill(processes: Iterable[psutil.Process]) -> bool:
    """Kill the processes. Returns whether all of them are gone."""
    killed = list(processes)
    for process in killed:
        with contextlib.suppress(psutil.Error):
            process.kill()
    return _wait_until(lambda: not any(_runs(process) for process in killed), KILL_SECONDS)


def _wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            return False
        time.sleep(_POLL_SECONDS)
    return True
