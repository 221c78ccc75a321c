"""
A child process of ours: in a session of its own, known by a pid file, ended for certain.

A terminal's Ctrl-C reaches only the parent, which then ends its children in its own order.
No child runs without a pid file, so that the next start can end what a killed parent left behind.
A pid file names the process's birth besides its pid: a recycled pid is never signalled.
A stopped child leaves nothing of its session; one that had to be forced leaves no descendant either.
A zombie is dead, whoever should have reaped it.

Children are not tied to their parent's death by PR_SET_PDEATHSIG: it fires when the *thread* that forked ends.
Nothing here restarts a child or reads its output's meaning, and no environment is inherited: the caller passes it.
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

import psutil

from app.kernel.errors import ServerNotStarted
from app.kernel.processes import pid_file
from app.kernel.processes.pid_file import PidRecord, birth
from app.kernel.security import texts

#: How long a child may take to end after it was asked to.
STOP_DEADLINE = timedelta(seconds=10)
#: How long the kernel is given to remove killed processes, in seconds. Only one stuck in the kernel takes longer.
KILL_SECONDS = 5.0
#: A log larger than this many bytes is put aside, as `NAME.1`, when its process starts anew.
LOG_BYTES = 8 * 1024 * 1024

#: Waits for the parent's word, which comes once the pid file is written, and then becomes the program. If the parent
#: dies or gives up before that, the pipe is closed and the program never runs.
_GATE = 'read -r go && exec "$@" </dev/null'
_TAIL_BYTES = 64 * 1024
#: Characters of a line in a tail.
_LINE_CHARACTERS = 2_000
_POLL_SECONDS = 0.02


class Child:
    """
    One process of ours, from before its start to after its end.

    Make it first and start it under a `try` (or `with`), so that an interrupt at any moment finds somebody to stop it.
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
    ) -> None:
        """
        Describe a process: nothing starts here.

        `argv` is visible to every user of the machine: it must hold no secret. `stop_signal` asks it to end.
        `directory` is where it runs, by default where the parent does. `account` is the uid and gid it gets
        (only root can give another one), with no further groups. `descriptors` are open files that it inherits.
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
        self._log_offset = 0
        self._popen: subprocess.Popen[bytes] | None = None
        self._born: str | None = None

    def __enter__(self) -> Child:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """
        Start it: its output goes to the end of the log file, its input is empty.

        Returns as soon as it runs. Raises ServerNotStarted when there is no such program, or when a file or the
        account is refused; then nothing runs.
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
        uid, gid = self._account or (None, None)
        self.log_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _put_aside_when_large(self.log_file)
        descriptor = os.open(self.log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "ab", buffering=0) as log:
            self._log_offset = log.tell()
            self._popen = subprocess.Popen(
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
        gate = self._popen.stdin
        assert gate is not None
        with gate:
            self._born = birth(self._popen.pid)
            pid_file.write(self.pid_file, self._record(self._popen.pid))
            with contextlib.suppress(BrokenPipeError):  # it has ended already, which the caller will see
                gate.write(b"go\n")

    def _record(self, pid: int) -> PidRecord:
        parent = os.getpid()
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
        """Its pid, which is also the id of its session; None before the start. It stays after the end."""
        return None if self._popen is None else self._popen.pid

    @property
    def alive(self) -> bool:
        """Whether it runs now. A zombie does not, and is reaped by asking."""
        return self._popen is not None and self._popen.poll() is None

    @property
    def returncode(self) -> int | None:
        """Its exit status, or minus the signal that ended it; None while it runs and before the start."""
        return None if self._popen is None else self._popen.poll()

    def wait(self, deadline: timedelta) -> int | None:
        """Its `returncode` once it has ended, or None when it has not by the deadline."""
        if self._popen is None:
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(deadline.total_seconds())
        return self._popen.poll()

    def log_tail(self, lines: int = 20) -> str:
        """The last lines that it has written since this start, or nothing when there is no log."""
        return log_tail(self.log_file, lines, since=self._log_offset)

    def ask(self) -> None:
        """Ask it to end by its stop signal, and do not wait."""
        if self._popen is not None and self._popen.poll() is None:
            self._popen.send_signal(self.stop_signal)

    def kill(self) -> None:
        """Kill it alone, and do not wait: what it started goes on."""
        if self._popen is not None:
            self._popen.kill()

    def stop(self, deadline: timedelta = STOP_DEADLINE, *, ask: signal.Signals | None = None) -> int | None:
        """
        End it: ask with `ask` (by default its stop signal), wait, then kill what is left; give its `returncode`.

        Returns when it is gone, and its session with it. It may be called at any time, by any thread, and again.
        An interrupt while it waits cuts the wait short: the child is killed, then the interrupt goes on.
        A process that the kernel cannot kill keeps its pid file and is left to the next start.
        """
        popen = self._popen
        if popen is None:
            return None
        try:
            if popen.poll() is None:
                popen.send_signal(ask or self.stop_signal)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    popen.wait(deadline.total_seconds())
        finally:
            self._end_for_certain(popen)
        return popen.poll()

    def _end_for_certain(self, popen: subprocess.Popen[bytes]) -> None:
        descendants: list[psutil.Process] = []
        if popen.poll() is None:
            descendants = _descendants(popen.pid)
            popen.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                popen.wait(KILL_SECONDS)
        if _kill([*descendants, *_session(popen.pid, self._born)]) and popen.poll() is not None:
            pid_file.forget(self.pid_file, popen.pid)


class Adopted:
    """A process that a parent who died had left behind, and that goes on under this one. It ends as a Child does."""

    #: How it ended is told to its first parent alone.
    returncode: int | None = None

    def __init__(self, record: PidRecord, process: psutil.Process, pid_file: Path, log_file: Path) -> None:
        """Made by `adopt`."""
        self.name, self.pid = record.name, record.pid
        self.pid_file, self.log_file = pid_file, log_file
        self._record, self._process = record, process

    @property
    def alive(self) -> bool:
        """Whether it runs now. A zombie does not."""
        return _runs(self._process) and birth(self.pid) == self._record.birth

    @property
    def command(self) -> str:
        """Its command line, as it was started."""
        return self._record.command

    def log_tail(self, lines: int = 20) -> str:
        """The last lines of its log, or nothing when there is none."""
        return log_tail(self.log_file, lines)

    def ask(self) -> None:
        """Ask it to end by its stop signal, and do not wait."""
        with contextlib.suppress(psutil.NoSuchProcess):
            if self.alive:
                self._process.send_signal(self._record.stop_signal)

    def stop(self, deadline: timedelta = STOP_DEADLINE) -> None:
        """End it: ask, wait, then kill what is left. Returns when it is gone, and its session with it."""
        self.ask()
        others: list[psutil.Process] = []
        if not _until(lambda: not self.alive, deadline.total_seconds()):
            others = [self._process, *_descendants(self.pid)]
        if _kill([*others, *_session(self.pid, self._record.birth)]):
            pid_file.forget(self.pid_file, self.pid)


def adopt(file: Path, log_file: Path) -> Adopted | None:
    """
    The process that a pid file tells of, if it lives and its parent does not: from now on this process is its parent.

    The pid file of one that is dead is removed. Raises ServerNotStarted when it is another user's.
    """
    record = pid_file.find(file)
    if record is None or not record.orphaned:
        return None
    process = _process(record.pid, record.birth)
    if process is None:
        _kill(_session(record.pid, record.birth))
        pid_file.forget(file, record.pid)
        return None
    parent = os.getpid()
    pid_file.write(file, replace(record, parent=parent, parent_birth=birth(parent) or ""))
    return Adopted(record, process, file, log_file)


@dataclass(frozen=True, slots=True)
class Leftover:
    """A process that a killed parent had left behind, and that was ended."""

    name: str
    pid: int
    command: str
    #: It did not end when it was asked to, or was not asked.
    forced: bool


def end_leftovers(
    directory: Path, deadline: timedelta = STOP_DEADLINE, *, unasked: Collection[str] = ()
) -> tuple[Leftover, ...]:
    """
    End the processes whose pid files lie in the directory, and whose parent is gone; give those that were running.

    All are asked by their stop signals, then those that are left at the deadline are killed with their descendants.
    Those whose names are `unasked` are killed at once, and alone: what they started goes on.
    A process whose parent lives is left alone, unless that parent is this process: call it, under the directory's
    lock, before starting children there. Pid files that nobody answers to are removed.

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
                    process.send_signal(signal.SIGKILL if record.name in unasked else record.stop_signal)
            except psutil.AccessDenied as error:
                raise ServerNotStarted(
                    record.name, f"process {record.pid} of an earlier start still runs, as another user"
                ) from error

    _until(lambda: not any(_runs(process) for _, process in running), deadline.total_seconds())
    ended: list[Leftover] = []
    for record, process in running:
        late = _runs(process)
        forced = late or record.name in unasked
        others = [process, *_descendants(record.pid)] if late else []
        if not _kill([*others, *_session(record.pid, record.birth)]):
            raise ServerNotStarted(record.name, f"process {record.pid} of an earlier start cannot be killed")
        ended.append(Leftover(record.name, record.pid, record.command, forced))
    for file, record in found:
        if record.orphaned:
            pid_file.forget(file, record.pid)
    return tuple(ended)


def end_all(processes: Iterable[psutil.Process], seconds: float) -> bool:
    """Whether processes that need not be our children are gone: asked by SIGTERM, after `seconds` killed."""
    asked = list(processes)
    for process in asked:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    return _until(lambda: not any(_runs(process) for process in asked), seconds) or _kill(asked)


def log_tail(file: Path, lines: int = 20, *, since: int = 0) -> str:
    """
    The last lines of a file, from its byte `since` on; nothing when there is no such file.

    Whatever stands there, the text can be stored and printed, and has 64 KiB at the most.
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


def _put_aside_when_large(log: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if log.stat().st_size > LOG_BYTES:
            log.replace(log.with_name(log.name + ".1"))


def _process(pid: int, born: str) -> psutil.Process | None:
    """The process, if it runs and was born then. What psutil gives refuses to signal another that takes its pid."""
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
    """Who runs in the session besides its leader. Its id is not given to a new process while anybody does."""
    if birth(leader) not in {None, born}:
        return []
    members: list[psutil.Process] = []
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, PermissionError, psutil.Error):
            if pid != leader and os.getsid(pid) == leader:
                members.append(psutil.Process(pid))
    return members


def _kill(processes: Iterable[psutil.Process]) -> bool:
    """Whether they are all gone after SIGKILL."""
    killed = list(processes)
    for process in killed:
        with contextlib.suppress(psutil.Error):
            process.kill()
    return _until(lambda: not any(_runs(process) for process in killed), KILL_SECONDS)


def _until(met: Callable[[], bool], seconds: float) -> bool:
    limit = time.monotonic() + seconds
    while not met():
        if time.monotonic() > limit:
            return False
        time.sleep(_POLL_SECONDS)
    return True
