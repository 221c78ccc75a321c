"""
The simulated engine: replaces a model on a simulated device.

Its speed and load time come from the catalogue and the device. It uses no memory. Its texts are marked as simulated.
Slots, priorities, cancels, deadlines and schemas work as in a real engine.
"""

from __future__ import annotations

import heapq
import itertools
import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from datetime import timedelta

from app.inference import answers
from app.inference.requests import (
    RANKS,
    Embedded,
    EmbedRequest,
    FinishReason,
    Generated,
    GenerateRequest,
    Reranked,
    RerankRequest,
    TextPiece,
    TokenLogprob,
    Tool,
    ToolCall,
    ToolCallPiece,
)
from app.kernel import clock, log
from app.kernel.errors import FailureReason, StepFailure
from workers.engine import OnPiece, OnStop, OnText, pieces_to, require_images, simulated_texts
from workers.engine.metrics import EngineMetrics, Meter
from workers.engine.simulated_texts import CHARACTERS_PER_TOKEN, DIMENSIONS

_log = log.get(__name__)

#: How many times faster prompts are computed than texts are written.
_PREFILL_SPEEDUP = 20
#: Tokens of a text whose request leaves the limit to the context.
_MAX_TOKENS = 64
#: Progress reports of one load.
_PROGRESS_STEPS = 20


class SimulatedTicket:
    """A handle on a simulated request."""

    def __init__(self, request: GenerateRequest, on_piece: OnPiece | None) -> None:
        """Raises StepFailure when it can never be answered."""
        self.request, self.on_piece = request, on_piece
        self.call = simulated_texts.call(request)
        self.texts = [simulated_texts.text(request, index) for index in range(request.n if self.call is None else 0)]
        self.future: Future[Generated] = Future()
        self.cancelled = threading.Event()
        self.submitted = time.monotonic()
        self.tokens_out = 0

    def result(self, timeout: float | None = None) -> Generated:
        """See the protocol."""
        return self.future.result(timeout)

    def written(self) -> int:
        """See the protocol."""
        return self.tokens_out

    def cancel(self) -> None:
        """See the protocol."""
        self.cancelled.set()

    def emit(self, piece: TextPiece) -> None:
        """Count a token, and pass it to the reader."""
        self.tokens_out += 1
        if self.on_piece is not None:
            self.on_piece(piece)

    def when_done(self, action: Callable[[], None]) -> None:
        """See the protocol."""
        self.future.add_done_callback(lambda _: action())


class SimulatedEngine:
    """Serves a simulated model."""

    def __init__(
        self,
        slots: int,
        tokens_per_second: float,
        load: timedelta,
        on_progress: Callable[[float], None] | None = None,
        *,
        context: int = 4096,
    ) -> None:
        """Sleep for the load time. `on_progress` is called with the progress, from 0 to 1."""
        self.slots, self._context = slots, context
        self._pace = 1 / tokens_per_second
        self._waiting: list[tuple[int, int, SimulatedTicket]] = []
        self._numbers = itertools.count()
        self._condition = threading.Condition()
        self._closed = False
        self._meter, self._running = Meter(), 0
        for step in range(_PROGRESS_STEPS):
            time.sleep(load.total_seconds() / _PROGRESS_STEPS)
            if on_progress is not None:
                on_progress((step + 1) / _PROGRESS_STEPS)
        self._threads = [threading.Thread(target=self._serve, name=f"simulated-{n}", daemon=True) for n in range(slots)]
        for thread in self._threads:
            thread.start()

    @property
    def window(self) -> int:
        """See the protocol."""
        return self._context

    @property
    def reads_images(self) -> bool:
        """See the protocol."""
        return False

    @property
    def counts_exactly(self) -> bool:
        """See the protocol. It has no other tokenizer than its rule."""
        return True

    def count(self, request: GenerateRequest) -> int:
        """See the protocol."""
        prompt = request.prompt if request.prompt is not None else "".join(one.content for one in request.messages)
        return max(len(prompt) // CHARACTERS_PER_TOKEN, 1)

    def count_texts(self, texts: Sequence[str]) -> list[int]:
        """See the protocol."""
        return [len(text) // CHARACTERS_PER_TOKEN for text in texts]

    def generate(
        self, request: GenerateRequest, on_text: OnText | None = None, on_piece: OnPiece | None = None
    ) -> SimulatedTicket:
        """See the protocol."""
        require_images(self, request)
        if request.fits_context:
            request = replace(request, max_tokens=min(request.max_tokens, _MAX_TOKENS))
        ticket = SimulatedTicket(request, pieces_to(on_text, on_piece))
        with self._condition:
            if self._closed:
                raise _closed()
            self._meter.submitted += 1
            heapq.heappush(self._waiting, (RANKS[request.priority], next(self._numbers), ticket))
            self._condition.notify()
        return ticket

    def embed(self, request: EmbedRequest, timeout: float | None = None, on_stop: OnStop | None = None) -> Embedded:
        """See the protocol. Equal texts have equal vectors; the vectors have no meaning."""
        stopped = threading.Event()
        if on_stop is not None:
            on_stop(stopped.set)
        started_at = time.monotonic()
        tokens = sum(max(len(text) // CHARACTERS_PER_TOKEN, 1) for text in request.texts)
        seconds = tokens / _PREFILL_SPEEDUP * self._pace
        if stopped.wait(seconds if timeout is None else min(seconds, timeout)):
            raise CancelledError
        if timeout is not None and timeout < seconds:
            raise TimeoutError
        with self._condition:
            self._meter.embedded_texts += len(request.texts)
            self._meter.embedded_tokens += tokens
        vectors = tuple(simulated_texts.vector(text, request.dimensions or DIMENSIONS) for text in request.texts)
        return Embedded(vectors, tokens, timedelta(seconds=time.monotonic() - started_at))

    def rerank(self, request: RerankRequest, timeout: float | None = None, on_stop: OnStop | None = None) -> Reranked:
        """See the protocol. The score is the share of the query's words that the document has."""
        read = self.embed(EmbedRequest((request.query, *request.documents)), timeout, on_stop)
        words = set(request.query.lower().split())
        scores = tuple(len(words & set(one.lower().split())) / max(len(words), 1) for one in request.documents)
        return Reranked(scores, read.tokens_in, read.time_total)

    @property
    def calls_tools(self) -> bool:
        """See the protocol. It writes calls only where it is forced to."""
        return False

    def stalled_for(self) -> timedelta:
        """See the protocol. It never stalls."""
        return timedelta(0)

    def metrics(self) -> EngineMetrics:
        """Return the counts and the current state; those of cache and decodes stay 0."""
        with self._condition:
            return self._meter.snapshot(slots=self.slots, running=self._running, waiting=len(self._waiting))

    def close(self) -> None:
        """See the protocol."""
        with self._condition:
            self._closed = True
            waiting, self._waiting = self._waiting, []
            self._condition.notify_all()
        for _, _, ticket in waiting:
            ticket.future.set_exception(_closed())
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                _, _, ticket = heapq.heappop(self._waiting)
                self._running += 1
                self._meter.waited(time.monotonic() - ticket.submitted)
            outcome: Generated | StepFailure | CancelledError
            try:
                outcome = self._generate(ticket)
            except (StepFailure, CancelledError) as error:
                outcome = error
            except Exception as error:  # noqa: BLE001 the outermost loop of the thread: the slot outlives the request
                _log.exception("simulated_request_failed")
                outcome = StepFailure(FailureReason.INTERNAL, f"{type(error).__name__}: {error}")
            with self._condition:
                self._running -= 1
                self._count(outcome)
            if isinstance(outcome, Generated):
                ticket.future.set_result(outcome)
            else:
                ticket.future.set_exception(outcome)

    def _count(self, outcome: Generated | StepFailure | CancelledError) -> None:
        meter = self._meter
        match outcome:
            case Generated():
                meter.finished += 1
                meter.tokens_in += outcome.tokens_in
                meter.tokens_computed += outcome.tokens_in
                meter.tokens_out += sum(text.tokens_out for text in (outcome, *outcome.alternatives))
            case StepFailure(reason=FailureReason.TIMEOUT):
                meter.timed_out += 1
            case StepFailure():
                meter.failed += 1
            case CancelledError():
                meter.cancelled += 1

    def _generate(self, ticket: SimulatedTicket) -> Generated:
        request = ticket.request
        tokens_in = self.count(request)
        self._wait(ticket, tokens_in / _PREFILL_SPEEDUP * self._pace)
        first = time.monotonic()
        whole = self._write(ticket) if ticket.call is None else [self._write_call(ticket, *ticket.call)]
        if request.schema is not None:
            for text in whole:
                answers.require(text.text, request.schema)
        return replace(
            whole[0],
            tokens_in=tokens_in,
            time_to_first=timedelta(seconds=first - ticket.submitted),
            time_total=timedelta(seconds=time.monotonic() - ticket.submitted),
            alternatives=tuple(whole[1:]),
        )

    def _write(self, ticket: SimulatedTicket) -> list[Generated]:
        request, texts = ticket.request, ticket.texts
        found: list[tuple[TokenLogprob, ...]] = [() for _ in texts]
        for start in range(
            0, min(max(map(len, texts)), request.max_tokens * CHARACTERS_PER_TOKEN), CHARACTERS_PER_TOKEN
        ):
            self._wait(ticket, self._pace)
            for index, text in enumerate(texts):
                if piece := text[start : start + CHARACTERS_PER_TOKEN]:
                    new = simulated_texts.logprobs(piece, request)
                    found[index] += new
                    ticket.emit(TextPiece(piece, index, new))
        return [_generated(text, request, logprobs=of_text) for text, of_text in zip(texts, found, strict=True)]

    def _write_call(self, ticket: SimulatedTicket, tool: Tool, arguments: str) -> Generated:
        written = _generated(arguments, ticket.request)
        for start in range(0, len(written.text), CHARACTERS_PER_TOKEN):
            self._wait(ticket, self._pace)
            piece = ToolCallPiece(0, None if start else tool.name, written.text[start : start + CHARACTERS_PER_TOKEN])
            ticket.emit(TextPiece("", calls=(piece,)))
        if written.finish is FinishReason.LENGTH:
            return written
        return replace(written, text="", tool_calls=(ToolCall(tool.name, json.loads(arguments), arguments),))

    def _wait(self, ticket: SimulatedTicket, seconds: float) -> None:
        deadline = ticket.request.deadline
        if deadline is not None and clock.now() > deadline:
            raise StepFailure(FailureReason.TIMEOUT, "the deadline passed before the text was complete")
        if ticket.cancelled.wait(seconds):
            raise CancelledError
        if self._closed:
            raise _closed()


def _closed() -> StepFailure:
    return StepFailure(FailureReason.WORKER_STOPPED, "the engine is closed")


def _generated(text: str, request: GenerateRequest, logprobs: tuple[TokenLogprob, ...] = ()) -> Generated:
    """Return a text as far as max_tokens allows it; counts of the prompt and times are missing."""
    written = text[: request.max_tokens * CHARACTERS_PER_TOKEN]
    return Generated(
        text=written,
        finish=FinishReason.STOP if written == text else FinishReason.LENGTH,
        tokens_in=0,
        tokens_out=-(-len(written) // CHARACTERS_PER_TOKEN),
        tokens_cached=0,
        time_to_first=timedelta(0),
        time_total=timedelta(0),
        logprobs=logprobs,
    )
