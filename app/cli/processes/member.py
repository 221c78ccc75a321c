"""
A member of the process tree: one program that is started again when it ends, and when it stands still.

It is started again at once; one that ends soon after each start is put off, longer each time.
A program that was stopped by a signal is killed after a moment: alive, it would keep others from its work for ever.
"""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from app.kernel import ids
from app.kernel.processes import pid_file
from app.kernel.processes.process import Child
from app.kernel.settings import Settings, environment_of

#: Seconds after which a program that ended is taken for one that could run.
_SETTLED = 10.0
#: The delay of one that ended sooner, twice in a row, doubles from the first of these to the second, in seconds.
_DELAY, _MAX_DELAY = 1.0, 30.0
#: Seconds for which a program may be stopped by a signal.
FROZEN = 10.0


@dataclass(slots=True)
class ProcessMember:
    """One child, and how it fares."""

    name: str
    #: Behind `python -m`.
    arguments: Sequence[str]
    grace: timedelta
    #: Celery's name of the worker; None for a child that is no worker.
    worker: str | None = None
    #: Open files that it inherits.
    descriptors: Sequence[int] = ()
    child: Child | None = None
    #: What this process and no other is called as the owner of steps; empty for a child that is no worker.
    incarnation: str = ""
    #: When it is started again; None while it runs.
    again: float | None = None
    #: How often in a row it ended soon after its start.
    _failures: int = 0
    _started: float = 0.0
    #: Since when it is seen stopped by a signal.
    _stopped: float | None = None

    def start(self, settings: Settings, directory: Path) -> None:
        """Start it. Raises ServerNotStarted."""
        self.incarnation = ids.new_secret()[:12] if self.worker else ""
        more = [self.incarnation] if self.incarnation else []
        self.child = Child(
            self.name,
            [sys.executable, "-m", *self.arguments, *more],
            environment=environment_of(settings),
            log_file=directory / "logs" / f"{self.name}.log",
            pid_file=directory / "run" / f"{self.name}.pid",
            descriptors=self.descriptors,
        )
        self.again, self._started, self._stopped = None, time.monotonic(), None
        self.child.start()

    @property
    def ended(self) -> bool:
        """Whether it ended, and nobody has noted that."""
        return self.child is not None and not self.child.alive

    def note_end(self, now: float) -> str:
        """Put it off until it is started again; gives what happened, with the end of its log on the further lines."""
        child = self.child
        assert child is not None, "it has ended"
        tail = child.log_tail(5)
        child.stop()
        self.child = None
        self._failures = 0 if now - self._started > _SETTLED else min(self._failures + 1, 10)
        delay = min(_DELAY * 2 ** (self._failures - 2), _MAX_DELAY) if self._failures > 1 else 0.0
        self.again = now + delay
        when = f"in {delay:g} s" if delay else "now"
        told = f"{self.name} ended ({_how(child.returncode)}); it starts again {when}"
        return f"{told}\n{tail}" if tail else told

    def stands_still(self, now: float) -> bool:
        """Whether it has been stopped by a signal for too long."""
        pid = self.child.pid if self.child is not None else None
        if pid is None or not pid_file.is_stopped(pid):
            self._stopped = None
            return False
        if self._stopped is None:
            self._stopped = now
        return now - self._stopped > FROZEN


def incarnation_of(command: str) -> str | None:
    """The incarnation of a worker, by the command line under which it was started; None for other programs."""
    match shlex.split(command):
        case [_, "-m", "workers.programs", "control", _, incarnation]:
            return incarnation
    return None


def _how(returncode: int | None) -> str:
    if returncode is not None and returncode < 0:
        return f"by {signal.Signals(-returncode).name}"
    return f"exit code {returncode}"
