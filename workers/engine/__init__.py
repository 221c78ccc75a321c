"""
The engine protocol: an engine loads one model and turns requests into text or vectors. Each implementation is a module.

A ticket can be cancelled from any thread. The engine stops the request at its next token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Protocol

from app.inference.requests import (
    Embedded,
    EmbedRequest,
    Generated,
    GenerateRequest,
    Reranked,
    RerankRequest,
    TextPiece,
)
from app.kernel.errors import FailureReason, StepFailure

#: Receives each new piece of text, on the engine's own thread: it must return at once and never raise.
OnText = Callable[[str], None]
#: As OnText, for the pieces of all texts of a request, with their tool calls and log-probabilities.
OnPiece = Callable[[TextPiece], None]
#: Registers a callback that stops the work. The callback can be called from any thread. `Holding.on_stop` is one.
OnStop = Callable[[Callable[[], None]], None]


class Ticket(Protocol):
    """A handle on a submitted request."""

    def result(self, timeout: float | None = None) -> Generated:
        """
        Wait at most `timeout` seconds and return the result. If the request has a schema, the text conforms to it.

        Raises StepFailure when the request failed, CancelledError when it was cancelled, TimeoutError when it is
        not done in time (the request continues).
        """

    def written(self) -> int:
        """Return the number of tokens written so far. Safe from any thread."""

    def cancel(self) -> None:
        """Stop the request at its next token. Safe from any thread, any number of times."""

    def when_done(self, action: Callable[[], None]) -> None:
        """Call `action` once, when `result` returns or raises at once. It may run on the engine's own thread."""


class Engine(Protocol):
    """Serves one model."""

    #: Requests that are processed at the same time.
    slots: int

    @property
    def window(self) -> int:
        """Tokens of prompt and output together that each request has when all slots are in use."""

    @property
    def reads_images(self) -> bool:
        """Whether messages can have images."""

    @property
    def counts_exactly(self) -> bool:
        """Whether tokens are counted by the model's tokenizer; otherwise they are estimated."""

    def count(self, request: GenerateRequest) -> int:
        """Return the tokens of a request's prompt. Raises StepFailure when it has none."""

    def count_texts(self, texts: Sequence[str]) -> list[int]:
        """Return the tokens of each text, without a chat template."""

    @property
    def calls_tools(self) -> bool:
        """Whether the model can be given tools: its chat template, or its profile, says how it writes calls."""

    def generate(
        self, request: GenerateRequest, on_text: OnText | None = None, on_piece: OnPiece | None = None
    ) -> Ticket:
        """
        Submit a request. `on_text` receives the first text; `on_piece`, which replaces it, those of all texts.

        Raises StepFailure at once when it can never be served (context, grammar).
        """

    def embed(self, request: EmbedRequest, timeout: float | None = None, on_stop: OnStop | None = None) -> Embedded:
        """
        Return the vectors of texts. Waits at most `timeout` seconds. A stop takes effect between two decodes.

        Raises StepFailure when the request failed, CancelledError when it was stopped, TimeoutError when it takes
        longer.
        """

    def rerank(self, request: RerankRequest, timeout: float | None = None, on_stop: OnStop | None = None) -> Reranked:
        """
        Score how well each document answers a query; as `embed` otherwise.

        Raises StepFailure also when the model is no reranker.
        """

    def stalled_for(self) -> timedelta:
        """How long the engine has had work without progress; zero when idle. Lease renewal depends on it."""

    def close(self) -> None:
        """Free the model. Requests that are not done fail with the reason `worker_stopped`."""


def require_images(engine: Engine, request: GenerateRequest) -> None:
    """Raises StepFailure, which names the first image, when the request has images and the engine reads none."""
    if request.images and not engine.reads_images:
        message = "this model reads no images: its entry in the catalogue has no projector (mmproj)"
        raise StepFailure(FailureReason.INVALID_REQUEST, f"{request.images[0].place}: {message}")


def pieces_to(on_text: OnText | None, on_piece: OnPiece | None) -> OnPiece | None:
    """Return the one reader of pieces; None when there is no reader."""
    if on_piece is not None or on_text is None:
        return on_piece

    def read(piece: TextPiece) -> None:
        if piece.text and not piece.index:
            on_text(piece.text)

    return read
