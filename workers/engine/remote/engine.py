"""
The remote engine: implements the engine protocol with an OpenAI-compatible server.

Each request is one streamed HTTP call on its own thread, at most `slots` at a time; others wait in order.
A cancelled request closes its connection at once, which frees the server's slot.
Errors of the server and of the network become Arriero's errors. What is safe is tried again: a connection that could
not be opened, and an answer 429 or 503 that says when. Nothing is sent twice once the server has begun to answer.
The limits of the server, requests and tokens of a minute, are kept by waiting.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, InvalidStateError, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from time import perf_counter
from typing import Any, TypeVar

import httpx2
import numpy as np
import structlog

from app.inference.requests import (
    Embedded,
    EmbedRequest,
    Generated,
    GenerateRequest,
    Reranked,
    RerankRequest,
    TextPiece,
)
from app.kernel import clock
from app.kernel.errors import FailureReason, StepFailure
from app.kernel.security import masking
from workers.engine import OnPiece, OnStop, OnText, pieces_to, require_images, vectors
from workers.engine.metrics import EngineMetrics, Meter
from workers.engine.remote import answer, refusals
from workers.engine.remote.answer import StreamedAnswer
from workers.engine.remote.body import body
from workers.engine.remote.connection import Interruption, client
from workers.engine.remote.estimates import EstimatedTokens
from workers.engine.remote.options import RemoteOptions
from workers.engine.remote.rates import RateWindow

_LOG = structlog.get_logger(__name__)

_T = TypeVar("_T")
#: Seconds until the first probe of a server whose last call failed, the most between two probes, and for one probe.
_FIRST_PROBE, _PROBE, _PROBE_TIMEOUT = 1.0, 10.0, 5.0
#: Seconds beyond the timeouts of a call after which its thread counts as stalled.
_GRACE = 5.0
#: Characters of a token, on average, and seconds before another try without Retry-After.
_CHARACTERS, _PAUSE = 4, 0.5
#: Most bytes of an answer with vectors.
_MAX_VECTORS = 512 * 2**20

#: Errors of the network.
_BROKEN = (httpx2.HTTPError, httpx2.StreamError, OSError)


class _DeadlinePassed(StepFailure):
    """The deadline of a request passed while the server wrote: it serves."""

    def __init__(self, text: str) -> None:
        message = "the deadline passed before the text was complete"
        super().__init__(FailureReason.TIMEOUT, message, text=text)


class RemoteTicket:
    """A handle on a request to the server."""

    def __init__(self, request: GenerateRequest, on_piece: OnPiece | None) -> None:
        self.request, self._on_piece = request, on_piece
        self.submitted = perf_counter()
        self.interruption = Interruption()
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
        self.interruption.request()

    def when_done(self, action: Callable[[], None]) -> None:
        """See the protocol."""
        self.future.add_done_callback(lambda _: action())

    def emit(self, text: str, reasoning: str = "") -> None:
        """Count a piece of text or thinking, and pass it to the reader. A reader that raises is not called again."""
        self.pieces += 1
        if self._on_piece is not None:
            try:
                self._on_piece(TextPiece(text, reasoning=reasoning))
            except Exception:  # noqa: BLE001 (the reader is foreign code, and its errors end here)
                _LOG.exception("text_reader_failed")
                self._on_piece = None


class RemoteEngine(EstimatedTokens):
    """Serves one model of an OpenAI-compatible server."""

    def __init__(self, options: RemoteOptions, on_problem: Callable[[str], None] = lambda _: None) -> None:
        """`on_problem` gets why the server does not serve, and an empty text when it does again."""
        self.options, self.slots, self.window, self._on_problem = options, options.slots, options.context, on_problem
        self._client = client(options.policy, options.connect_timeout, options.read_timeout, options.ca_file)
        self._threads = ThreadPoolExecutor(options.slots, thread_name_prefix="remote-engine")
        self._lock = threading.Lock()
        self._open: set[RemoteTicket] = set()
        self._pending_vectors: dict[Future[Embedded], Interruption] = {}
        #: By call, the time by which the server must have sent something.
        self._due: dict[Interruption, float] = {}
        self._rates = RateWindow(options.requests_per_minute, options.tokens_per_minute)
        self._meter = Meter()
        self._closed = threading.Event()
        self.problem = ""
        self._probing = threading.Thread(target=self._probe_while_down, name="remote-probe", daemon=True)
        self._down = threading.Event()
        self._probing.start()

    def generate(
        self, request: GenerateRequest, on_text: OnText | None = None, on_piece: OnPiece | None = None
    ) -> RemoteTicket:
        """
        See the protocol. Tool calls and log-probabilities come with the result, not with pieces.

        The server rejects what it can never serve, so such a failure comes with the result.
        """
        if (request.prompt is None) == (not request.messages):
            raise StepFailure(FailureReason.INVALID_REQUEST, "exactly one of messages and prompt is required")
        require_images(self, request)
        if request.n != 1:
            raise StepFailure(FailureReason.INVALID_REQUEST, f"n is {request.n}; a remote engine accepts only 1")
        if request.logprobs is not None:
            raise StepFailure(
                FailureReason.INVALID_REQUEST, "logprobs is set; a remote engine has no log-probabilities"
            )
        ticket = RemoteTicket(request, pieces_to(on_text, on_piece))
        with self._lock:
            if self._closed.is_set():
                raise StepFailure(FailureReason.WORKER_STOPPED, "the engine is closed")
            self._open.add(ticket)
            self._meter.submitted += 1
            self._threads.submit(self._serve, ticket)
        return ticket

    def embed(self, request: EmbedRequest, timeout: float | None = None, on_stop: OnStop | None = None) -> Embedded:
        """See the protocol. Texts are not truncated or split; the server rejects those that are too long."""
        future: Future[Embedded] = Future()
        interruption = Interruption()
        with self._lock:
            if self._closed.is_set():
                raise StepFailure(FailureReason.WORKER_STOPPED, "the engine is closed")
            self._pending_vectors[future] = interruption
            self._threads.submit(self._serve_vectors, request, future, interruption)

        def leave() -> None:
            future.cancel()
            interruption.request()

        if on_stop is not None:
            on_stop(leave)
        try:
            return future.result(timeout)
        finally:
            leave()
            with self._lock:
                self._pending_vectors.pop(future, None)

    def rerank(
        self,
        request: RerankRequest,  # noqa: ARG002 the signature is the protocol's
        timeout: float | None = None,  # noqa: ARG002 as above
        on_stop: OnStop | None = None,  # noqa: ARG002 as above
    ) -> Reranked:
        """See the protocol. Refused: OpenAI's API has no reranking."""
        message = f"{self.options.url} is reached through OpenAI's API, which has no reranking"
        raise StepFailure(FailureReason.INVALID_REQUEST, message)

    @property
    def calls_tools(self) -> bool:
        """See the protocol. What the model behind the server can is not known; one that cannot refuses."""
        return True

    def stalled_for(self) -> timedelta:
        """See the protocol. A call stalls when its own timeouts have passed and it has not ended."""
        with self._lock:
            late = perf_counter() - min(self._due.values(), default=perf_counter())
        return timedelta(seconds=max(late, 0.0))

    def metrics(self) -> EngineMetrics:
        """Return its counters and its current state."""
        with self._lock:
            running = min(len(self._open), self.slots)
            waiting = len(self._open) - running
        return self._meter.snapshot(slots=self.slots, running=running, waiting=waiting)

    def probe(self) -> None:
        """
        Ask the server for its models: whether it answers, and accepts the key.

        Raises StepFailure when it does not.
        """
        outcome = self._outcome(self._probe)
        self._note(outcome)
        if isinstance(outcome, BaseException):
            raise outcome

    def close(self) -> None:
        """See the protocol. Each call ends at once."""
        with self._lock:
            self._closed.set()
            self._down.set()
            for ticket in self._open:
                ticket.closed = not ticket.interruption.requested.is_set()
                ticket.cancel()
            for future, interruption in self._pending_vectors.items():
                _settle(future, StepFailure(FailureReason.WORKER_STOPPED, "the engine is closed"))
                interruption.request()
        self._threads.shutdown(wait=True)
        self._probing.join(timeout=_PROBE_TIMEOUT)
        self._client.close()

    def _serve(self, ticket: RemoteTicket) -> None:
        """Make one call, on its own thread. The ticket is done afterwards in any case."""
        outcome = self._outcome(lambda: self._call(ticket))
        if ticket.interruption.requested.is_set():
            stopped = StepFailure(FailureReason.WORKER_STOPPED, "the engine is closed")
            outcome = stopped if ticket.closed else CancelledError()
        else:
            self._note(outcome)
        with self._lock:
            self._open.discard(ticket)
            self._due.pop(ticket.interruption, None)
            self._count(outcome)
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
        except _BROKEN as error:
            return self._broken(error)
        except Exception as error:  # noqa: BLE001 (the outermost shell of the thread)
            _LOG.exception("remote_call_failed")
            return StepFailure(FailureReason.INTERNAL, f"{type(error).__name__}: {error}")

    def _broken(self, error: Exception, text: str | None = None) -> StepFailure:
        """Return the failure for an error of the network; `text` is the text so far."""
        options = self.options
        match error:
            case httpx2.ConnectTimeout():
                message = f"{options.url} cannot be reached: no connection after {options.connect_timeout:g} s"
                return StepFailure(FailureReason.HTTP_UNREACHABLE, message)
            case httpx2.ConnectError():
                message = f"{options.url} cannot be reached: {self._masked(str(error))}"
                return StepFailure(FailureReason.HTTP_UNREACHABLE, message)
            case httpx2.TimeoutException():
                message = f"{options.url} did not answer in time: no data for {options.read_timeout:g} s"
                return StepFailure(FailureReason.TIMEOUT, message, text=text)
        message = f"the connection to {options.url} broke: {self._masked(str(error))}"
        return StepFailure(FailureReason.ENGINE_ERROR, message, text=text)

    def _note(self, outcome: object) -> None:
        """Note whether the server serves. What a request itself is to blame for says that it does."""
        failed = outcome if isinstance(outcome, StepFailure) and outcome.reason in refusals.OF_SERVER else None
        problem = "" if failed is None else failed.message
        if isinstance(outcome, CancelledError | _DeadlinePassed) or problem == self.problem:
            return
        self.problem = problem
        if problem:
            _LOG.warning("server_does_not_serve", url=self.options.url, reason=problem)
            self._down.set()
        else:
            _LOG.info("server_serves", url=self.options.url)
            self._down.clear()
        self._on_problem(problem)

    def _probe_while_down(self) -> None:
        """Probe the server while its last call has failed. Ends with the engine."""
        while not self._closed.is_set():
            self._down.wait()
            pause = _FIRST_PROBE
            while self._down.is_set():
                if self._closed.wait(pause):
                    return
                pause = min(2 * pause, _PROBE)
                if self.problem:
                    self._note(self._outcome(self._probe))

    def _probe(self) -> None:
        timeout = httpx2.Timeout(_PROBE_TIMEOUT)
        with self._client.stream(
            "GET", f"{self.options.url}/models", headers=self._headers(), timeout=timeout
        ) as found:
            # Servers without this resource answer 404: they serve, as far as is known.
            if found.status_code >= 400 and found.status_code not in (404, 405):
                raise self._refusal(found)

    def _serve_vectors(self, request: EmbedRequest, future: Future[Embedded], interruption: Interruption) -> None:
        if future.done():
            return
        outcome = self._outcome(lambda: self._vectors(request, interruption))
        if not interruption.requested.is_set():
            self._note(outcome)
        with self._lock:
            self._due.pop(interruption, None)
        _settle(future, outcome)

    def _vectors(self, request: EmbedRequest, interruption: Interruption) -> Embedded:
        options, started_at = self.options, perf_counter()
        texts = vectors.with_prefixes(request, options.query_prefix, options.document_prefix)
        sent = {"model": options.model, "input": list(texts), "encoding_format": "float"}
        with self._sent("embeddings", sent, sum(map(len, texts)), interruption) as (response, record):
            raw = answer.read(response.iter_bytes(), _MAX_VECTORS)
        try:
            given = json.loads(raw)
            found = {int(one["index"]): np.asarray(one["embedding"], np.float32) for one in given["data"]}
            rows = [found[index] for index in range(len(texts))]
            counted = int((given.get("usage") or {}).get("prompt_tokens", 0))
            whole = vectors.normalised(rows, request.dimensions)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError) as error:
            message = f"the server's answer does not contain a vector for each text: {type(error).__name__}"
            raise StepFailure(FailureReason.ENGINE_ERROR, message) from None
        self._rates.correct(record, counted)
        return Embedded(whole, counted, timedelta(seconds=perf_counter() - started_at))

    def _call(self, ticket: RemoteTicket) -> Generated:
        request = ticket.request
        path = "chat/completions" if request.prompt is None else "completions"
        sent = body(request, self.options.model, llama_fields=self.options.llama_fields)
        length = len(request.prompt or "") + sum(len(message.content) for message in request.messages)
        streamed = StreamedAnswer(ticket.submitted)
        with self._sent(path, sent, length, ticket.interruption) as (response, record):
            try:
                for event in answer.events(response.iter_bytes()):
                    self._progress(ticket.interruption)
                    if request.deadline is not None and clock.now() >= request.deadline:
                        raise _DeadlinePassed(streamed.text)
                    new, thought = streamed.add(event), streamed.take_reasoning()
                    if new or thought:
                        ticket.emit(new, thought)
            except _BROKEN as error:
                raise self._broken(error, streamed.text) from None
        generated = streamed.generated(request)
        self._rates.correct(record, generated.tokens_in + generated.tokens_out)
        return generated

    @contextmanager
    def _sent(
        self, path: str, content: Mapping[str, Any], characters: int, interruption: Interruption
    ) -> Iterator[tuple[httpx2.Response, list[float]]]:
        """
        Send a request, and again as far as that is safe. Yields the answer of the server, which has begun.

        Raises StepFailure, CancelledError, and errors of httpx.
        """
        options = self.options
        for tries_left in range(options.retries, -1, -1):
            record = self._admitted(characters // _CHARACTERS, interruption)
            self._progress(interruption)
            pause = _PAUSE
            with interruption.watching():
                try:
                    request = self._client.build_request(
                        "POST", f"{options.url}/{path}", json=content, headers=self._headers() | interruption.trace
                    )
                    response = self._client.send(request, stream=True)
                except (httpx2.ConnectError, httpx2.ConnectTimeout):
                    if not tries_left or interruption.requested.is_set():
                        raise
                else:
                    try:
                        if response.status_code < 300:
                            yield response, record
                            return
                        refusal = self._refusal(response)
                    finally:
                        response.close()
                    pause = -1.0 if refusal.retry_after is None else refusal.retry_after.total_seconds()
                    if not tries_left or not 0 <= pause <= options.max_retry_wait:
                        raise refusal
            self._wait(pause, interruption)

    def _admitted(self, tokens: int, interruption: Interruption) -> list[float]:
        """Wait until the limits of the server allow the request, and count it. Raises CancelledError."""
        while True:
            with self._lock:
                now = perf_counter()
                seconds = self._rates.wait(now, tokens)
                if not seconds:
                    return self._rates.send(now, tokens)
            self._wait(seconds, interruption)

    def _wait(self, seconds: float, interruption: Interruption) -> None:
        """Wait before the request is sent; this is no stall. Raises CancelledError."""
        with self._lock:
            self._due[interruption] = float("inf")
        if interruption.requested.wait(seconds):
            raise CancelledError

    def _progress(self, interruption: Interruption) -> None:
        options = self.options
        with self._lock:
            self._due[interruption] = perf_counter() + options.connect_timeout + options.read_timeout + _GRACE
        if interruption.requested.is_set():
            raise CancelledError

    def _headers(self) -> dict[str, str]:
        key = self._key()
        return {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def _key(self) -> str | None:
        return None if self.options.api_key is None else self.options.api_key()

    def _masked(self, text: str) -> str:
        try:
            key = self._key()
        except StepFailure:  # the secret is gone: nothing was sent with it
            return text
        return masking.masked(text, (key,)) if key else text

    def _refusal(self, response: httpx2.Response) -> StepFailure:
        """Return the error for an answer that is no success."""
        said = answer.read(response.iter_bytes(), refusals.MAX_BYTES, cut=True).decode(errors="replace")
        return refusals.of_answer(response.status_code, response.headers, self._masked(said), clock.now())

    def _count(self, outcome: Generated | BaseException) -> None:
        meter = self._meter
        match outcome:
            case Generated():
                meter.finished += 1
                meter.tokens_in += outcome.tokens_in
                meter.tokens_out += outcome.tokens_out
                meter.tokens_reused += outcome.tokens_cached
                meter.tokens_computed += max(outcome.tokens_in - outcome.tokens_cached, 0)
            case StepFailure(reason=FailureReason.TIMEOUT):
                meter.timed_out += 1
            case CancelledError():
                meter.cancelled += 1
            case _:
                meter.failed += 1


def _settle(future: Future[Embedded], outcome: Embedded | BaseException) -> None:
    with suppress(InvalidStateError):  # the caller has stopped waiting and cancelled it
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
