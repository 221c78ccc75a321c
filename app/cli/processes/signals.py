"""The signals of `arriero up`: SIGINT, SIGTERM and SIGHUP stop it, SIGUSR1 says that a restart is requested."""

from __future__ import annotations

import signal
import subprocess
from types import FrameType

#: The part of the library that says whether a child has ended. An exception in it leaves the lock of the child held;
#: from then on the child seems to run for ever.
_POLL = subprocess.Popen._internal_poll.__code__  # type: ignore[attr-defined] # private, so not in the stubs


class Interrupted(BaseException):
    """Ctrl-C, SIGTERM or SIGHUP. While this exception propagates, everything is stopped."""


class Signals:
    """The handler: the first signal to stop interrupts, later ones only speed up the stop."""

    def __init__(self) -> None:
        self.received = False
        self.hurry = False
        #: SIGUSR1 came: `restarts.take` says what to restart.
        self.restart_requested = False

    def install(self) -> None:
        """Handle the signals for the rest of the process. A SIGHUP that `nohup` ignores stays ignored."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self._on_signal)
        signal.signal(signal.SIGUSR1, self._on_restart)

    def check(self) -> None:
        """Raise Interrupted when a signal came where exceptions are lost, such as in a destructor, or do harm."""
        if self.received:
            raise Interrupted

    def block_interrupts(self) -> None:
        """Raise no Interrupted from now on: the stop must not be interrupted."""
        self.received = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            # The end of a terminal sends SIGHUP more than once, and nobody is there who could be in a hurry.
            self.hurry = self.hurry or number != signal.SIGHUP
            return
        self.received = True
        if frame is None or frame.f_code is not _POLL:  # there it would leave a lock held, and `check` raises later
            raise Interrupted

    def _on_restart(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 the signature is Python's
        self.restart_requested = True
