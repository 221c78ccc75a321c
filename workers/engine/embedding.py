"""
Embeddings and reranking: texts become vectors or scores, many in one decode.

A text is computed whole in one micro-batch: pooling over two of them would lose the first. So the context, the batch
and the micro-batch have the same size; a longer text is cut into windows, cut short or refused, as the request says.
Vectors have length 1. The context is made at the first use, and belongs to the engine's thread.
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
from workers.engine import native
from workers.engine.llama import POOLING, Batch, LlamaModel, cores, flash_attention
from workers.engine.metrics import Meter
from workers.engine.options import EngineOptions

#: Texts in one decode at the most.
_TEXTS = 64

_POOLING = {name: int(number) for number, name in POOLING.items()}

Vector = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Window:
    """A part of a text that is computed at once."""

    text: int
    tokens: tuple[int, ...]


def windows(texts: Sequence[Sequence[int]], size: int, policy: LongText) -> list[Window]:
    """
    Cut texts into windows of at most `size` tokens; windows of a text differ by one token in length at the most.

    Raises StepFailure when a text is longer and the policy is to refuse it.
    """
    found = []
    for index, tokens in enumerate(texts):
        if len(tokens) <= size:
            found.append(Window(index, tuple(tokens)))
        elif policy is LongText.TRUNCATE:
            found.append(Window(index, tuple(tokens[:size])))
        elif policy is LongText.REFUSE:
            message = f"text {index} has {len(tokens)} tokens; {size} can be embedded at once"
            raise StepFailure(FailureReason.CONTEXT_EXCEEDED, message)
        else:
            count = -(-len(tokens) // size)
            edges = [len(tokens) * part // count for part in range(count + 1)]
            found += [Window(index, tuple(tokens[a:b])) for a, b in itertools.pairwise(edges)]
    return found


def pooled(parts: Sequence[Window], vectors: Sequence[Vector], texts: int) -> list[Vector]:
    """One vector of length 1 for each text: the mean of its windows, weighted by their tokens."""
    sums: list[Any] = [0.0] * texts
    for part, vector in zip(parts, vectors, strict=True):
        sums[part.text] = sums[part.text] + _unit(vector) * len(part.tokens)
    return [_unit(np.asarray(total, np.float32)) for total in sums]


def context_params(options: EngineOptions, trained: int) -> Any:
    """What llama.cpp is told of this context, for a model that was trained with so many tokens."""
    params = api.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = min(options.embedding_context, trained)
    params.n_seq_max, params.kv_unified, params.embeddings = _TEXTS, True, True
    params.n_threads = params.n_threads_batch = options.threads_batch or options.threads or cores()
    params.flash_attn_type = flash_attention(options)
    params.no_perf = True
    params.pooling_type = _POOLING.get(options.pooling or "", -1)
    return params


def make_context(model: Any, params: Any) -> Any:
    """llama.cpp's context, or None. A model that names no pooling takes the mean."""
    pointer = api.llama_init_from_model(model, params)
    if pointer and api.llama_pooling_type(pointer) <= 0:
        api.llama_free(pointer)
        params.pooling_type = _POOLING["mean"]
        pointer = api.llama_init_from_model(model, params)
    return pointer


class EmbeddingContext:
    """A context of the model that gives vectors."""

    def __init__(self, model: LlamaModel, options: EngineOptions) -> None:
        """Raises StepFailure when llama.cpp makes no such context."""
        self._model = model
        params = context_params(options, model.n_context_trained)
        self.size: int = params.n_ctx
        self.pointer: Any = None
        with native.lines() as lines:
            self.pointer = make_context(model.pointer, params)
            if not self.pointer:
                why = "; ".join(lines()[:1]) or "llama.cpp gave no reason"
                raise StepFailure(FailureReason.ENGINE_ERROR, f"no context for embeddings could be made: {why}")
        self.ranks = api.llama_pooling_type(self.pointer) == _POOLING["rank"]
        self.size = min(self.size, api.llama_n_ctx(self.pointer), api.llama_n_ubatch(self.pointer))
        self._width: int = api.llama_model_n_cls_out(model.pointer) if self.ranks else model.n_embd
        self._memory = api.llama_get_memory(self.pointer)
        self._batch = Batch(self.size, _TEXTS)

    def close(self) -> None:
        """Free it."""
        if self.pointer:
            api.llama_free(self.pointer)
            self.pointer = None

    def compute(self, parts: Sequence[Window]) -> list[Vector]:
        """The pooled vectors of windows that fit one decode together. Raises StepFailure."""
        at = 0
        for sequence, part in enumerate(parts):
            self._batch.put(at, sequence, 0, part.tokens)
            at += len(part.tokens)
        self._batch.wanted[:at] = 1
        batch = self._batch.of(at)
        if self._memory:
            api.llama_memory_clear(self._memory, False)
        encodes = api.llama_model_has_encoder(self._model.pointer) and not self._model.decodes
        code = (api.llama_encode if encodes else native.decode)(self.pointer, batch)
        if code:
            raise StepFailure(FailureReason.ENGINE_ERROR, f"the texts could not be computed (llama.cpp gave {code})")
        found = []
        for sequence in range(len(parts)):
            pointer = api.llama_get_embeddings_seq(self.pointer, sequence)
            if not pointer:
                raise StepFailure(FailureReason.ENGINE_ERROR, "llama.cpp gave no vector")
            found.append(
                np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (self._width,)).copy()
            )
        return found

    def next_group(self, parts: Sequence[Window], start: int, budget: int) -> int:
        """The end of the group that begins at `start`: windows of about `budget` tokens, at least one."""
        end, tokens = start, 0
        while end < len(parts) and end - start < _TEXTS:
            tokens += len(parts[end].tokens)
            if tokens > self.size or (end > start and tokens > budget):
                break
            end += 1
        return end


class EmbeddingJob:
    """One request for vectors, computed a group of texts at a time between the engine's steps."""

    def __init__(
        self, texts: Sequence[Sequence[int]], policy: LongText, meter: Meter, budget: int,
        ensure: Callable[[], EmbeddingContext], ended: Callable[[], StepFailure | None],
    ) -> None:  # fmt: skip
        self.future: Future[list[Vector]] = Future()
        self._texts, self._policy, self._meter, self._budget = texts, policy, meter, budget
        self._ensure, self._ended = ensure, ended
        self._parts: list[Window] | None = None
        self._vectors: list[Vector] = []
        self._taken = self._cancelled = False
        self.begun = perf_counter()

    def cancel(self) -> None:
        """Leave the work before the next decode. From any thread, any number of times."""
        self._cancelled = True
        self.future.cancel()

    def __call__(self, watched: bool) -> bool:
        """Compute the next group; say whether there is more."""
        if self._taken and self._cancelled:
            self.future.set_exception(CancelledError())
            return False
        if not self._taken and not self.future.set_running_or_notify_cancel():
            return False
        self._taken = True
        if (ended := self._ended()) is not None:
            self.future.set_exception(ended)
            return False
        try:
            context = self._ensure()
            if self._parts is None:
                self._parts = windows(self._texts, context.size, self._policy)
            start = len(self._vectors)
            end = context.next_group(self._parts, start, self._budget if watched else context.size)
            group = self._parts[start:end]
            if group:
                self._vectors += context.compute(group)
                self._meter.embedded_tokens += sum(len(part.tokens) for part in group)
            if len(self._vectors) < len(self._parts):
                return True
        except StepFailure as failure:
            self.future.set_exception(failure)
            return False
        self._meter.embedded_texts += len(self._texts)
        if context.ranks:
            self.future.set_result(self._vectors)
        else:
            self.future.set_result(pooled(self._parts, self._vectors, len(self._texts)))
        return False

    def total(self) -> timedelta:
        """Time since it was asked for."""
        return timedelta(seconds=perf_counter() - self.begun)


def _unit(vector: Vector) -> Vector:
    norm = float(np.linalg.norm(vector))
    return vector if norm == 0 else (vector / norm).astype(np.float32)
