"""
Embedding and reranking: computing vectors or scores of texts, many in one decode.

A text must be computed in one micro-batch, because pooling over two would lose the first. So the context, the batch and
the micro-batch have the same size. A longer text is split into windows, truncated or rejected, as the request says.
Vectors have length 1. The context is created at the first use and belongs to the engine's thread.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from datetime import timedelta
from time import perf_counter
from typing import Any

import llama_cpp as api
import numpy as np
import numpy.typing as npt

from app.inference.requests import LongText
from app.kernel.errors import FailureReason, StepFailure
from workers.engine.bindings import native
from workers.engine.bindings.llama import (
    POOLING,
    LlamaModel,
    decode_threads,
    flash_attention,
    thread_counts,
)
from workers.engine.bindings.timing import timed_decode
from workers.engine.bindings.token_batch import Batch
from workers.engine.metrics import Meter
from workers.engine.options import EngineOptions
from workers.engine.threads import DecodeKind

#: Most texts in one decode.
_MAX_TEXTS = 64

_POOLING = {name: int(number) for number, name in POOLING.items()}

Vector = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Window:
    """A part of a text that is computed as a whole."""

    text: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TextEnds:
    """The special tokens with which the model expects each text to begin and to end, such as [CLS] and [SEP]."""

    opening: tuple[int, ...] = ()
    closing: tuple[int, ...] = ()

    @staticmethod
    def of(model: LlamaModel) -> TextEnds:
        """Return those that the vocabulary adds to a text."""
        whole = model.tokenize("a", add_special=True, parse_special=False)
        inner = model.tokenize("a", add_special=False, parse_special=False)
        for at in range(len(whole) - len(inner) + 1):
            if inner and whole[at : at + len(inner)] == inner:
                return TextEnds(tuple(whole[:at]), tuple(whole[at + len(inner) :]))
        return TextEnds()


def split_into_windows(
    texts: Sequence[Sequence[int]], size: int, policy: LongText, ends: TextEnds = TextEnds()
) -> list[Window]:
    """
    Split texts into windows of at most `size` tokens. The windows of one text differ in length by at most one token.

    Each window of a long text has its own `ends`, as if it were a text.

    Raises StepFailure when a text is longer and the policy is REFUSE.
    """
    found = []
    room = max(1, size - len(ends.opening) - len(ends.closing))
    for index, tokens in enumerate(texts):
        if len(tokens) <= size:
            found.append(Window(index, tuple(tokens)))
            continue
        if policy is LongText.REFUSE:
            message = f"text {index} has {len(tokens)} tokens; at most {size} are accepted"
            raise StepFailure(FailureReason.CONTEXT_EXCEEDED, message)
        inner = tuple(tokens[len(ends.opening) : len(tokens) - len(ends.closing)])
        count = 1 if policy is LongText.TRUNCATE else -(-len(inner) // room)
        edges = [0, room] if policy is LongText.TRUNCATE else [len(inner) * part // count for part in range(count + 1)]
        found += [Window(index, (*ends.opening, *inner[a:b], *ends.closing)) for a, b in itertools.pairwise(edges)]
    return found


def average_windows(parts: Sequence[Window], vectors: Sequence[Vector], texts: int) -> list[Vector]:
    """Return one vector of length 1 for each text: the mean of its windows, weighted by their tokens."""
    sums: list[Any] = [0.0] * texts
    for part, vector in zip(parts, vectors, strict=True):
        sums[part.text] = sums[part.text] + _unit(vector) * len(part.tokens)
    return [_unit(np.asarray(total, np.float32)) for total in sums]


def context_params(options: EngineOptions, trained: int) -> Any:
    """Return llama.cpp's parameters of the embedding context. `trained` is the model's trained context in tokens."""
    params = api.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = min(options.embedding_context, trained)
    params.n_seq_max, params.kv_unified, params.embeddings = _MAX_TEXTS, True, True
    params.n_threads = params.n_threads_batch = thread_counts(options)[1]
    params.flash_attn_type = flash_attention(options)
    params.no_perf = True
    params.pooling_type = _POOLING.get(options.pooling or "", -1)
    return params


def make_context(model: Any, params: Any) -> Any:
    """Return a llama.cpp context, or None. A model whose file names no pooling uses the mean."""
    pointer = api.llama_init_from_model(model, params)
    if pointer and api.llama_pooling_type(pointer) <= 0:
        api.llama_free(pointer)
        params.pooling_type = _POOLING["mean"]
        pointer = api.llama_init_from_model(model, params)
    return pointer


class EmbeddingContext:
    """A context of the model that computes vectors or scores."""

    def __init__(self, model: LlamaModel, options: EngineOptions) -> None:
        """Raises StepFailure when llama.cpp cannot create the context."""
        self._model = model
        params = context_params(options, model.n_context_trained)
        self.size: int = params.n_ctx
        self.pointer: Any = None
        with native.captured_log() as lines:
            self.pointer = make_context(model.pointer, params)
            if not self.pointer:
                why = "; ".join(lines()[:1]) or "llama.cpp gave no reason"
                raise StepFailure(FailureReason.ENGINE_ERROR, f"the embedding context cannot be created: {why}")
        self.is_reranker = api.llama_pooling_type(self.pointer) == _POOLING["rank"]
        self.size = min(self.size, api.llama_n_ctx(self.pointer), api.llama_n_ubatch(self.pointer))
        self._width: int = api.llama_model_n_cls_out(model.pointer) if self.is_reranker else model.n_embd
        self._memory = api.llama_get_memory(self.pointer)
        self._batch = Batch(self.size, _MAX_TEXTS)
        self.ends = TextEnds.of(model)
        #: How many CPU threads compute a decode.
        self.threads = decode_threads(options)

    def close(self) -> None:
        """Free the context."""
        if self.pointer:
            api.llama_free(self.pointer)
            self.pointer = None

    def compute(self, parts: Sequence[Window]) -> list[Vector]:
        """Return the pooled vectors of windows that together fit one decode. Raises StepFailure when it fails."""
        at = 0
        for sequence, part in enumerate(parts):
            self._batch.put(at, sequence, 0, part.tokens)
            at += len(part.tokens)
        self._batch.outputs[:at] = 1
        batch = self._batch.view(at)
        if self._memory:
            api.llama_memory_clear(self._memory, False)
        encodes = api.llama_model_has_encoder(self._model.pointer) and not self._model.has_decoder
        compute = api.llama_encode if encodes else native.decode
        code = timed_decode(self, DecodeKind.PROMPTS, at, lambda: compute(self.pointer, batch))
        if code:
            raise StepFailure(FailureReason.ENGINE_ERROR, f"the texts cannot be computed: llama.cpp returned {code}")
        found = []
        for sequence in range(len(parts)):
            pointer = api.llama_get_embeddings_seq(self.pointer, sequence)
            if not pointer:
                raise StepFailure(FailureReason.ENGINE_ERROR, "llama.cpp returned no vector for a text")
            found.append(
                np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (self._width,)).copy()
            )
        return found

    def next_group(self, parts: Sequence[Window], start: int, budget: int) -> int:
        """Return the end of the group that begins at `start`: windows of up to `budget` tokens, at least one."""
        end, tokens = start, 0
        while end < len(parts) and end - start < _MAX_TEXTS:
            tokens += len(parts[end].tokens)
            if tokens > self.size or (end > start and tokens > budget):
                break
            end += 1
        return end


class EmbeddingJob:
    """One request for vectors or scores, computed group by group between the engine's decodes."""

    def __init__(
        self, texts: Sequence[Sequence[int]], policy: LongText, meter: Meter, budget: int,
        ensure: Callable[[], EmbeddingContext], end_failure: Callable[[], StepFailure | None],
    ) -> None:  # fmt: skip
        self.future: Future[list[Vector]] = Future()
        self._texts, self._policy, self._meter, self._budget = texts, policy, meter, budget
        self._ensure, self._end_failure = ensure, end_failure
        self._parts: list[Window] | None = None
        self._vectors: list[Vector] = []
        self._started = self._cancelled = False
        self.started_at = perf_counter()
        #: Tokens that were computed.
        self.tokens = 0

    def cancel(self) -> None:
        """Stop before the next decode. Safe from any thread, any number of times."""
        self._cancelled = True
        self.future.cancel()

    def __call__(self, busy: bool) -> bool:
        """Compute the next group. Returns whether more is left."""
        if self._started and self._cancelled:
            self.future.set_exception(CancelledError())
            return False
        if not self._started and not self.future.set_running_or_notify_cancel():
            return False
        self._started = True
        if (end_failure := self._end_failure()) is not None:
            self.future.set_exception(end_failure)
            return False
        try:
            context = self._ensure()
            if self._parts is None:
                self._parts = split_into_windows(self._texts, context.size, self._policy, context.ends)
            start = len(self._vectors)
            end = context.next_group(self._parts, start, self._budget if busy else context.size)
            group = self._parts[start:end]
            if group:
                self._vectors += context.compute(group)
                self.tokens += sum(len(part.tokens) for part in group)
                self._meter.embedded_tokens += sum(len(part.tokens) for part in group)
            if len(self._vectors) < len(self._parts):
                return True
        except StepFailure as failure:
            self.future.set_exception(failure)
            return False
        self._meter.embedded_texts += len(self._texts)
        if context.is_reranker:
            self.future.set_result(self._vectors)
        else:
            self.future.set_result(average_windows(self._parts, self._vectors, len(self._texts)))
        return False

    def elapsed(self) -> timedelta:
        """Time since the request."""
        return timedelta(seconds=perf_counter() - self.started_at)


def _unit(vector: Vector) -> Vector:
    norm = float(np.linalg.norm(vector))
    return vector if norm == 0 else (vector / norm).astype(np.float32)
