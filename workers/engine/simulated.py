"""
The simulated engine: stands in for a model on a device that is not there.

It takes the time that the catalogue and the device say, holds no memory, and writes texts that say what they are.
Slots, priorities, cancels, deadlines and schemas are those of a real engine; the words are not.
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
from datetime import timedelta
from typing import Any

from app.inference import answers
from app.inference.requests import RANKS, Embedded, EmbedRequest, FinishReason, Generated, GenerateRequest
from app.kernel import clock, log
from app.kernel.errors import FailureReason, StepFailure
from workers.engine import OnStop, OnText
from workers.engine.metrics import EngineMetrics, Meter

_log = log.get(__name__)

#: Begins every text.
MARK = "[simulated] "
#: Characters that count as a token.
_TOKEN = 4
#: Prompts are read so many times as fast as texts are written.
_READING = 20
#: Numbers of a vector.
_WIDTH = 64
#: Steps in which a load tells of its progress.
_STEPS = 20


class SimulatedTicket:
    """A request under way."""

    def __init__(self, request: GenerateRequest, text: str, on_text: OnText | None) -> None:
        self.request, self.text, self.on_text = request, text, on_text
        self.future: Future[Generated] = Future()
        self.cancelled = threading.Event()
        self.submitted = time.monotonic()

    def result(self, timeout: float | None = None) -> Generated:
        """As the protocol says."""
        return self.future.result(timeout)

    def cancel(self) -> None:
        """As the protocol says."""
        self.cancelled.set()


class SimulatedEngine:
    """Serves a model that is not there."""

    def __init__(
        self,
        slots: int,
        tokens_per_second: float,
        load: timedelta,
        on_progress: Callable[[float], None] | None = None,
    ) -> None:
        """Take the time of a load; `on_progress` gets numbers from 0 to 1 meanwhile."""
        self.slots = slots
        self._pace = 1 / tokens_per_second
        self._waiting: list[tuple[int, int, SimulatedTicket]] = []
        self._numbers = itertools.count()
        self._gate = threading.Condition()
        self._closed = False
        self._meter, self._running = Meter(), 0
        for step in range(_STEPS):
            time.sleep(load.total_seconds() / _STEPS)
            if on_progress is not None:
                on_progress((step + 1) / _STEPS)
        self._threads = [threading.Thread(target=self._serve, name=f"simulated-{n}", daemon=True) for n in range(slots)]
        for thread in self._threads:
            thread.start()

    def generate(self, request: GenerateRequest, on_text: OnText | None = None) -> SimulatedTicket:
        """As the protocol says."""
        ticket = SimulatedTicket(request, _text(request), on_text)
        with self._gate:
            if self._closed:
                raise _closed()
            self._meter.submitted += 1
            heapq.heappush(self._waiting, (RANKS[request.priority], next(self._numbers), ticket))
            self._gate.notify()
        return ticket

    def embed(self, request: EmbedRequest, timeout: float | None = None, on_stop: OnStop | None = None) -> Embedded:
        """As the protocol says. The same text has the same vector, which means nothing."""
        stopped = threading.Event()
        if on_stop is not None:
            on_stop(stopped.set)
        began = time.monotonic()
        tokens = sum(max(len(text) // _TOKEN, 1) for text in request.texts)
        seconds = tokens / _READING * self._pace
        if stopped.wait(seconds if timeout is None else min(seconds, timeout)):
            raise CancelledError
        if timeout is not None and timeout < seconds:
            raise TimeoutError
        with self._gate:
            self._meter.embedded_texts += len(request.texts)
            self._meter.embedded_tokens += tokens
        vectors = tuple(_vector(text, request.dimensions or _WIDTH) for text in request.texts)
        return Embedded(vectors, tokens, timedelta(seconds=time.monotonic() - began))

    def stalled_for(self) -> timedelta:
        """As the protocol says: it never stalls."""
        return timedelta(0)

    def metrics(self) -> EngineMetrics:
        """What it did and how it stands; it has no cache, and decodes nothing."""
        with self._gate:
            return self._meter.snapshot(slots=self.slots, running=self._running, waiting=len(self._waiting))

    def close(self) -> None:
        """As the protocol says."""
        with self._gate:
            self._closed = True
            waiting, self._waiting = self._waiting, []
            self._gate.notify_all()
        for _, _, ticket in waiting:
            ticket.future.set_exception(_closed())
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        while True:
            with self._gate:
                self._gate.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                _, _, ticket = heapq.heappop(self._waiting)
                self._running += 1
                self._meter.waited(time.monotonic() - ticket.submitted)
            outcome: Generated | StepFailure | CancelledError
            try:
                outcome = self._written(ticket)
            except (StepFailure, CancelledError) as error:
                outcome = error
            except Exception as error:  # noqa: BLE001 the outermost loop of the thread: the slot outlives the request
                _log.exception("simulated_request_broke")
                outcome = StepFailure(FailureReason.INTERNAL, f"{type(error).__name__}: {error}")
            with self._gate:
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

    def _written(self, ticket: SimulatedTicket) -> Generated:
        request, text = ticket.request, ticket.text
        prompt = request.prompt if request.prompt is not None else "".join(m.content for m in request.messages)
        tokens_in = max(len(prompt) // _TOKEN, 1)
        self._pass(ticket, tokens_in / _READING * self._pace)
        first = time.monotonic()
        pieces = [text[at : at + _TOKEN] for at in range(0, len(text), _TOKEN)][: request.max_tokens]
        for piece in pieces:
            self._pass(ticket, self._pace)
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

    def _pass(self, ticket: SimulatedTicket, seconds: float) -> None:
        deadline = ticket.request.deadline
        if deadline is not None and clock.now() > deadline:
            raise StepFailure(FailureReason.TIMEOUT, "the deadline was over")
        if ticket.cancelled.wait(seconds):
            raise CancelledError
        if self._closed:
            raise _closed()


def _closed() -> StepFailure:
    return StepFailure(FailureReason.WORKER_STOPPED, "the engine is closed")


def _vector(text: str, width: int) -> tuple[float, ...]:
    chance = hashlib.shake_256(text.encode()).digest(2 * width)
    numbers = [int.from_bytes(chance[at : at + 2]) / 2**15 - 1 for at in range(0, 2 * width, 2)]
    length = math.hypot(*numbers) or 1.0
    return tuple(number / length for number in numbers)


def _text(request: GenerateRequest) -> str:
    """What is written: as much as was asked for, or the smallest value that conforms."""
    if request.schema is not None:
        return json.dumps(_value(request.schema, request.max_tokens * _TOKEN))
    return (MARK * (request.max_tokens * _TOKEN // len(MARK) + 1))[: request.max_tokens * _TOKEN]


def _value(schema: Mapping[str, Any], room: int) -> Any:
    """
    A small value for a schema. What it does not foresee is caught by the check that every answer passes.

    Raises StepFailure when it has more than `room` characters as JSON, before it is made.
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
    """So many of that size."""
    if count * size > room:
        raise StepFailure(FailureReason.INVALID_OUTPUT, "what conforms to the schema is longer than max_tokens")
    return count
