"""
The llama.cpp engine: one GGUF model in this process, serving many requests at once.

It implements the protocol of `workers.engine`.
Requests are checked and tokenised on the caller's thread; the loop's thread does the rest.
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
from app.catalog.profiles.family import ToolCallStyle
from app.grammar import to_gbnf
from app.inference.recommended import applied
from app.inference.requests import (
    Embedded,
    EmbedRequest,
    GenerateRequest,
    LongText,
    PriorityClass,
    Reranked,
    RerankRequest,
)
from app.kernel import clock, ids
from app.kernel.errors import FailureReason, ModelUnsupported, NotFound, StepFailure
from workers.engine import OnPiece, OnStop, OnText, pieces_to, require_images, vectors
from workers.engine.bindings.llama import LlamaModel, load_loras, use_loras
from workers.engine.chat import tools
from workers.engine.chat.calls import ToolCallDetector, as_bytes
from workers.engine.chat.lazy_grammar import LazyGrammar
from workers.engine.chat.templates import ChatTemplate, Prompt
from workers.engine.chat.truncation import truncated
from workers.engine.embedding import EmbeddingContext, EmbeddingJob
from workers.engine.kv_store.opening import identity, open_store
from workers.engine.loop import EngineLoop
from workers.engine.metrics import EngineMetrics
from workers.engine.options import EngineOptions, Rope
from workers.engine.sampling import sampler
from workers.engine.sampling.grammars import CompiledGrammar, GrammarCache, ToGbnf
from workers.engine.speculation import draft_model
from workers.engine.tasks import EngineTask, LlamaTicket
from workers.engine.vision.encoder import ImageEncoder
from workers.engine.vision.image_steps import ImageSteps
from workers.engine.vision.projector import Projector

_LOG = structlog.get_logger(__name__)

#: Limits: texts for one prompt, log-probabilities for one token.
_MAX_TEXTS, _MAX_LOGPROBS = 16, 20


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
        Load the model. `on_progress` is called with the progress, from 0 to 1.

        Raises ModelFileMissing, ModelFileDamaged, ModelUnsupported or MemoryNotEnough.
        """
        self.options = options or EngineOptions()
        self.slots = self.options.slots
        started_at = perf_counter()
        self.model = LlamaModel(path, self.options, on_progress)
        with ExitStack() as undo:
            undo.callback(self.model.close)
            #: Whether the model scores documents; such a model computes no vectors.
            self.is_reranker = (self.options.pooling or self.model.pooling) == "rank"
            if self.is_reranker:
                _require_classifier(path)
            self._template = ChatTemplate(self.model, self.options.profile)
            self._grammars = GrammarCache(self.model, schema_to_gbnf)
            self._store = open_store(self.model, self.options)
            undo.callback(lambda: None if self._store is None else self._store.close())
            self._loop = EngineLoop(self.model, self.options, self._store)
            undo.callback(self._loop.context.close)
            if self.options.draft is not None:
                drafts = draft_model.open_drafts(self.model, self.options, self.options.draft)
                undo.callback(drafts.close)
                self._loop.speculator.model_drafts = drafts
            self._images: ImageEncoder | None = None
            if self.options.projector is not None:
                projector = Projector(self.options.projector, self.model, self.options)
                self._images = ImageEncoder(projector, self._loop.wake)
                undo.callback(self._images.close)
                self._loop.images = ImageSteps(self._images)
            self._loras = load_loras(self.model)
            self._loop.use_loras(list(self._loras.values()))
            undo.pop_all()
        #: Whether the model can write text. A model without a KV cache or a state only embeds or ranks whole texts.
        self.generates_text = self._loop.context.writes_text
        self._embeddings: EmbeddingContext | None = None
        self._task_ids = itertools.count(1)
        self._active_calls = 0
        self._closed = False
        self._condition = threading.Condition()
        self._loop.start()
        _LOG.info(
            "engine_loaded",
            model=path.name,
            slots=self.slots,
            context=self._loop.context.n_context,
            layout="streams" if self.options.streams else "unified",
            seconds=round(perf_counter() - started_at, 3),
        )

    @property
    def context_limit(self) -> int:
        """Tokens of prompt and output together that one request may have."""
        most, trained = self._loop.context.n_sequence, self.model.n_context_trained
        return min(most, trained) if trained and self.options.rope == Rope() else most

    @property
    def window(self) -> int:
        """See the protocol."""
        return min(self.options.context // self.options.slots, self.context_limit)

    @property
    def counts_exactly(self) -> bool:
        """See the protocol."""
        return True

    def count(self, request: GenerateRequest) -> int:
        """See the protocol."""
        with self._in_use():
            return len(self._prompt(request).tokens)

    def count_texts(self, texts: Sequence[str]) -> list[int]:
        """See the protocol."""
        with self._in_use():
            return [len(self.model.tokenize(text, add_special=False, parse_special=False)) for text in texts]

    def generate(
        self, request: GenerateRequest, on_text: OnText | None = None, on_piece: OnPiece | None = None
    ) -> LlamaTicket:
        """See the protocol."""
        with self._in_use():
            return self._generate(request, pieces_to(on_text, on_piece))

    def _generate(self, request: GenerateRequest, on_piece: OnPiece | None) -> LlamaTicket:
        self._check(request)
        deadline = _deadline(request)
        prompt = self._prompt(request)
        room = self.context_limit - (1 if request.fits_context else request.max_tokens)
        if request.truncates and request.messages and len(prompt.tokens) > room:
            request = truncated(request, lambda shorter: len(self._prompt(shorter).tokens), room)
            prompt = self._prompt(request)
        if not prompt.tokens:
            raise StepFailure(FailureReason.INVALID_REQUEST, "the prompt is empty")
        if request.fits_context:
            share = min(self.options.context // self.options.slots, self.context_limit)
            whole = share if len(prompt.tokens) < share else self.context_limit
            request = replace(request, max_tokens=max(1, min(request.max_tokens, whole - len(prompt.tokens))))
        needed = len(prompt.tokens) + request.max_tokens
        if needed > self.context_limit:
            raise StepFailure(
                FailureReason.CONTEXT_EXCEEDED,
                f"the prompt has {len(prompt.tokens)} tokens and max_tokens is {request.max_tokens}; together they "
                f"exceed the context of {self.context_limit} tokens",
            )
        grammar, style = self._output_grammar(request), self._tool_style(request)
        if grammar is not None:
            self._loop.byte_index.prepare()
        recommended = self._template.profile.sampling(thinks=not prompt.is_unthinking)
        request = replace(request, sampling=applied(request.sampling, recommended))
        seed = request.sampling.seed if request.sampling.seed is not None else ids.new_id().int & 0xFFFFFFFF
        stop = (*request.stop, *prompt.stop)
        tasks = [
            EngineTask(
                next(self._task_ids),
                request,
                prompt.tokens,
                stop,
                grammar,
                (seed + index) & 0xFFFFFFFF,
                deadline,
                on_piece,
                *self._call_detection(request, grammar, style, prompt.thinking),
                index=index,
                splitter=self._template.splitter(prompt.thinking),
                images=prompt.images,
            )
            for index in range(request.n)
        ]
        self._loop.submit(tasks)
        return LlamaTicket(tasks, self._loop.wake, style)

    def _prompt(self, request: GenerateRequest) -> Prompt:
        """Raises StepFailure, which names the image when the model reads none."""
        require_images(self, request)
        return self._template.prompt(request, None if self._images is None else self._images.projector.prepare)

    def embed(self, request: EmbedRequest, timeout: float | None = None, on_stop: OnStop | None = None) -> Embedded:
        """See the protocol."""
        profile = self.options.profile
        with self._in_use():
            if self.is_reranker:
                message = f"{self.model.path.name} is a reranking model; it cannot embed texts"
                raise StepFailure(FailureReason.INVALID_REQUEST, message)
            vectors.require_dimensions(request.dimensions, self.model.n_embd)
            texts = vectors.with_prefixes(request, profile.query_prefix, profile.document_prefix)
            tokens = [self.model.tokenize(text, add_special=True, parse_special=False) for text in texts]
        if not all(tokens):
            raise StepFailure(FailureReason.INVALID_REQUEST, f"text {tokens.index([])} is empty")
        job = self._start_embedding(tokens, request.long_text, request.priority)
        if on_stop is not None:
            on_stop(job.cancel)
        found = _wait(job, timeout)
        return Embedded(vectors.normalised(found, request.dimensions), job.tokens, job.elapsed())

    def rerank(self, request: RerankRequest, timeout: float | None = None, on_stop: OnStop | None = None) -> Reranked:
        """See the protocol. Needs a reranking model."""
        with self._in_use():
            if not self.is_reranker:
                message = f"{self.model.path.name} is not a reranking model; if it is one, set its pooling to 'rank'"
                raise StepFailure(FailureReason.INVALID_REQUEST, message)
            tokens = [self._template.rerank_prompt(request.query, document) for document in request.documents]
        job = self._start_embedding(tokens, LongText.REFUSE, request.priority)
        if on_stop is not None:
            on_stop(job.cancel)
        scores = _wait(job, timeout)
        return Reranked(tuple(float(score[0]) for score in scores), sum(map(len, tokens)), job.elapsed())

    def use_loras(self, scales: Mapping[str, float], timeout: float | None = None) -> None:
        """
        Set the scales of the LoRA adapters; adapters that are not named are disabled. Running requests finish first.

        Raises NotFound for an adapter that was not loaded, TimeoutError when it takes longer; the change is then made
        later. Kept prefixes are dropped because they were computed with other adapters.
        """
        for name in scales:
            if name not in self._loras:
                raise NotFound("adapter", name, sorted(self._loras))
        self._loras = {name: (pointer, scales.get(name, 0.0)) for name, (pointer, _) in self._loras.items()}
        done: Future[None] = Future()

        def swap(busy: bool) -> bool:
            if (end_failure := self._loop.end_failure) is not None:
                done.set_exception(end_failure)
                return False
            if busy:
                return True
            self._loop.use_loras(list(self._loras.values()))
            if self._store is not None:
                self._store.switch(identity(self.model.path, self.options, scales))
            if self._embeddings is not None:
                use_loras(self._embeddings.pointer, list(self._loras.values()))
            done.set_result(None)
            return False

        self._loop.submit_paused_job(swap)
        done.result(timeout)

    def use_threads(self, count: int) -> None:
        """Use at most `count` CPU threads from the next decode on, so that the host's other pools have cores too."""

        def change(_: bool) -> bool:
            self._loop.use_threads(count)
            if self._embeddings is not None:
                self._embeddings.threads.limit(count)
            return False

        self._loop.submit_job(change)

    @property
    def calls_tools(self) -> bool:
        """See the protocol."""
        return self._template.tools is not None

    @property
    def reads_images(self) -> bool:
        """See the protocol."""
        return self._images is not None

    @property
    def encoded_images(self) -> int:
        """How many images, or parts of images, were encoded."""
        return 0 if self._images is None else self._images.encoded

    def stalled_for(self) -> timedelta:
        """See the protocol. An engine that gave up counts as stalled since its last decode."""
        return timedelta(seconds=self._loop.stalled_seconds())

    def metrics(self) -> EngineMetrics:
        """Return the counts and the current state."""
        return replace(self._loop.metrics(), grammar_compiled=self._grammars.misses)

    def close(self) -> None:
        """See the protocol. Waits for the running decode. A second call does nothing."""
        with self._condition:
            first, self._closed = not self._closed, True
            self._condition.wait_for(lambda: not self._active_calls)
        if not first:
            return
        started_at = perf_counter()
        self._loop.stop()
        if self._images is not None:
            self._images.close()
        if self._embeddings is not None:
            self._embeddings.close()
        self._grammars.close()
        self.model.close()
        _LOG.info("engine_closed", model=self.model.path.name, seconds=round(perf_counter() - started_at, 3))

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """Prevent the model from being freed inside the block. Raises StepFailure when the engine is closed."""
        with self._condition:
            if self._closed:
                raise StepFailure(FailureReason.WORKER_STOPPED, "the engine is closed")
            self._active_calls += 1
        try:
            yield
        finally:
            with self._condition:
                self._active_calls -= 1
                self._condition.notify_all()

    def _check(self, request: GenerateRequest) -> None:
        """Raises StepFailure for a request that can never be served."""
        problems = sampler.problems(request.sampling, self.model.n_vocab)
        if (request.prompt is None) == (not request.messages):
            problems.append("exactly one of messages and prompt is required")
        if request.max_tokens < 1:
            problems.append(f"max_tokens is {request.max_tokens}; it must be at least 1")
        if not 1 <= request.n <= _MAX_TEXTS:
            problems.append(f"n is {request.n}; it must be from 1 to {_MAX_TEXTS}")
        if request.logprobs is not None and not 0 <= request.logprobs <= _MAX_LOGPROBS:
            problems.append(f"logprobs is {request.logprobs}; it must be from 0 to {_MAX_LOGPROBS}")
        if sum((request.schema is not None, request.grammar is not None, bool(request.tools))) > 1:
            problems.append("more than one of schema, grammar and tools is set; at most one is accepted")
        if request.tool_choice != "auto" and not request.tools:
            problems.append("tool_choice is set, but the request has no tools")
        if not self.generates_text:
            problems.append(f"{self.model.path.name} cannot generate text; it embeds or ranks texts")
        if problems:
            raise StepFailure(FailureReason.INVALID_REQUEST, "; ".join(problems))

    def _output_grammar(self, request: GenerateRequest) -> CompiledGrammar | None:
        if request.schema is not None:
            return self._grammars.for_schema(request.schema)
        if request.grammar is not None:
            return self._grammars.for_gbnf(request.grammar)
        if request.tools and request.tool_choice != "none":
            return tools.compile_tools(self._grammars, request, self._template.tools)
        return None

    def _tool_style(self, request: GenerateRequest) -> ToolCallStyle | None:
        return self._template.tools if request.tools and request.tool_choice != "none" else None

    def _call_detection(
        self,
        request: GenerateRequest,
        grammar: CompiledGrammar | None,
        style: ToolCallStyle | None,
        thinking: bool | None,
    ) -> tuple[ToolCallDetector | None, LazyGrammar | None]:
        """Return the detector of calls for one text, and its lazy grammar if free text or thinking may come first."""
        if grammar is None:
            return None, None
        detector = None if style is None else ToolCallDetector(style)
        splitter, free = self._template.splitter(thinking, as_bytes), None
        if style is not None and detector is not None and request.tool_choice == "auto":
            if detector.feed(request.prefill) != request.prefill:
                message = "the prefill begins a tool call; to force a call, set tool_choice to 'required'"
                raise StepFailure(FailureReason.INVALID_REQUEST, message)
            free = ToolCallDetector(style, is_encoded=True)
            free.feed(as_bytes(request.prefill))
        elif not thinking:
            return detector, None
        return detector, LazyGrammar(self.model, self._loop.byte_index, grammar, free, splitter)

    def _start_embedding(
        self, tokens: Sequence[Sequence[int]], policy: LongText, priority: PriorityClass
    ) -> EmbeddingJob:
        if not self.options.vectors:
            message = (
                f"{self.model.path.name} was loaded without an embedding context; "
                "its catalogue entry needs the use case embed or rerank"
            )
            raise StepFailure(FailureReason.INVALID_REQUEST, message)
        loop = self._loop
        job = EmbeddingJob(
            tokens, policy, loop.meter, self.options.batch, self._ensure_embeddings, lambda: loop.end_failure
        )
        loop.submit_job(job, priority)
        return job

    def _ensure_embeddings(self) -> EmbeddingContext:
        if self._embeddings is None:
            self._embeddings = EmbeddingContext(self.model, self._loop.options)
            use_loras(self._embeddings.pointer, list(self._loras.values()))
        return self._embeddings


def _require_classifier(path: Path) -> None:
    """
    Raises ModelUnsupported when the file has no classifier.

    Without one llama.cpp returns the first number of a vector as the score.
    """
    if not any(tensor.name.startswith("cls") for tensor in header.read(path).tensors):
        raise ModelUnsupported(path, "it has no classifier (tensors named cls), so its scores would be meaningless")


def _deadline(request: GenerateRequest) -> float | None:
    if request.deadline is None:
        return None
    left = (request.deadline - clock.now()).total_seconds()
    if left <= 0:
        raise StepFailure(FailureReason.TIMEOUT, "the deadline had passed before the request was submitted")
    return perf_counter() + left


def _wait(job: EmbeddingJob, timeout: float | None) -> Any:
    try:
        return job.future.result(timeout)
    except FutureTimeout:
        job.cancel()
        raise


__all__ = ["CancelledError", "LlamaEngine"]
