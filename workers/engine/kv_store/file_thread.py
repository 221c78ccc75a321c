"""
A thread for files: it runs actions one after the other, so that no other thread waits for a disk.

An outcome is delivered by `poll`, on the thread that calls it. Nothing is delivered after `close`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from time import perf_counter
from typing import Any

import structlog

_LOG = structlog.get_logger(__name__)

#: Seconds without any progress after which a disk counts as hanging.
_STUCK_SECONDS = 1.0

#: Raises when the thread is to end; an action calls it between its parts.
StopCheck = Callable[[], None]
#: Receives the result, or the exception, and the seconds that the action took.
Then = Callable[[Any, float], None]


class Stopped(Exception):
    """The thread is to end."""


class FileThread:
    """One such thread. It starts with the first action. A disk that hangs keeps no process alive."""

    def __init__(self, name: str) -> None:
        #: Called on this thread after each action.
        self.wake: Callable[[], None] = lambda: None
        self._name = name
        self._actions: SimpleQueue[tuple[Callable[[StopCheck], Any], Then] | None] = SimpleQueue()
        self._outcomes: deque[tuple[Then, Any, float]] = deque()
        self._done = threading.Condition()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        #: Actions without an outcome.
        self._open = 0
        #: When an action began, or went on to its next part, by perf_counter.
        self._moved_at = 0.0

    @property
    def is_stuck(self) -> bool:
        """Whether an action hangs in a call of the system."""
        return bool(self._open) and perf_counter() - self._moved_at > _STUCK_SECONDS

    def submit(self, action: Callable[[StopCheck], Any], then: Then) -> None:
        """Run the action after those that were submitted before."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        with self._done:
            if not self._open:
                self._moved_at = perf_counter()
            self._open += 1
        self._actions.put((action, then))

    def poll(self) -> None:
        """Deliver the outcomes that are there."""
        while self._outcomes:
            then, outcome, seconds = self._outcomes.popleft()
            then(outcome, seconds)

    def wait(self, seconds: float) -> bool:
        """
        Wait until an outcome is there, or nothing is open, for at most this long. Returns whether that is so.

        It does not wait for a disk that hangs.
        """
        seconds = min(seconds, _STUCK_SECONDS / 4)
        with self._done:
            return self._done.wait_for(lambda: bool(self._outcomes) or not self._open, max(0.0, seconds))

    def close(self, seconds: float) -> bool:
        """
        End the running action at its next part, and drop the others. Returns whether it ended in this time.

        It does not wait for a disk that hangs.
        """
        self._stopping.set()
        self._actions.put(None)
        if self._thread is None:
            return True
        self._thread.join(0.0 if self.is_stuck else max(0.0, seconds))
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (given := self._actions.get()) is not None and not self._stopping.is_set():
            action, then = given
            began, outcome = perf_counter(), None
            self._moved_at = began
            try:
                outcome = action(self._check)
            except Stopped as stopped:
                outcome = stopped
            except Exception as error:  # noqa: BLE001 (the outermost shell of the thread: the outcome is the error)
                outcome = error
                if not isinstance(error, OSError):
                    _LOG.debug("file_action_failed", reason=f"{type(error).__name__}: {error}")
            with self._done:
                self._outcomes.append((then, outcome, perf_counter() - began))
                self._open -= 1
                self._done.notify_all()
            self.wake()

    def _check(self) -> None:
        self._moved_at = perf_counter()
        if self._stopping.is_set():
            raise Stopped
