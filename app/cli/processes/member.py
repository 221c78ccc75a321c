"""
A member of the process tree: one program, which is restarted when it ends.

It is restarted immediately. If it repeatedly ends soon after its start, the delay grows each time.
A program that a signal has stopped (SIGSTOP) is killed after a while: otherwise no other process could do its work.
"""

from __future__ import annotations

import importlib
import select
import shlex
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

from kombu import pools

from app.kernel import ids
from app.kernel.errors import ServerNotStarted
from app.kernel.processes import pid_file
from app.kernel.processes.process import Child
from app.kernel.processes.spawning import SpawnRequest
from app.kernel.settings import Settings, environment_of

#: The module that expires the leases of a dead worker. It is loaded where it runs.
REQUEUE = "app.cli.processes.requeue"
#: Seconds after which a start counts as successful.
_SETTLED = 10.0
#: The first and the longest delay of a restart, in seconds; it doubles from the second failed start in a row.
_DELAY, _MAX_DELAY = 1.0, 30.0
#: Seconds after which a program that a signal has stopped is killed.
FROZEN_SECONDS = 10.0


@dataclass(slots=True)
class ProcessMember:
    """A program of the tree, with its process and its restarts."""

    name: str
    #: The arguments after `python -m`.
    arguments: Sequence[str]
    grace: timedelta
    #: The name of the worker in Celery; None for other programs.
    worker: str | None = None
    #: Descriptors that it inherits.
    descriptors: Sequence[int] = ()
    #: The listening socket of a program that runs only while it is used: the first connection starts it.
    on_demand: socket.socket | None = None
    child: Child | None = None
    #: The id of this process in the owner of its steps; empty for programs that are not workers.
    incarnation: str = ""
    #: When it is restarted, by the monotonic clock; None while it runs.
    restart_at: float | None = None
    #: Failed starts in a row.
    _failures: int = 0
    _started: float = 0.0
    #: Since when it is stopped by a signal, by the monotonic clock.
    _frozen_since: float | None = None
    #: How often it was restarted.
    restarts: int = 0
    #: When it is killed because it did not end for a requested restart, by the monotonic clock.
    _kill_at: float | None = None

    def start(self, settings: Settings, directory: Path) -> None:
        """Start it. Raises ServerNotStarted."""
        self.incarnation = ids.new_secret()[:12] if self.worker else ""
        more = [self.incarnation] if self.incarnation else []
        self.child = _child(
            self.name, [*self.arguments, *more], settings, directory, log=self.name, descriptors=self.descriptors
        )
        self.restart_at, self._started, self._frozen_since, self._kill_at = None, time.monotonic(), None, None
        self.child.start()

    @property
    def ended(self) -> bool:
        """Whether it has ended, and no restart is scheduled."""
        return self.child is not None and not self.child.alive

    @property
    def sleeps(self) -> bool:
        """Whether it is not running because nobody has asked for it."""
        return self.on_demand is not None and self.child is None and self.restart_at is None

    @property
    def is_asked_for(self) -> bool:
        """Whether it sleeps, and a client waits for it."""
        return self.on_demand is not None and self.sleeps and bool(select.select([self.on_demand], [], [], 0)[0])

    @property
    def has_rested(self) -> bool:
        """Whether it is one that runs on demand, and has ended because nobody used it."""
        return self.on_demand is not None and self.ended and self.child is not None and self.child.returncode == 0

    def rest(self) -> None:
        """Forget its ended process: the next connection starts another one."""
        if self.child is not None:
            self.child.stop()
            self.child = None

    def schedule_restart(self, now: float) -> str:
        """Schedule the restart of the ended program. Returns a description; the end of its log is on further lines."""
        child = self.child
        assert child is not None, "it has ended"
        tail = child.log_tail(5)
        child.stop()
        self.child = None
        self.restarts += 1
        if self._kill_at is not None:
            self.restart_at = now
            return f"{self.name} is restarted, as requested"
        self._failures = 0 if now - self._started > _SETTLED else min(self._failures + 1, 10)
        description = f"{self.name} ended ({_end_of(child.returncode)}); it is restarted {self._delay(now)}"
        return f"{description}\n{tail}" if tail else description

    def try_start(self, settings: Settings, directory: Path, now: float) -> str:
        """
        Start it; when that fails, schedule another attempt and return a description, otherwise an empty text.

        The disk may be full, or the machine out of processes: that passes, and what runs must not end for it.
        """
        try:
            self.start(settings, directory)
        except ServerNotStarted as error:
            self.child = None
            self._failures = min(self._failures + 1, 10)
            return f"{error}; it is started again {self._delay(now)}"
        return ""

    def _delay(self, now: float) -> str:
        """Schedule the next start by the failures in a row; returns when it is, in words."""
        delay = min(_DELAY * 2 ** (self._failures - 2), _MAX_DELAY) if self._failures > 1 else 0.0
        self.restart_at = now + delay
        return f"in {delay:g} s" if delay else "now"

    def request_restart(self, now: float) -> None:
        """Ask the running program to end. It is restarted then, and killed when it has not ended within its grace."""
        if self.child is not None and self._kill_at is None:
            self._kill_at = now + self.grace.total_seconds()
            self.child.request_stop()

    def is_late(self, now: float) -> bool:
        """Whether it should have ended for a requested restart."""
        return self._kill_at is not None and now > self._kill_at

    def is_frozen(self, now: float) -> bool:
        """Whether a signal has stopped it for longer than FROZEN_SECONDS."""
        pid = self.child.pid if self.child is not None else None
        if pid is None or not pid_file.is_stopped(pid):
            self._frozen_since = None
            return False
        if self._frozen_since is None:
            self._frozen_since = now
        return now - self._frozen_since > FROZEN_SECONDS


def incarnation_of(command: str) -> str | None:
    """Return the incarnation in the command line of a worker; None for other programs."""
    match shlex.split(command):
        case [*_, "-m", "workers.programs", "control", _, incarnation]:
            return incarnation
    return None


def requeue_child(settings: Settings, directory: Path, incarnation: str) -> Child:
    """Return the program that expires the leases of a dead worker, before its start."""
    return _child(f"requeue-{incarnation}", [REQUEUE, incarnation], settings, directory, log="requeue")


def spawned_child(request: SpawnRequest) -> Child:
    """Return the program that another program of the tree asks for, before its start."""
    return Child(
        request.name,
        [sys.executable, "-P", "-m", *request.arguments],
        environment=request.environment,
        log_file=Path(request.log_file),
        pid_file=Path(request.pid_file),
        entry=partial(_run, request.arguments),
        parent=request.parent,
    )


def _child(
    name: str,
    arguments: Sequence[str],
    settings: Settings,
    directory: Path,
    *,
    log: str,
    descriptors: Sequence[int] = (),
) -> Child:
    return Child(
        name,
        [sys.executable, "-P", "-m", *arguments],  # -P: no `app` of the current directory is imported
        environment=environment_of(settings),
        log_file=directory / "logs" / f"{log}.log",
        pid_file=directory / "run" / f"{name}.pid",
        descriptors=descriptors,
        entry=partial(_run, arguments),
    )


def _run(arguments: Sequence[str]) -> object:
    """Do in this process, a fork, what `python -m` does with the arguments."""
    # The parent's connections to the broker: Celery would use them for the same broker, and their sockets are gone.
    pools.connections.clear()
    pools.producers.clear()
    module, *rest = arguments
    sys.argv = [module, *rest]
    if module == "app":
        return importlib.import_module("app.cli").main()
    return importlib.import_module(module).main(rest)


def _end_of(returncode: int | None) -> str:
    if returncode is not None and returncode < 0:
        return f"by {signal.Signals(-returncode).name}"
    return f"exit code {returncode}"
