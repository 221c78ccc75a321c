"""
The engine: one model in this process, serving many requests at once. What it promises stands in `workers.engine`.

Requests are checked and made into tokens on the asker's thread; the loop's thread does the rest.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from time import perf_counter
from typing import Any

import structlog

from app.catalog import header
from app.grammar import to_gbnf
from app.inference.requests import Embedded, EmbedRequest, GenerateRequest, LongText, Reranked, RerankRequest
from app.kernel import clock, ids
from app.kernel.errors import FailureReason, ModelUnsupported, NotFound, StepFailure
from workers.engine import OnStop, sampling, tools, vectors
from workers.engine.calls import Style, ToolCallWatch
from workers.engine.embedding import EmbeddingContext, EmbeddingJob
from workers.engine.grammars import Form, Grammars, ToGbnf
from workers.engine.lazy import Lazy
from workers.engine.llama import LlamaModel, load_loras, use_loras
from workers.engine.loop import EngineLoop
from workers.engine.metrics import EngineMetrics
from workers.engine.options import EngineOptions, Rope
from workers.engine.tasks import EngineTask, LlamaTicket, OnText
from workers.engine.templates import ChatTemplate

_LOG = structlog.get_logger(__name__)

#: Texts for one prompt, log-probabilities for one token: at the most.
_MOST_TEXTS, _MOST_LOGPROBS = 16, 20


class LlamaEngine:
    """Serves one GGUF model by continuous batching."""

    def __init__(
        self,
        path: Path,
        options: EngineOptions | None = None,
        *,
        on_progress: Callable[[float], None] | None = None,
        schema_to_gbnf: ToGbnf = to_gbnf,
    ) -> None:
        """
        Load the model; `on_progress` gets numbers from 0 to 1 meanwhile.

        Raises ModelFileMissing, ModelFileDamaged, ModelUnsupported or MemoryNotEnough.
        """
        self.options = options or EngineOptions()
        self.slots = self.options.slots
        begun = perf_counter()
        self.model = LlamaModel(path, self.options, on_progress)
        with ExitStack() as undo:
            undo.callback(self.model.close)
            #: It scores documents; it gives no vectors.
            self.ranks = (self.options.pooling or self.model.pooling) == "rank"
            if self.ranks:
                _require_classifier(path)
            self._template = ChatTemplate(self.model, self.options.profile)
            self._grammars = Grammars(self.model, schema_to_gbnf)
            self._loop = EngineLoop(self.model, self.options)
            undo.callback(self._loop.context.close)
            self._loras = load_loras(self.model)
            self._loop.use_loras(list(self._loras.values()))
            undo.pop_all()
        #: A model without a memory looks at whole texts only: it embeds or ranks them.
        self.writes = self.model.decodes and bool(self._loop.context.memory)
        self._embeddings: EmbeddingContext | None = None
        self._numbers = itertools.count(1)
        self._users = 0
        self._closed = False
        self._gate = threading.Condition()
        self._loop.start()
        _LOG.info(
            "engine_loaded",
            model=path.name,
            slots=self.slots,
            context=self._loop.context.n_context,
            layout="streams" if self.options.streams else "unified",
            seconds=round(perf_counter() - begun, 3),
        )

    @property
    def context_limit(self) -> int:
        """Tokens of prompt and text together that one request may have."""
        most, trained = self._loop.context.n_sequence, self.model.n_context_trained
        return min(most, trained) if trained and self.options.rope == Rope() else most

    def generate(self, request: GenerateRequest, on_text: OnText | None = None) -> LlamaTicket:
        """As the protocol says. With n > 1, `on_text` gets the first of the texts."""
        with self._in_use():
            return self._generate(request, on_text)

    def _generate(self, request: GenerateRequest, on_text: OnText | None) -> LlamaTicket:
        self._check(request)
        deadline = _deadline(request)
        prompt = self._template.prompt(request)
        if not prompt.tokens:
            raise StepFailure(FailureReason.INVALID_REQUEST, "the prompt is empty")
        needed = len(prompt.tokens) + request.max_tokens
        if needed > self.context_limit:
            raise StepFailure(
                FailureReason.CONTEXT_EXCEEDED,
                f"{len(prompt.tokens)} tokens of prompt and {request.max_tokens} of text pass the context of "
                f"{self.context_limit} tokens",
            )
        form, style = self._form(request), self._style(request)
        if form is not None:
            self._loop.alphabet.prepare()
        seed = request.sampling.seed if request.sampling.seed is not None else ids.new_id().int & 0xFFFFFFFF
        stop = (*request.stop, *prompt.stop)
        tasks = [
            EngineTask(
                next(self._numbers),
                request,
                prompt.tokens,
                stop,
                form,
                (seed + index) & 0xFFFFFFFF,
                deadline,
                None if index else on_text,
                *self._calls(request, form, style),
            )
            for index in range(request.n)
        ]
        self._loop.submit(tasks)
        return LlamaTicket(tasks, self._loop.wake, style)

    def embed(self, request: EmbedRequest, timeout: float | None = None, on_stop: OnStop | None = None) -> Embedded:
        """As the protocol says."""
        profile = self.options.profile
        with self._in_use():
            if self.ranks:
                message = f"{self.model.path.name} ranks documents; it embeds no texts"
                raise StepFailure(FailureReason.INVALID_REQUEST, message)
            vectors.check(request.dimensions, self.model.n_embd)
            texts = vectors.prefixed(request, profile.query_prefix, profile.document_prefix)
            tokens = [self.model.tokens(text, opening=True, special=False) for text in texts]
        if not all(tokens):
            raise StepFailure(FailureReason.INVALID_REQUEST, f"text {tokens.index([])} is empty")
        job = self._do(tokens, request.long_text)
        if on_stop is not None:
            on_stop(job.cancel)
        found = _wait(job, timeout)
        return Embedded(vectors.finished(found, request.dimensions), sum(map(len, tokens)), job.total())

    def rerank(self, request: RerankRequest, timeout: float | None = None) -> Reranked:
        """How well documents answer a query, by a model made for that. Raises as `embed` does."""
        with self._in_use():
            if not self.ranks:
                message = f"{self.model.path.name} is no reranking model; set its pooling to 'rank' if it is"
                raise StepFailure(FailureReason.INVALID_REQUEST, message)
            tokens = [self._template.pair(request.query, document) for document in request.documents]
        job = self._do(tokens, LongText.REFUSE)
        scores = _wait(job, timeout)
        return Reranked(tuple(float(score[0]) for score in scores), sum(map(len, tokens)), job.total())

    def use_loras(self, scales: Mapping[str, float], timeout: float | None = None) -> None:
        """
        Give the adapters these weights, others none, between two requests: what runs now is finished first.

        Raises NotFound for an adapter that was not loaded; TimeoutError when it takes longer: then it is done later.
        Kept prefixes are dropped: they were computed otherwise.
        """
        for name in scales:
            if name not in self._loras:
                raise NotFound("adapter", name, sorted(self._loras))
        self._loras = {name: (pointer, scales.get(name, 0.0)) for name, (pointer, _) in self._loras.items()}
        done: Future[None] = Future()

        def swap(watched: bool) -> bool:
            if (ended := self._loop.ended) is not None:
                done.set_exception(ended)
                return False
            if watched:
                return True
            self._loop.use_loras(list(self._loras.values()))
            if self._embeddings is not None:
                use_loras(self._embeddings.pointer, list(self._loras.values()))
            done.set_result(None)
            return False

        self._loop.pause_for(swap)
        done.result(timeout)

    def use_threads(self, count: int) -> None:
        """Compute on so many cores, from the next step on: the host's other pools need theirs."""

        def change(_: bool) -> bool:
            self._loop.use_threads(count)
            return False

        self._loop.do(change)

    def stalled_for(self) -> timedelta:
        """As the protocol says. An engine that gave up counts as stalled from its last decode."""
        return timedelta(seconds=self._loop.stalled_seconds())

    def metrics(self) -> EngineMetrics:
        """What it did and how it stands."""
        return replace(self._loop.metrics(), grammar_compiled=self._grammars.misses)

    def count_tokens(self, text: str) -> int:
        """Tokens that a text takes, without those that open a prompt."""
        with self._in_use():
            return len(self.model.tokens(text, opening=False, special=False))

    def close(self) -> None:
        """As the protocol says, after the decode under way. A second call does nothing."""
        with self._gate:
            first, self._closed = not self._closed, True
            self._gate.wait_for(lambda: not self._users)
        if not first:
            return
        begun = perf_counter()
        self._loop.stop()
        if self._embeddings is not None:
            self._embeddings.close()
        self._grammars.close()
        self.model.close()
        _LOG.info("engine_closed", model=self.model.path.name, seconds=round(perf_counter() - begun, 3))

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """Keep the model from being freed meanwhile. Raises StepFailure when it is closed."""
        with self._gate:
            if self._closed:
                raise StepFailure(FailureReason.WORKER_STOPPED, "the engine is closed")
            self._users += 1
        try:
            yield
        finally:
            with self._gate:
                self._users -= 1
                self._gate.notify_all()

    def _check(self, request: GenerateRequest) -> None:
        """Raise StepFailure for what can never be served."""
        wrong = sampling.problems(request.sampling, self.model.n_vocab)
        if (request.prompt is None) == (not request.messages):
            wrong.append("exactly one of messages and prompt is needed")
        if request.max_tokens < 1:
            wrong.append(f"max_tokens is {request.max_tokens}; at least 1 is needed")
        if not 1 <= request.n <= _MOST_TEXTS:
            wrong.append(f"n is {request.n}; 1 to {_MOST_TEXTS} texts can be had")
        if request.logprobs is not None and not 0 <= request.logprobs <= _MOST_LOGPROBS:
            wrong.append(f"logprobs is {request.logprobs}; 0 to {_MOST_LOGPROBS} can be had")
        if sum((request.schema is not None, request.grammar is not None, bool(request.tools))) > 1:
            wrong.append("schema, grammar and tools exclude each other")
        if request.tool_choice != "auto" and not request.tools:
            wrong.append("tool_choice says something of tools, and there are none")
        if not self.writes:
            wrong.append(f"{self.model.path.name} writes no texts; it embeds or ranks them")
        if wrong:
            raise StepFailure(FailureReason.INVALID_REQUEST, "; ".join(wrong))

    def _form(self, request: GenerateRequest) -> Form | None:
        if request.schema is not None:
            return self._grammars.of_schema(request.schema)
        if request.grammar is not None:
            return self._grammars.of_gbnf(request.grammar)
        if request.tools and request.tool_choice != "none":
            return tools.form(self._grammars, request, self._template.tools)
        return None

    def _style(self, request: GenerateRequest) -> Style | None:
        return self._template.tools if request.tools and request.tool_choice != "none" else None

    def _calls(
        self, request: GenerateRequest, form: Form | None, style: Style | None
    ) -> tuple[ToolCallWatch | None, Lazy | None]:
        """What keeps the calls of one text apart, and what binds them if it may be free before."""
        if style is None or form is None:
            return None, None
        watch = ToolCallWatch(style)
        if request.tool_choice != "auto":
            return watch, None
        if watch.feed(request.prefill) != request.prefill:
            message = "a prefill cannot begin a call of a tool; tool_choice 'required' makes the model call one"
            raise StepFailure(FailureReason.INVALID_REQUEST, message)
        return watch, Lazy(self.model, self._loop.alphabet, form, style, request.prefill)

    def _do(self, tokens: Sequence[Sequence[int]], policy: LongText) -> EmbeddingJob:
        if not self.options.vectors:
            message = f"{self.model.path.name} was loaded without vectors: its entry has no use case embed or rerank"
            raise StepFailure(FailureReason.INVALID_REQUEST, message)
        loop = self._loop
        job = EmbeddingJob(tokens, policy, loop.meter, self.options.batch, self._ensure_embeddings, lambda: loop.ended)
        loop.do(job)
        return job

    def _ensure_embeddings(self) -> EmbeddingContext:
        if self._embeddings is None:
            self._embeddings = EmbeddingContext(self.model, self.options)
            use_loras(self._embeddings.pointer, list(self._loras.values()))
        return self._embeddings


def _require_classifier(path: Path) -> None:
    """Without one llama.cpp gives the first number of a vector for a score."""
    if not any(tensor.name.startswith("cls") for tensor in header.read(path).tensors):
        raise ModelUnsupported(path, "it has no classifier (tensors named cls), so that its scores would mean nothing")


def _deadline(request: GenerateRequest) -> float | None:
    if request.deadline is None:
        return None
    left = (request.deadline - clock.now()).total_seconds()
    if left <= 0:
        raise StepFailure(FailureReason.TIMEOUT, "the deadline was over before the request came")
    return perf_counter() + left


def _wait(job: EmbeddingJob, timeout: float | None) -> Any:
    try:
        return job.future.result(timeout)
    except FutureTimeout:
        job.cancel()
        raise


__all__ = ["CancelledError", "LlamaEngine"]
