"""
The remote engine: implements the engine protocol with an OpenAI-compatible server.

Each request is one streamed HTTP call on its own thread, at most `slots` at a time; others wait in order.
A cancelled request closes its stream at the next event, which frees the server's slot.
Errors of the server and of the network become Arriero's errors. Nothing is retried here.
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
    Reranked,
    RerankRequest,
    TextPiece,
    ToolCall,
)
from app.kernel import clock
from app.kernel.errors import FailureReason, StepFailure
from workers.engine import OnPiece, OnStop, OnText, pieces_to, vectors

_LOG = structlog.get_logger(__name__)

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class RemoteOptions:
    """The address and the capabilities of the server."""

    #: The base URL without `/chat/completions`, such as `http://127.0.0.1:8080/v1`.
    url: str
    #: The server's name for the model.
    model: str
    api_key: str | None = None
    #: Most requests sent to the server at the same time.
    slots: int = 4
    #: Seconds to connect, and seconds without any data from the server.
    connect_timeout: float = 10.0
    read_timeout: float = 120.0
    #: Prefixes of texts that are embedded as queries and as documents.
    query_prefix: str = ""
    document_prefix: str = ""
    #: Whether the server accepts llama.cpp's own fields, such as top_k, min_p and grammar.
    llama_fields: bool = True


class RemoteTicket:
    """A handle on a request to the server."""

    def __init__(self, request: GenerateRequest, on_piece: OnPiece | None) -> None:
        self.request, self._on_piece = request, on_piece
        self.submitted = perf_counter()
        self.cancelled = threading.Event()
        #: Cancelled by the closing of the engine, not by the caller.
        self.closed = False
        self.future: Future[Generated] = Future()
        self.pieces = 0

    def result(self, timeout: float | None = None) -> Generated:
        """See the protocol."""
        return self.future.result(timeout)

    def written(self) -> int:
        """See the protocol. Pieces of text are counted: most servers send one for each token."""
        return self.pieces

    def cancel(self) -> None:
        """See the protocol."""
        self.cancelled.set()

    def when_done(self, action: Callable[[], None]) -> None:
        """See the protocol."""
        self.future.add_done_callback(lambda _: action())

    def emit(self, text: str) -> None:
        """Count a piece of text, and pass it to the reader. A reader that raises is not called again."""
        self.pieces += 1
        if self._on_piece is not None:
            try:
                self._on_piece(TextPiece(text))
            except Exception:  # noqa: BLE001 (the reader is foreign code, and its errors end here)
                _LOG.exception("text_reader_failed")
                self._on_piece = None


class RemoteEngine:
    """Serves one model of an OpenAI-compatible server."""

    def __init__(self, options: RemoteOptions) -> None:
        self.options, self.slots = options, options.slots
        headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
        timeout = httpx2.Timeout(options.read_timeout, connect=options.connect_timeout)
        self._client = httpx2.Client(headers=headers, timeout=timeout)
        self._threads = ThreadPoolExecutor(options.slots, thread_name_prefix="remote-engine")
        self._lock = threading.Lock()
        self._open: set[RemoteTicket] = set()
        self._pending_vectors: set[Future[Embedded]] = set()
        self._progress_at = perf_counter()
        self._closed = False

    def generate(
        self, request: GenerateRequest, on_text: OnText | None = None, on_piece: OnPiece | None = None
    ) -> RemoteTicket:
        """
        See the protocol. Tool calls and log-probabilities come with the result, not with pieces.

        The server rejects what it can never serve, so such a failure comes with the result.
        """
        if (request.prompt is None) == (not request.messages):
            raise StepFailure(FailureReason.INVALID_REQUEST, "exactly one of messages and prompt is required")
        if request.n != 1:
            raise StepFailure(FailureReason.INVALID_REQUEST, f"n is {request.n}; a remote engine accepts only 1")
        ticket = RemoteTicket(request, pieces_to(on_text, on_piece))
        with self._lock:
            if self._closed:
                raise StepFailure(FailureReason.WORKER_STOPPED, "the engine is closed")
            if not self._open:
                self._progress_at = perf_counter()
            self._open.add(ticket)
            self._threads.submit(self._serve, ticket)
        return ticket

    def embed(self, request: EmbedRequest, timeout: float | None = None, on_stop: OnStop | None = None) -> Embedded:
        """
        See the protocol. Texts are not truncated or split; the server rejects those that are too long.

        A stopped call continues at the server.
        """
        future: Future[Embedded] = Future()
        with self._lock:
            if self._closed:
                raise StepFailure(FailureReason.WORKER_STOPPED, "the engine is closed")
            self._pending_vectors.add(future)
            self._threads.submit(self._serve_vectors, request, future)
        if on_stop is not None:
            on_stop(lambda: _leave(future))
        try:
            return future.result(timeout)
        finally:
            future.cancel()
            with self._lock:
                self._pending_vectors.discard(future)

    def rerank(
        self,
        request: RerankRequest,  # noqa: ARG002 the signature is the protocol's
        timeout: float | None = None,  # noqa: ARG002 as above
        on_stop: OnStop | None = None,  # noqa: ARG002 as above
    ) -> Reranked:
        """See the protocol. Refused: OpenAI's API has no reranking."""
        message = f"{self.options.url} is reached through OpenAI's API, which has no reranking"
        raise StepFailure(FailureReason.INVALID_REQUEST, message)

    def stalled_for(self) -> timedelta:
        """See the protocol. Progress is an event of any stream."""
        with self._lock:
            return timedelta(seconds=perf_counter() - self._progress_at if self._open else 0)

    def close(self) -> None:
        """See the protocol. Each stream ends at its next event."""
        with self._lock:
            self._closed = True
            for ticket in self._open:
                ticket.closed = not ticket.cancelled.is_set()
                ticket.cancel()
            for future in self._pending_vectors:
                _settle(future, StepFailure(FailureReason.WORKER_STOPPED, "the engine is closed"))
        self._threads.shutdown(wait=True)
        self._client.close()

    def _serve(self, ticket: RemoteTicket) -> None:
        """Make one call, on its own thread. The ticket is done afterwards in any case."""
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
        """Return the result of a call, or the error that it ends with."""
        try:
            return call()
        except (StepFailure, CancelledError) as error:
            return error
        except httpx2.TimeoutException as error:
            return StepFailure(FailureReason.TIMEOUT, f"{self.options.url} did not answer in time: {error}")
        except httpx2.HTTPError as error:
            return StepFailure(FailureReason.ENGINE_ERROR, f"{self.options.url} cannot be reached: {error}")
        except Exception as error:  # noqa: BLE001 (the outermost shell of the thread)
            _LOG.exception("remote_call_failed")
            return StepFailure(FailureReason.INTERNAL, f"{type(error).__name__}: {error}")

    def _serve_vectors(self, request: EmbedRequest, future: Future[Embedded]) -> None:
        if not future.done():
            _settle(future, self._outcome(lambda: self._vectors(request)))

    def _vectors(self, request: EmbedRequest) -> Embedded:
        options, started_at = self.options, perf_counter()
        texts = vectors.with_prefixes(request, options.query_prefix, options.document_prefix)
        body = {"model": options.model, "input": list(texts), "encoding_format": "float"}
        response = self._client.post(f"{options.url.rstrip('/')}/embeddings", json=body)
        if response.status_code >= 400:
            raise _refusal(response)
        try:
            answer = response.json()
            found = {int(one["index"]): np.asarray(one["embedding"], np.float32) for one in answer["data"]}
            rows = [found[index] for index in range(len(texts))]
            counted = int((answer.get("usage") or {}).get("prompt_tokens", 0))
            whole = vectors.normalised(rows, request.dimensions)
        except (ValueError, TypeError, LookupError) as error:
            message = f"the server's answer does not contain a vector for each text: {type(error).__name__}"
            raise StepFailure(FailureReason.ENGINE_ERROR, message) from None
        return Embedded(whole, counted, timedelta(seconds=perf_counter() - started_at))

    def _call(self, ticket: RemoteTicket) -> Generated:
        if ticket.cancelled.is_set():
            raise CancelledError
        request = ticket.request
        path = "chat/completions" if request.prompt is None else "completions"
        answer = _StreamedAnswer(ticket.submitted)
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
                    late = "the deadline passed before the text was complete"
                    raise StepFailure(FailureReason.TIMEOUT, late, text=answer.text)
                if new := answer.add(event):
                    ticket.emit(new)
        if ticket.cancelled.is_set():
            raise CancelledError
        return answer.generated(request)


#: By the names of the server. All others, such as `tool_calls`, mean that the model ended the text.
_FINISH_REASONS: Mapping[str, FinishReason] = {
    one.value: one for one in (FinishReason.LENGTH, FinishReason.CONTENT_FILTER)
}


class _StreamedAnswer:
    """The answer of the server, assembled from the events of its stream."""

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

    def add(self, event: Mapping[str, Any]) -> str:
        """Add an event. Returns its text. Raises StepFailure when the event is an error."""
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
        """Return the result. Raises StepFailure when the text or its calls do not conform to the request."""
        if self._finish is None:
            raise StepFailure(FailureReason.ENGINE_ERROR, "the server's stream ended too early", text=self.text)
        now = perf_counter()
        details = self._usage.get("prompt_tokens_details") or {}
        found = Generated(
            text=self.text,
            finish=_FINISH_REASONS.get(self._finish, FinishReason.STOP),
            tokens_in=int(self._usage.get("prompt_tokens", 0)),
            tokens_out=int(self._usage.get("completion_tokens", self._pieces)),
            tokens_cached=int(details.get("cached_tokens") or 0),
            time_to_first=timedelta(seconds=(self._first or now) - self._submitted),
            time_total=timedelta(seconds=now - self._submitted),
            seed=request.sampling.seed,
        )
        cut_is_kept = request.keeps_cut and found.finish is FinishReason.LENGTH
        if request.schema is not None and not cut_is_kept:
            try:
                answers.require(found.text, request.schema)
            except StepFailure:
                if found.finish is FinishReason.LENGTH:
                    raise answers.cut(request, found.text) from None
                raise
        calls = tuple(self._read_calls())
        answers.require_calls(calls, request, self.text)
        return replace(found, tool_calls=calls)

    def _read_calls(self) -> Iterator[ToolCall]:
        for name, arguments in self._calls.values():
            try:
                yield ToolCall(name, json.loads(arguments or "{}"))
            except ValueError:
                message = f"the arguments of the tool call {name!r} are not JSON"
                raise StepFailure(FailureReason.INVALID_OUTPUT, message, text=arguments) from None


def body(request: GenerateRequest, options: RemoteOptions) -> dict[str, Any]:
    """Return the JSON body of a request. Raises StepFailure when the server does not accept grammars."""
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
        found["messages"] = list(_messages(request.messages))
    if request.stop:
        found["stop"] = list(request.stop)
    if sampling.seed is not None:
        found["seed"] = sampling.seed
    if sampling.logit_bias:
        found["logit_bias"] = {str(token): max(-100, min(100, bias)) for token, bias in sampling.logit_bias.items()}
    if request.schema is not None:
        schema = {"name": "answer", "schema": dict(request.schema), "strict": True}
        found["response_format"] = {"type": "json_schema", "json_schema": schema}
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
        raise StepFailure(FailureReason.INVALID_REQUEST, "the request has a grammar, which this server does not accept")
    return found


def _messages(messages: Sequence[ChatMessage]) -> Iterator[dict[str, Any]]:
    """Yield the messages as JSON. Tool results are matched with tool calls by their order."""
    count, waiting = itertools.count(1), deque[str]()
    for message in messages:
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tool_calls:
            waiting = deque(f"call_{next(count)}" for _ in message.tool_calls)
            functions = [
                {"name": call.name, "arguments": json.dumps(dict(call.arguments))} for call in message.tool_calls
            ]
            turn["tool_calls"] = [
                {"id": number, "type": "function", "function": call}
                for number, call in zip(waiting, functions, strict=True)
            ]
        elif message.role == "tool" and waiting:
            turn["tool_call_id"] = waiting.popleft()
        yield turn


def events(lines: Iterator[str]) -> Iterator[Mapping[str, Any]]:
    """Yield the JSON of each event of a stream until its end. Raises StepFailure for an event that is not JSON."""
    for line in lines:
        if not line.startswith("data:"):
            continue
        data = line[5:].strip()
        if data == "[DONE]":
            return
        try:
            event = json.loads(data)
        except ValueError:
            message = f"the server sent an event that is not JSON: {data[:200]!r}"
            raise StepFailure(FailureReason.ENGINE_ERROR, message) from None
        if isinstance(event, dict):
            yield event


def _refusal(response: httpx2.Response) -> StepFailure:
    """Return the error for an HTTP status."""
    said = response.text[:500]
    status = response.status_code
    if status in (400, 413, 422) and "context" in said.lower():
        return StepFailure(FailureReason.CONTEXT_EXCEEDED, f"the server rejected the request ({status}): {said}")
    if status in (408, 504):
        return StepFailure(FailureReason.TIMEOUT, f"the server timed out ({status}): {said}")
    if status in (401, 403, 404, 429) or status >= 500:
        return StepFailure(FailureReason.ENGINE_ERROR, f"the server cannot serve the request ({status}): {said}")
    return StepFailure(FailureReason.INVALID_REQUEST, f"the server rejected the request ({status}): {said}")


def _leave(future: Future[Embedded]) -> None:
    future.cancel()


def _settle(future: Future[Embedded], outcome: Embedded | BaseException) -> None:
    with suppress(InvalidStateError):  # the caller has stopped waiting and cancelled it
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
