"""
Token reports: once a second, this process writes how many tokens its running steps have written so far, for views.

A step that takes less than a second is never reported, and a process without running texts does nothing.
An error is logged, and the next report follows: no step depends on them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from uuid import UUID

from app.kernel import clock, log
from app.kernel.broker import CeleryPublisher
from app.kernel.errors import BrokerUnreachable
from app.workflows.runs import live_tokens
from app.workflows.runs.claims import Claim
from app.workflows.runs.live_tokens import LiveTokens

_log = log.get(__name__)

#: Seconds between two reports.
_INTERVAL = 1.0


class _WatchedText:
    """A text that is being written."""

    def __init__(self, claim: Claim, written: Callable[[], int]) -> None:
        self._claim, self._written = claim, written
        #: When it was first seen to have tokens, and how many it had then.
        self._first: tuple[float, int] | None = None

    @property
    def run_id(self) -> UUID:
        return self._claim.run_id

    @property
    def key(self) -> str:
        return self._claim.key

    def tokens(self, now: float) -> LiveTokens:
        written = self._written()
        if self._first is None and written:
            self._first = (now, written)
        rate = None
        if self._first is not None and now > self._first[0]:
            rate = round((written - self._first[1]) / (now - self._first[0]), 1)
        return LiveTokens(self._claim.attempt, written, rate)


class TokenReports:
    """The texts that this process writes now, and the thread that reports them. Without `start` nothing is reported."""

    def __init__(self, interval: float = _INTERVAL) -> None:
        self._interval = interval
        self._condition = threading.Condition()
        self._texts: dict[int, _WatchedText] = {}
        self._closed = False
        self._thread: threading.Thread | None = None

    def start(self, broker: CeleryPublisher, owner: str) -> None:
        """Start the thread."""
        self._thread = threading.Thread(
            target=self._report_all, args=(broker, owner), name="token-reports", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop the thread."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        if self._thread is not None:
            self._thread.join(timeout=10)

    @contextmanager
    def watch(self, claim: Claim, written: Callable[[], int]) -> Iterator[None]:
        """Report the tokens of a claimed step until the block ends. Any thread may call `written`."""
        text = _WatchedText(claim, written)
        with self._condition:
            self._texts[id(text)] = text
            if len(self._texts) == 1:
                self._condition.notify_all()
        try:
            yield
        finally:
            with self._condition:
                del self._texts[id(text)]

    def _report_all(self, broker: CeleryPublisher, owner: str) -> None:
        reported: set[UUID] = set()
        while self._wait(idle=not reported):
            try:
                reported = self._report(broker, owner, reported)
            except BrokerUnreachable as error:
                reported = set()
                _log.debug("tokens_not_reported", error=str(error))
            except Exception:  # noqa: BLE001 the outermost loop of the thread
                reported = set()
                _log.exception("tokens_not_reported")

    def _wait(self, *, idle: bool) -> bool:
        """Wait until the next report is due, and while nothing is to be reported. False after `close`."""
        with self._condition:
            if idle:
                self._condition.wait_for(lambda: self._texts or self._closed)
            self._condition.wait_for(lambda: self._closed, timeout=self._interval)
            return not self._closed

    def _report(self, broker: CeleryPublisher, owner: str, reported: set[UUID]) -> set[UUID]:
        """Write one report; returns the runs that are in it. `reported` are those of the last one."""
        with self._condition:
            texts = list(self._texts.values())
        now = time.monotonic()
        runs: dict[UUID, dict[str, LiveTokens]] = {}
        for text in texts:
            runs.setdefault(text.run_id, {})[text.key] = text.tokens(now)
        left = reported - set(runs)
        if runs or left:
            live_tokens.write(broker, owner, runs, left, clock.now())
        return set(runs)
