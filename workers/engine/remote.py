"""
A remote engine: a server that speaks OpenAI's completions, behind the engine protocol.

Each request is one streamed HTTP call on a thread of its own, at most `slots` at a time; others wait in their order.
A cancelled request closes its stream at the next piece, which frees the server's slot.
What the server refuses, and what the network breaks, becomes our errors; nothing is tried again here.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from time import perf_counter
from typing import Any, TypeVar

import httpx2
import numpy as np
import structlog

from app.inference import answers
from app.inference.requests import (
    ChatMessage,
    Embedded,
    EmbedRequest,
    FinishReason,
    Generated,
    GenerateRequest,
    NamedTool,
    ToolCall,
)
from app.kernel import clock
from app.kernel.errors import FailureReason, StepFailure
from workers.engine import OnStop, OnText, vectors

_LOG = structlog.get_logger(__name__)

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class RemoteOptions:
    """Where the server is and what may be asked of it."""

    #: Up to and without `/chat/completions`, such as `http://127.0.0.1:8080/v1`.
    url: str
    #: The server's name for the model.
    model: str
    api_key: str | None = None
    #: Requests that the server is given at the same time.
    slots: int = 4
    #: Seconds for the connection, and without a sign of life of a stream.
    connect_timeout: float = 10.0
    silence_timeout: float = 120.0
    #: Put before a text that is embedded in order to search, and to be found.
    query_prefix: str = ""
    document_prefix: str = ""
    #: Whether it takes llama.cpp's own fields, such as top_k, min_p and grammar.
    llama_fields: bool = True


class RemoteTicket:
    """A request under way at the server."""

    def __init__(self, request: GenerateRequest, on_text: OnText | None) -> None:
        self.request, self._on_text = request, on_text
        self.submitted = perf_counter()
        self.cancelled = threading.Event()
        #: It was not cancelled by its asker: the engine was closed.
        self.closed = False
        self.future: Future[Generated] = Future()

    def result(self, timeout: float | None = None) -> Generated:
        """As the protocol says."""
        return self.future.result(timeout)

    def cancel(self) -> None:
        """As the protocol says."""
        self.cancelled.set()

    def show(self, text: str) -> None:
        """Hand a piece to the reader; one that fails is not asked again."""
        if self._on_text is not None:
            try:
                self._on_text(text)
            except Exception:  # noqa: BLE001 (foreign code: its outermost shell is here)
                _LOG.exception("text_reader_failed")
                self._on_text = None


class RemoteEngine:
    """Serves one model of an OpenAI-compatible server."""

    def __init__(self, options: RemoteOptions) -> None:
        self.options, self.slots = options, options.slots
        headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
        timeout = httpx2.Timeout(options.silence_timeout, connect=options.connect_timeout)
        self._client = httpx2.Client(headers=headers, timeout=timeout)
        self._threads = ThreadPoolExecutor(options.slots, thread_name_prefix="remote-engine")
        self._lock = threading.Lock()
        self._open: set[RemoteTicket] = set()
        self._awaited: set[Future[Embedded]] = set()
        self._progress_at = perf_counter()
        self._closed = False

    def generate(self, request: GenerateRequest, on_text: OnText | None = None) -> RemoteTicket:
        """As the protocol says. The server itself says what it can never serve, so such a failure comes later."""
        if (request.prompt is None) == (not request.messages):
            raise StepFailure(FailureReason.INVALID_REQUEST, "exactly one of messages and prompt is needed")
        if request.n != 1:
            raise StepFailure(FailureReason.INVALID_REQUEST, "a remote engine writes one text for a request")
        ticket = RemoteTicket(request, on_text)
        with self._lock:
            if self._closed:
                raise StepFailure(FailureReason.WORKER_STOPPED, "the engine is closed")
            if not self._open:
                self._progress_at = perf_counter()
            self._open.add(ticket)
            self._threads.submit(self._serve, ticket)
        return ticket

    def embed(self, request: EmbedRequest, timeout: float | None = None, on_stop: OnStop | None = None) -> Embedded:
        """As the protocol says, but no text is cut: the server says which are too long. A call that is left goes on."""
        future: Future[Embedded] = Future()
        with self._lock:
            if self._closed:
                raise StepFailure(FailureReason.WORKER_STOPPED, "the engine is closed")
            self._awaited.add(future)
            self._threads.submit(self._serve_vectors, request, future)
        if on_stop is not None:
            on_stop(lambda: _leave(future))
        try:
            return future.result(timeout)
        finally:
            future.cancel()
            with self._lock:
                self._awaited.discard(future)

    def stalled_for(self) -> timedelta:
        """As the protocol says: since the last piece of any text."""
        with self._lock:
            return timedelta(seconds=perf_counter() - self._progress_at if self._open else 0)

    def close(self) -> None:
        """As the protocol says: at the next sign of life of each stream."""
        with self._lock:
            self._closed = True
            for ticket in self._open:
                ticket.closed = not ticket.cancelled.is_set()
                ticket.cancel()
            for future in self._awaited:
                _settle(future, StepFailure(FailureReason.WORKER_STOPPED, "the engine is closed"))
        self._threads.shutdown(wait=True)
        self._client.close()

    def _serve(self, ticket: RemoteTicket) -> None:
        """One call, on a thread of its own; whatever happens, the ticket is done after."""
        outcome = self._outcome(lambda: self._call(ticket))
        if isinstance(outcome, CancelledError) and ticket.closed:
            outcome = StepFailure(FailureReason.WORKER_STOPPED, "the engine is closed")
        with self._lock:
            self._open.discard(ticket)
            self._progress_at = perf_counter()
        if isinstance(outcome, BaseException):
            ticket.future.set_exception(outcome)
        else:
            ticket.future.set_result(outcome)

    def _outcome(self, call: Callable[[], _T]) -> _T | BaseException:
        """What a call gives, or our error for what it meets."""
        try:
            return call()
        except (StepFailure, CancelledError) as error:
            return error
        except httpx2.TimeoutException as error:
            return StepFailure(FailureReason.TIMEOUT, f"{self.options.url} gave no answer in time: {error}")
        except httpx2.HTTPError as error:
            return StepFailure(FailureReason.ENGINE_ERROR, f"{self.options.url} cannot be reached: {error}")
        except Exception as error:  # noqa: BLE001 (the outermost shell of the thread)
            _LOG.exception("remote_call_failed")
            return StepFailure(FailureReason.INTERNAL, f"{type(error).__name__}: {error}")

    def _serve_vectors(self, request: EmbedRequest, future: Future[Embedded]) -> None:
        if not future.done():
            _settle(future, self._outcome(lambda: self._vectors(request)))

    def _vectors(self, request: EmbedRequest) -> Embedded:
        options, begun = self.options, perf_counter()
        texts = vectors.prefixed(request, options.query_prefix, options.document_prefix)
        wanted = {"model": options.model, "input": list(texts), "encoding_format": "float"}
        response = self._client.post(f"{options.url.rstrip('/')}/embeddings", json=wanted)
        if response.status_code >= 400:
            raise _refusal(response)
        try:
            answer = response.json()
            found = {int(one["index"]): np.asarray(one["embedding"], np.float32) for one in answer["data"]}
            rows = [found[index] for index in range(len(texts))]
            counted = int((answer.get("usage") or {}).get("prompt_tokens", 0))
            whole = vectors.finished(rows, request.dimensions)
        except (ValueError, TypeError, LookupError) as error:
            message = f"the server's answer holds no vector for each text: {type(error).__name__}"
            raise StepFailure(FailureReason.ENGINE_ERROR, message) from None
        return Embedded(whole, counted, timedelta(seconds=perf_counter() - begun))

    def _call(self, ticket: RemoteTicket) -> Generated:
        if ticket.cancelled.is_set():
            raise CancelledError
        request = ticket.request
        path = "chat/completions" if request.prompt is None else "completions"
        answer = _Answer(ticket.submitted)
        with self._client.stream(
            "POST", f"{self.options.url.rstrip('/')}/{path}", json=body(request, self.options)
        ) as response:
            if response.status_code >= 400:
                response.read()
                raise _refusal(response)
            for event in events(response.iter_lines()):
                self._progress_at = perf_counter()
                if ticket.cancelled.is_set():
                    raise CancelledError
                if request.deadline is not None and clock.now() >= request.deadline:
                    late = "the deadline came before the text was complete"
                    raise StepFailure(FailureReason.TIMEOUT, late, text=answer.text)
                if new := answer.take(event):
                    ticket.show(new)
        if ticket.cancelled.is_set():
            raise CancelledError
        return answer.generated(request)


class _Answer:
    """A text, put together from a stream's events."""

    def __init__(self, submitted: float) -> None:
        self._submitted, self._first = submitted, 0.0
        self._parts: list[str] = []
        self._finish: str | None = None
        self._usage: Mapping[str, Any] = {}
        self._pieces = 0
        self._calls: dict[int, list[str]] = {}

    @property
    def text(self) -> str:
        return "".join(self._parts)

    def take(self, event: Mapping[str, Any]) -> str:
        """Take an event; give its text. Raises StepFailure when it is an error."""
        if "error" in event:
            raise StepFailure(FailureReason.ENGINE_ERROR, f"the server failed: {event['error']}", text=self.text)
        self._usage = event.get("usage") or self._usage
        for choice in event.get("choices") or ():
            self._finish = choice.get("finish_reason") or self._finish
            delta = choice.get("delta") or {}
            for call in delta.get("tool_calls") or ():
                said = self._calls.setdefault(call.get("index", 0), ["", ""])
                function = call.get("function") or {}
                said[0] += function.get("name") or ""
                said[1] += function.get("arguments") or ""
            new = delta.get("content") or choice.get("text") or ""
            if new:
                self._first = self._first or perf_counter()
                self._pieces += 1
                self._parts.append(new)
                return str(new)
        return ""

    def generated(self, request: GenerateRequest) -> Generated:
        """The outcome. Raises StepFailure when the text is not what was asked for."""
        if self._finish is None:
            raise StepFailure(FailureReason.ENGINE_ERROR, "the server's stream ended too early", text=self.text)
        now = perf_counter()
        details = self._usage.get("prompt_tokens_details") or {}
        found = Generated(
            text=self.text,
            finish=FinishReason.LENGTH if self._finish == "length" else FinishReason.STOP,
            tokens_in=int(self._usage.get("prompt_tokens", 0)),
            tokens_out=int(self._usage.get("completion_tokens", self._pieces)),
            tokens_cached=int(details.get("cached_tokens") or 0),
            time_to_first=timedelta(seconds=(self._first or now) - self._submitted),
            time_total=timedelta(seconds=now - self._submitted),
            seed=request.sampling.seed,
        )
        if request.schema is not None:
            answers.require(found.text, request.schema)
        calls = tuple(self._read_calls())
        answers.require_calls(calls, request, self.text)
        return replace(found, tool_calls=calls)

    def _read_calls(self) -> Iterator[ToolCall]:
        for name, arguments in self._calls.values():
            try:
                yield ToolCall(name, json.loads(arguments or "{}"))
            except ValueError:
                message = f"the call of {name!r} is not JSON"
                raise StepFailure(FailureReason.INVALID_OUTPUT, message, text=arguments) from None


def body(request: GenerateRequest, options: RemoteOptions) -> dict[str, Any]:
    """The JSON of a request."""
    sampling = request.sampling
    found: dict[str, Any] = {
        "model": options.model,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": request.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
    }
    if request.prompt is not None:
        found["prompt"] = request.prompt
    else:
        found["messages"] = list(_turns(request.messages))
    if request.stop:
        found["stop"] = list(request.stop)
    if sampling.seed is not None:
        found["seed"] = sampling.seed
    if sampling.logit_bias:
        found["logit_bias"] = {str(token): max(-100, min(100, bias)) for token, bias in sampling.logit_bias.items()}
    if request.schema is not None:
        wanted = {"name": "answer", "schema": dict(request.schema), "strict": True}
        found["response_format"] = {"type": "json_schema", "json_schema": wanted}
    if request.tools:
        found["tools"] = [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": dict(tool.parameters),
                },
            }
            for tool in request.tools
        ]
        found["tool_choice"] = request.tool_choice
        if isinstance(request.tool_choice, NamedTool):
            found["tool_choice"] = {"type": "function", "function": {"name": request.tool_choice.name}}
        found["parallel_tool_calls"] = request.parallel_calls
    if options.llama_fields:
        found |= {"top_k": sampling.top_k, "min_p": sampling.min_p, "typical_p": sampling.typical_p}
        found |= {"repeat_penalty": sampling.repeat_penalty, "repeat_last_n": sampling.penalty_last_n}
        if request.grammar is not None:
            found["grammar"] = request.grammar
    elif request.grammar is not None:
        raise StepFailure(FailureReason.INVALID_REQUEST, "this server takes no grammars")
    return found


def _turns(messages: Sequence[ChatMessage]) -> Iterator[dict[str, Any]]:
    """The messages; what tools gave is matched with what was asked for by its order."""
    count, waiting = itertools.count(1), deque[str]()
    for message in messages:
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tool_calls:
            waiting = deque(f"call_{next(count)}" for _ in message.tool_calls)
            asked = [{"name": call.name, "arguments": json.dumps(dict(call.arguments))} for call in message.tool_calls]
            turn["tool_calls"] = [
                {"id": number, "type": "function", "function": call}
                for number, call in zip(waiting, asked, strict=True)
            ]
        elif message.role == "tool" and waiting:
            turn["tool_call_id"] = waiting.popleft()
        yield turn


def events(lines: Iterator[str]) -> Iterator[Mapping[str, Any]]:
    """The JSON of each event of a stream, up to its end. Raises StepFailure for what is no event."""
    for line in lines:
        if not line.startswith("data:"):
            continue
        data = line[5:].strip()
        if data == "[DONE]":
            return
        try:
            event = json.loads(data)
        except ValueError:
            message = f"the server sent what is no event: {data[:200]!r}"
            raise StepFailure(FailureReason.ENGINE_ERROR, message) from None
        if isinstance(event, dict):
            yield event


def _refusal(response: httpx2.Response) -> StepFailure:
    """Our error for a status."""
    said = response.text[:500]
    status = response.status_code
    if status in (400, 413, 422) and "context" in said.lower():
        return StepFailure(FailureReason.CONTEXT_EXCEEDED, f"the server refused the request: {said}")
    if status in (408, 504):
        return StepFailure(FailureReason.TIMEOUT, f"the server gave up ({status}): {said}")
    if status in (401, 403, 404, 429) or status >= 500:
        return StepFailure(FailureReason.ENGINE_ERROR, f"the server cannot serve the request ({status}): {said}")
    return StepFailure(FailureReason.INVALID_REQUEST, f"the server refused the request ({status}): {said}")


def _leave(future: Future[Embedded]) -> None:
    future.cancel()


def _settle(future: Future[Embedded], outcome: Embedded | BaseException) -> None:
    with suppress(InvalidStateError):  # nobody waits any longer
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
