"""
The simulated engine: replaces a model on a simulated device.

Its speed and load time come from the catalogue and the device. It uses no memory. Its texts are marked as simulated.
Slots, priorities, cancels, deadlines and schemas work as in a real engine.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
import math
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from datetime import timedelta
from typing import Any

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
)
from app.kernel import clock, log
from app.kernel.errors import FailureReason, StepFailure
from workers.engine import OnStop, OnText
from workers.engine.metrics import EngineMetrics, Meter

_log = log.get(__name__)

#: The content of every text.
MARK = "[simulated] "
#: Characters per token.
_CHARACTERS_PER_TOKEN = 4
#: How many times faster prompts are computed than texts are written.
_PREFILL_SPEEDUP = 20
#: Default number of dimensions of a vector.
_DIMENSIONS = 64
#: Tokens of a text whose request leaves the limit to the context.
_MAX_TOKENS = 64
#: Progress reports of one load.
_PROGRESS_STEPS = 20


class SimulatedTicket:
    """A handle on a simulated request."""

    def __init__(self, request: GenerateRequest, text: str, on_text: OnText | None) -> None:
        self.request, self.text, self.on_text = request, text, on_text
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
    ) -> None:
        """Sleep for the load time. `on_progress` is called with the progress, from 0 to 1."""
        self.slots = slots
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

    def generate(self, request: GenerateRequest, on_text: OnText | None = None) -> SimulatedTicket:
        """See the protocol."""
        if request.fits_context:
            request = replace(request, max_tokens=min(request.max_tokens, _MAX_TOKENS))
        ticket = SimulatedTicket(request, _text(request), on_text)
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
        tokens = sum(max(len(text) // _CHARACTERS_PER_TOKEN, 1) for text in request.texts)
        seconds = tokens / _PREFILL_SPEEDUP * self._pace
        if stopped.wait(seconds if timeout is None else min(seconds, timeout)):
            raise CancelledError
        if timeout is not None and timeout < seconds:
            raise TimeoutError
        with self._condition:
            self._meter.embedded_texts += len(request.texts)
            self._meter.embedded_tokens += tokens
        vectors = tuple(_vector(text, request.dimensions or _DIMENSIONS) for text in request.texts)
        return Embedded(vectors, tokens, timedelta(seconds=time.monotonic() - started_at))

    def rerank(self, request: RerankRequest, timeout: float | None = None, on_stop: OnStop | None = None) -> Reranked:
        """See the protocol. The score is the share of the query's words that the document has."""
        read = self.embed(EmbedRequest((request.query, *request.documents)), timeout, on_stop)
        words = set(request.query.lower().split())
        scores = tuple(len(words & set(one.lower().split())) / max(len(words), 1) for one in request.documents)
        return Reranked(scores, read.tokens_in, read.time_total)

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
                meter.tokens_out += outcome.tokens_out
            case StepFailure(reason=FailureReason.TIMEOUT):
                meter.timed_out += 1
            case StepFailure():
                meter.failed += 1
            case CancelledError():
                meter.cancelled += 1

    def _generate(self, ticket: SimulatedTicket) -> Generated:
        request, text = ticket.request, ticket.text
        prompt = request.prompt if request.prompt is not None else "".join(m.content for m in request.messages)
        tokens_in = max(len(prompt) // _CHARACTERS_PER_TOKEN, 1)
        self._wait(ticket, tokens_in / _PREFILL_SPEEDUP * self._pace)
        first = time.monotonic()
        pieces = [text[at : at + _CHARACTERS_PER_TOKEN] for at in range(0, len(text), _CHARACTERS_PER_TOKEN)][
            : request.max_tokens
        ]
        for piece in pieces:
            self._wait(ticket, self._pace)
            ticket.tokens_out += 1
            if ticket.on_text is not None:
                ticket.on_text(piece)
        written = "".join(pieces)
        if request.schema is not None:
            answers.require(written, request.schema)
        return Generated(
            text=written,
            finish=FinishReason.STOP if written == text else FinishReason.LENGTH,
            tokens_in=tokens_in,
            tokens_out=len(pieces),
            tokens_cached=0,
            time_to_first=timedelta(seconds=first - ticket.submitted),
            time_total=timedelta(seconds=time.monotonic() - ticket.submitted),
        )

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


def _vector(text: str, width: int) -> tuple[float, ...]:
    digest = hashlib.shake_256(text.encode()).digest(2 * width)
    numbers = [int.from_bytes(digest[at : at + 2]) / 2**15 - 1 for at in range(0, 2 * width, 2)]
    length = math.hypot(*numbers) or 1.0
    return tuple(number / length for number in numbers)


def _text(request: GenerateRequest) -> str:
    """Return the text to write: max_tokens tokens of the mark, or a small value that conforms to the schema."""
    if request.schema is not None:
        return json.dumps(_value(request.schema, request.max_tokens * _CHARACTERS_PER_TOKEN))
    return (MARK * (request.max_tokens * _CHARACTERS_PER_TOKEN // len(MARK) + 1))[
        : request.max_tokens * _CHARACTERS_PER_TOKEN
    ]


def _value(schema: Mapping[str, Any], room: int) -> Any:
    """
    Return a small value for a schema. For unsupported keywords it may not conform; every answer is validated.

    Raises StepFailure, before creating the value, when its JSON has more than `room` characters.
    """
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    for choice in ("anyOf", "oneOf"):
        if choice in schema:
            return _value(schema[choice][0], room)
    kind = schema.get("type", "object")
    match kind[0] if isinstance(kind, list | tuple) else kind:
        case "object":
            properties = schema.get("properties", {})
            made: dict[str, Any] = {}
            for key in properties:
                if key in schema.get("required", ()):
                    made[key] = _value(properties[key], room)
                    room -= len(json.dumps(made[key]))
            return made
        case "array":
            item, count = _value(schema.get("items", {"type": "null"}), room), int(schema.get("minItems", 0))
            return [item] * _fits(count, len(json.dumps(item)), room)
        case "string":
            least, most = int(schema.get("minLength", 0)), int(schema.get("maxLength", len(MARK)))
            return MARK.strip().ljust(_fits(least, 1, room), ".")[: max(most, least)]
        case "integer" | "number":
            return max(schema.get("minimum", 0), schema.get("exclusiveMinimum", -1) + 1)
        case "boolean":
            return True
    return None


def _fits(count: int, size: int, room: int) -> int:
    """Return `count`. Raises StepFailure when so many values of `size` characters have no room."""
    if count * size > room:
        raise StepFailure(FailureReason.INVALID_OUTPUT, "a text that conforms to the schema is longer than max_tokens")
    return count
