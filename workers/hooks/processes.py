"""
Processes of Python hooks: each call has one to itself, which is kept for the next call, and killed when it is late.

A process that was killed is replaced by a new one with the next call. Its start has a time limit of its own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

#: The group of entry points.
GROUP = "arriero.hooks"
_PROGRAM = "workers.hooks.program"
#: Most bytes of an answer.
_MOST_BYTES = 32_000_000
#: Most processes that are kept for a hook while nobody calls it.
_MOST_KEPT = 4
#: Seconds in addition to the limit for the first call of a process, which imports the hook.
START = 20.0


class HookBroken(Exception):
    """A hook could not answer; the message never quotes a prompt."""


class HookTimeout(HookBroken):
    """A hook did not answer within its limit."""


class HookStopped(Exception):
    """The request was stopped."""


class HookProcesses:
    """The processes of the Python hooks of this process."""

    def __init__(self) -> None:
        """Starts nothing."""
        self._lock = threading.Lock()
        self._idle: dict[str, list[_Child]] = {}
        self._closed = False

    def call(self, entry_point: str, document: Any, seconds: float, stop: StopSwitch) -> Any:
        """Return the answer of a hook. Raises HookBroken, HookTimeout, HookStopped."""
        with self._lock:
            idle = self._idle.get(entry_point, [])
            child = idle.pop() if idle else None
        if child is None or child.has_ended:
            if child is not None:
                child.kill()
            child = _Child(entry_point)
        try:
            answer = child.ask(document, seconds, stop)
        except BaseException:
            child.kill()
            raise
        with self._lock:
            kept = self._idle.setdefault(entry_point, [])
            keep = not self._closed and len(kept) < _MOST_KEPT
            if keep:
                kept.append(child)
        if not keep:
            child.kill()
        if "raised" in answer:
            raise HookBroken(str(answer["raised"])[:300])
        return answer.get("answer")

    def close(self) -> None:
        """End the processes that nobody uses now; the others end with their calls."""
        with self._lock:
            self._closed = True
            children = [child for idle in self._idle.values() for child in idle]
            self._idle.clear()
        for child in children:
            child.kill()


class StopSwitch:
    """What stops the hook that runs now."""

    def __init__(self) -> None:
        """Nothing runs."""
        self._lock = threading.RLock()
        self._action: Any = None
        self.stopped = False

    def stop(self) -> None:
        """Stop what runs, and what would run later. Safe from any thread."""
        with self._lock:  # so that nothing is stopped after `stops_by(None)`: its process may serve another request
            self.stopped = True
            if self._action is not None:
                self._action()

    def stops_by(self, action: Any) -> None:
        """Set what stops the hook that runs; None when none does."""
        with self._lock:
            self._action = action
            if self.stopped and action is not None:
                action()


class _Limit:
    """A time limit: at its end an action is called, unless it was ended before."""

    def __init__(self, seconds: float, action: Callable[[], None]) -> None:
        self._lock, self._ended, self._is_late, self._action = threading.Lock(), False, False, action
        self._timer = threading.Timer(seconds, self._late)
        self._timer.daemon = True
        self._timer.start()

    def end(self) -> bool:
        """End the limit: the action is not called any more. Returns whether it was."""
        with self._lock:
            self._ended = True
        self._timer.cancel()
        return self._is_late

    def _late(self) -> None:
        with self._lock:
            if not self._ended:
                self._is_late = True
                self._action()


class _Child:
    """One process."""

    def __init__(self, entry_point: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", _PROGRAM, entry_point],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._is_ready = False

    @property
    def has_ended(self) -> bool:
        """Whether the process has ended by itself."""
        return self._process.poll() is not None

    def ask(self, document: Any, seconds: float, stop: StopSwitch) -> dict[str, Any]:
        """Return the answer to a document. The process is killed when it is late."""
        limit = _Limit(seconds + (0.0 if self._is_ready else START), self._signal)
        stop.stops_by(self._signal)
        try:
            if not self._is_ready:
                ready = self._line()
                if "ready" not in ready:
                    return ready
                self._is_ready = True
                limit.end()
                limit = _Limit(seconds, self._signal)
            assert self._process.stdin is not None, "it is a pipe"
            self._process.stdin.write(json.dumps(document).encode() + b"\n")
            self._process.stdin.flush()
            answer = self._line()
            if limit.end():
                raise HookTimeout(f"it did not answer within {seconds:g} s")
            return answer
        except (OSError, ValueError, HookBroken) as error:
            if stop.stopped:
                raise HookStopped from None
            if limit.end():
                raise HookTimeout(f"it did not answer within {seconds:g} s") from None
            if isinstance(error, HookBroken):
                raise
            raise HookBroken("its process ended during the call") from None
        finally:
            limit.end()
            stop.stops_by(None)

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None, "it is a pipe"
        line = self._process.stdout.readline(_MOST_BYTES)
        if not line.endswith(b"\n"):
            why = f"its answer has more than {_MOST_BYTES} bytes" if line else "its process ended during the call"
            raise HookBroken(why)
        found = json.loads(line)
        if not isinstance(found, dict):
            raise HookBroken("it wrote what is no answer")
        return found

    def kill(self) -> None:
        """End the process with all that it has started."""
        self._signal()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                if stream is not None:
                    stream.close()

    def _signal(self) -> None:
        if self._process.returncode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
