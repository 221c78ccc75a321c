"""
Engines: what turns requests into text. The protocol is here; each implementation is a module.

A ticket can be cancelled from any thread; the engine leaves the work at its next token.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Protocol

from app.inference.requests import Embedded, EmbedRequest, Generated, GenerateRequest

#: Takes each new piece of text, on the engine's own thread: it must return at once and never raise.
OnText = Callable[[str], None]
#: Takes what makes the work stop, to be called from any thread; `Holding.on_stop` is one.
OnStop = Callable[[Callable[[], None]], None]


class Ticket(Protocol):
    """A request under way."""

    def result(self, timeout: float | None = None) -> Generated:
        """
        Wait, at most `timeout` seconds, and give the outcome. Where a schema was asked for, the text conforms to it.

        Raises StepFailure when the request failed, CancelledError when it was cancelled, TimeoutError when it is
        not done in time (the request goes on).
        """

    def cancel(self) -> None:
        """Leave the work at the next token. Safe from any thread, any number of times."""


class Engine(Protocol):
    """Serves one model."""

    #: Requests that are worked on at the same time.
    slots: int

    def generate(self, request: GenerateRequest, on_text: OnText | None = None) -> Ticket:
        """Take a request. Raises StepFailure at once when it can never be served (context, grammar)."""

    def embed(self, request: EmbedRequest, timeout: float | None = None, on_stop: OnStop | None = None) -> Embedded:
        """
        The vectors of texts. Waits for them, at most `timeout` seconds; stops between two decodes.

        Raises StepFailure, CancelledError when it was stopped, TimeoutError when it takes longer.
        """

    def stalled_for(self) -> timedelta:
        """How long the engine has had work and made no progress; zero when idle. Leases are renewed by it."""

    def close(self) -> None:
        """Free the model. What is under way fails with the reason `worker_stopped`."""
