"""
Direct requests in a pool: taken from Redis while slots are free, streamed, and recorded as runs.

A request is recorded when its first token is written, or at its end if that comes first; from then on it has a lease,
and can be cancelled like any step. Recording never delays tokens: a thread of its own does it.
A request that could not be recorded is answered nevertheless; the error is logged.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from functools import partial
from uuid import UUID

import redis

from app.access import namespaces
from app.fleet.pool import PoolPhase
from app.inference import direct
from app.inference.direct import WORKFLOW, DirectRequest
from app.inference.openai.chat import ChatRequest
from app.inference.openai.completion import CompletionRequest
from app.inference.openai.embedding import EmbeddingsRequest
from app.inference.openai.reranking import RerankingRequest
from app.inference.requests import TextPiece
from app.kernel import broker, log
from app.kernel.errors import Conflict, FailureReason, LeaseLost
from app.workflows.runs.claims import Claim
from app.workflows.state_machine.outcomes import Failure, Success
from workers import openai_step, steps
from workers.hooks.session import HookSession
from workers.images import ImageReader
from workers.leases import StopReason
from workers.memory import assembly
from workers.memory.assembly import AssembledPrompt
from workers.runtime import Runtime
from workers.telemetry import traces
from workers.token_writer import TokenStream, TokenWriter

_log = log.get(__name__)

#: Seconds of one wait for a request.
_WAIT = 30
#: Seconds before another try while Redis is away.
_PAUSE = 1.0
#: Requests whose record waits for the database; with more, no request is taken.
_MAX_UNRECORDED = 200
#: Time for a request.
_TIMEOUT = timedelta(minutes=10)
#: Seconds for a request to stop.
_STOPS_WITHIN = 10.0
#: Why a run was cancelled.
_CLIENT_LEFT = "the client has gone away"


class DirectRequests:
    """The direct requests of one pool."""

    def __init__(self, runtime: Runtime, tokens: TokenWriter, redis_url: str, slug: str, pool_id: str) -> None:
        """Takes nothing before the phase SERVING."""
        assert runtime.engine is not None, "it belongs to a pool"
        self.runtime, self.engine, self.tokens, self.pool_id = runtime, runtime.engine, tokens, pool_id
        self._redis = broker.connect(redis_url, connect_timeout=5, answer_timeout=_WAIT + 10, health_check_interval=15)
        self._requests_key, self._stop_key = direct.requests_key(slug), direct.stop_key(pool_id)
        self._probe_key = direct.probe_key(pool_id)
        self._active: dict[UUID, _Request] = {}
        self._changed = threading.Condition()
        self._taking = False
        self._ended = threading.Event()
        self._unrecorded = 0
        #: The last error of Redis, which is logged once.
        self._problem = ""
        #: Ends requests, and computes embeddings.
        self.answering = ThreadPoolExecutor(2, "direct-answers")
        #: Puts prompts together, which waits for the database.
        self.assembling = ThreadPoolExecutor(self.engine.slots, "direct-prompts")
        self._recording = ThreadPoolExecutor(2, "direct-records")
        self._thread = threading.Thread(target=self._serve, name="direct", daemon=True)

    def on_phase(self, phase: PoolPhase) -> None:
        """Begin to take requests, take no more, or finish those that were taken."""
        match phase:
            case PoolPhase.SERVING:
                self._taking = True
                self._thread.start()
            case PoolPhase.DRAINING:
                self._taking = False
                self._wake()
            case PoolPhase.UNLOADING:
                self.close()
            case _:
                pass

    def close(self) -> None:
        """Wait until the requests that were taken have ended and are recorded; what takes too long is requeued."""
        self._taking = False
        limit = self.runtime.settings.pools.drain_timeout.total_seconds()
        with self._changed:
            if not self._changed.wait_for(lambda: not self._active, limit):
                for request in self._active.values():
                    request.stop(StopReason.DRAINED)
                self._changed.wait_for(lambda: not self._active, _STOPS_WITHIN)
        self._ended.set()
        if self._thread.is_alive():
            self._wake()
            self._thread.join(timeout=5)
        self.assembling.shutdown()
        self.answering.shutdown()
        self._recording.shutdown()
        self._redis.close()

    def ended(self, request: _Request) -> None:
        """A request has been answered."""
        with self._changed:
            full = not self._accepts()
            self._active.pop(request.run_id, None)
            self._changed.notify_all()
        if full:
            self._wake()

    def record(self, action: Callable[[], None]) -> None:
        """Do something with the database, on a thread for that."""

        def recorded() -> None:
            try:
                action()
            except Exception:  # noqa: BLE001 the outermost frame of the thread: the request was answered
                _log.exception("direct_request_not_recorded")
            finally:
                with self._changed:
                    self._unrecorded -= 1

        with self._changed:
            self._unrecorded += 1
        self._recording.submit(recorded)

    def _accepts(self) -> bool:
        return self._taking and len(self._active) < self.engine.slots and self._unrecorded < _MAX_UNRECORDED

    def _serve(self) -> None:
        while not self._ended.is_set():
            try:
                self._take()
            except redis.RedisError as error:
                if str(error) != self._problem:
                    self._problem = str(error)
                    _log.warning("direct_requests_not_read", error=self._problem)
                self._ended.wait(_PAUSE)
            except Exception:  # noqa: BLE001 the outermost loop of the thread
                _log.exception("direct_requests_interrupted")
                self._ended.wait(_PAUSE)

    def _take(self) -> None:
        # A probe is taken by a full pool too: it shows whether the engine comes to it.
        probes = [self._probe_key] if self._taking else []
        keys = [self._stop_key, *probes, *([self._requests_key] if self._accepts() else [])]
        wait = float(_WAIT)
        if self._active:
            wait = direct.ALIVE_INTERVAL.total_seconds()
            if any(not request.is_probe for request in self._active.copy().values()):
                self._redis.set(direct.alive_key(self.pool_id), "1", px=direct.ALIVE)
        found = self._redis.blpop(keys, wait)
        if found is None:
            return
        key, message = (part.encode() if isinstance(part, str) else part for part in found)
        if key == self._stop_key.encode():
            self._stop(message)
            return
        try:
            request = _Request(self, DirectRequest.decoded(message), is_probe=key == self._probe_key.encode())
        except ValueError as error:
            _log.warning("direct_request_invalid", error=str(error))
            return
        with self._changed:
            self._active[request.run_id] = request
        request.begin()

    def _stop(self, message: bytes) -> None:
        """Stop a request; an empty message only wakes the thread."""
        try:
            request = self._active.get(UUID(message.decode())) if message else None
        except ValueError:
            return
        if request is not None:
            request.stop(StopReason.CANCELLED)

    def _wake(self) -> None:
        try:
            self._redis.rpush(self._stop_key, b"")
            self._redis.expire(self._stop_key, 60)
        except redis.RedisError:
            _log.debug("direct_requests_not_woken")  # the wait for requests ends by itself


class _Request:
    """A request that was taken."""

    def __init__(self, owner: DirectRequests, request: DirectRequest, *, is_probe: bool = False) -> None:
        #: A probe is no work: a pool that hangs on one is not busy.
        self.is_probe = is_probe
        self._owner, self._request, self.run_id = owner, request, request.run_id
        self._stream: TokenStream = owner.tokens.open(request.run_id, direct.STEP, 1)
        self._stopped: StopReason | None = None
        self._on_stop: Callable[[], None] | None = None
        self._written = False
        self._began = time.monotonic()
        # A probe is no work of anybody: its time is not divided.
        self._end_device_time = owner.runtime.begin_device_time(None if is_probe else request.model)
        self._span = traces.request(request.body, request.model, str(request.run_id), request.trace_parent)
        self._hooks: HookSession = owner.runtime.hooks_for(
            None if is_probe else request.model,
            WORKFLOW,
            request.labels.get(namespaces.LABEL, namespaces.DEFAULT),
        )
        self._claim: Claim | None = None
        self._lease = ExitStack()
        #: Guards what stops it.
        self._lock = threading.Lock()
        #: Held while the run is written, which may wait for the database: a stop must not wait for that.
        self._recording = threading.Lock()

    def begin(self) -> None:
        """Give it to the engine."""
        self._stream.begun(self._owner.pool_id)
        try:
            with self._span.active():
                self._start()
        except Exception as error:  # noqa: BLE001 a defect fails the request, not the pool
            self._end(steps.failure_of(error))

    def _start(self) -> None:
        """Raises StepFailure when it can never be served."""
        owner, request = self._owner, self._request
        parsed = openai_step.parse(request.body, request.model)
        if isinstance(parsed, EmbeddingsRequest | RerankingRequest):
            owner.answering.submit(self._compute, parsed)
            return
        if isinstance(parsed, ChatRequest) and (parsed.is_assembled or parsed.has_images):
            owner.assembling.submit(self._assemble, parsed)
            return
        if self._hooks.hooks:  # they may take long: not on the thread that takes requests
            if request.is_recorded:
                self._written = True
                owner.record(self._record_begin)
            owner.assembling.submit(self._pass_hooks, parsed)
            return
        self._generate(parsed, None)

    def _pass_hooks(self, parsed: ChatRequest | CompletionRequest) -> None:
        if self._stopped is not None:
            self._end(self._cancelled())
            return
        try:
            self._generate(parsed, None)
        except CancelledError:
            self._end(self._cancelled())
        except Exception as error:  # noqa: BLE001 as in `begin`
            self._end(steps.failure_of(error))

    def _assemble(self, parsed: ChatRequest) -> None:
        if self._stopped is not None:
            self._end(self._cancelled())
            return
        try:
            if not parsed.is_assembled:  # its images are read, which waits for the database or another server
                self._generate(parsed, None)
                return
            runtime, namespace = self._owner.runtime, self._request.submission().labels.get(namespaces.LABEL)
            of = assembly.of_chat(parsed, namespace or namespaces.DEFAULT, self.run_id, direct.STEP)
            self._generate(parsed, assembly.assemble(runtime, self._owner.engine, of, parsed.translated()))
        except CancelledError:
            self._end(self._cancelled())
        except Exception as error:  # noqa: BLE001 as in `begin`
            self._end(steps.failure_of(error))

    def _generate(self, parsed: ChatRequest | CompletionRequest, assembled: AssembledPrompt | None) -> None:
        owner, request = self._owner, self._request
        engine = self._hooks.around(owner.engine, self._stops_by)
        namespace = request.labels.get(namespaces.LABEL, namespaces.DEFAULT)
        images = ImageReader.of(owner.runtime, namespace, self._stops_by)
        ticket = openai_step.start(engine, parsed, request.priority, self._on_piece, assembled, images)
        self._stops_by(ticket.cancel)

        def answer() -> Success:
            return openai_step.success(parsed, ticket.result(0), request.run_id, request.created, assembled)

        def done() -> None:
            (owner.assembling if self._hooks.hooks else owner.answering).submit(self._finish, answer)

        ticket.when_done(done)

    def stop(self, reason: StopReason) -> None:
        """Stop it at its next token."""
        with self._lock:
            self._stopped = self._stopped or reason
            action = self._on_stop
        if action is not None:
            action()

    def _stops_by(self, action: Callable[[], None]) -> None:
        with self._lock:
            self._on_stop = action
            stopped = self._stopped is not None
        if stopped:
            action()

    def _on_piece(self, piece: TextPiece) -> None:
        self._stream.piece(piece)
        if not self._written and self._request.is_recorded:
            self._written = True
            self._owner.record(self._record_begin)

    def _compute(self, request: EmbeddingsRequest | RerankingRequest) -> None:
        engine, priority = self._owner.engine, self._request.priority
        if isinstance(request, EmbeddingsRequest):
            self._finish(lambda: openai_step.embed(request, engine, priority, self._stops_by, _TIMEOUT))
        else:
            self._finish(lambda: openai_step.rerank(request, engine, priority, self._stops_by, _TIMEOUT))

    def _finish(self, result: Callable[[], Success]) -> None:
        try:
            outcome: Success | Failure = result()
        except CancelledError:
            outcome = self._cancelled()
        except Exception as error:  # noqa: BLE001 as in `begin`
            outcome = steps.failure_of(error)
        self._end(outcome)

    def _cancelled(self) -> Failure:
        is_cancelled = self._stopped is StopReason.CANCELLED
        return Failure(FailureReason.CANCELLED, _CLIENT_LEFT) if is_cancelled else steps.REQUEUED

    def _end(self, outcome: Success | Failure) -> None:
        """Answer, then record; where more than the answer is recorded, first record: the next request reads it."""
        self._end_device_time()
        outcome = self._hooks.noted(outcome)
        if isinstance(outcome, Success) and outcome.within is not None:
            outcome = replace(outcome, recorded=partial(self._answer_recorded, outcome.recorded))
        else:
            self._answer(outcome)
        traces.note(self._span, outcome)
        self._span.end()
        self._count(outcome)
        if self._request.is_recorded:
            self._owner.record(lambda: self._record_end(outcome))
        self._owner.ended(self)

    def _count(self, outcome: Success | Failure) -> None:
        request, seconds = self._request, time.monotonic() - self._began
        namespace = request.labels.get(namespaces.LABEL, namespaces.DEFAULT)
        self._owner.runtime.figures.count_request(request.body, namespace, request.model, outcome, seconds)

    def _answer(self, outcome: Success | Failure) -> None:
        if isinstance(outcome, Success):
            self._stream.done(outcome.output)
        elif outcome.reason is not FailureReason.WORKER_STOPPED:
            self._stream.failed(outcome.reason, outcome.message)

    def _answer_recorded(
        self, follows: Callable[[Success | Failure], object] | None, outcome: Success | Failure
    ) -> None:
        self._answer(outcome)
        if follows is not None:
            follows(outcome)

    def _record_begin(self) -> None:
        """Write the run, and hold the lease of its step from now on."""
        with self._recording:
            if self._claim is not None:
                return
            runtime = self._owner.runtime
            try:
                begun = timedelta(seconds=time.monotonic() - self._began)
                claim = steps.with_database(
                    lambda: runtime.runs.submit_held(self._request.submission(), runtime.owner, begun)
                )
            except Conflict:
                # The API took this pool for dead and has submitted the run.
                _log.warning("direct_request_superseded", run_id=str(self.run_id))
                claim = None
            if claim is None:
                self._stream.given_up = True
            else:
                self._claim = claim
                runtime.events.started(claim)
                holding = self._lease.enter_context(runtime.leases.hold(claim))
        if claim is None:
            self.stop(StopReason.LOST)
        else:
            holding.on_stop(lambda: self.stop(holding.reason or StopReason.LOST))

    def _record_end(self, outcome: Success | Failure) -> None:
        self._record_begin()
        runtime, claim = self._owner.runtime, self._claim
        if claim is None:
            return
        if isinstance(outcome, Success):
            outcome = replace(outcome, output=_kept(outcome.output))
        elif outcome.reason is FailureReason.CANCELLED:
            steps.with_database(lambda: runtime.runs.cancel(self.run_id, message=_CLIENT_LEFT))
        with self._lease:
            try:
                recorded = steps.record_or_fail(runtime, claim, outcome, self._end_device_time())
            except LeaseLost as error:
                _log.warning("step_record_refused", error=str(error))
                runtime.events.lost(claim)
            else:
                steps.send_events(runtime, claim, recorded, time.monotonic() - self._began)


def _kept(output: object) -> object:
    """What is recorded of an answer: embeddings without their vectors, which nobody reads there."""
    if isinstance(output, dict) and isinstance(output.get("data"), list):
        return {**output, "data": [{**one, "embedding": None} for one in output["data"]]}
    return output
