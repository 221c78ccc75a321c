"""
Tasks and tickets: a task is one text that is being generated; a ticket is the caller's handle on one or several tasks.

A task goes waiting → running → done. A running task may be parked (its KV state moves to host memory) and resumed.
Only the engine's thread changes a task. A ticket can be used from any thread.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from datetime import timedelta
from time import perf_counter

import numpy as np
import numpy.typing as npt
import structlog

from app.catalog.profiles.family import ToolCallStyle
from app.inference import answers
from app.inference.requests import RANKS, FinishReason, Generated, GenerateRequest, TextPiece, TokenLogprob
from app.kernel.errors import FailureReason, StepFailure
from workers.engine import OnPiece
from workers.engine.batch import INTERACTIVE, BatchWork
from workers.engine.bindings.llama import LlamaModel
from workers.engine.chat import call_forms
from workers.engine.chat.calls import ToolCallDetector
from workers.engine.chat.lazy_grammar import LazyGrammar
from workers.engine.chat.thinking import AnswerSplitter
from workers.engine.sampling.constraint import FirstByteIndex
from workers.engine.sampling.grammars import CompiledGrammar
from workers.engine.sampling.sampler import TokenSampler
from workers.engine.speculation.draft import DraftState
from workers.engine.text import TextStream
from workers.engine.vision import image_spans
from workers.engine.vision.image_spans import ImageSpan

_LOG = structlog.get_logger(__name__)


class EngineTask:
    """One text that is being generated."""

    __slots__ = (
        "_classified",
        "_on_piece",
        "_passed",
        "_scanner",
        "awaited_prefix",
        "cached",
        "cancelled",
        "computed",
        "deadline",
        "draft",
        "faults",
        "first_at",
        "future",
        "grammar",
        "id",
        "images",
        "index",
        "is_overflowed",
        "lazy_grammar",
        "limit",
        "logprobs",
        "order",
        "parked_at",
        "prompt",
        "rank",
        "reasoning_tokens",
        "request",
        "sampler",
        "seed",
        "sharing_failed",
        "state",
        "stream",
        "submitted",
        "tokens",
        "work",
        "written",
    )  # fmt: skip

    def __init__(
        self, task_id: int, request: GenerateRequest, prompt: tuple[int, ...], stop: Sequence[str],
        grammar: CompiledGrammar | None, seed: int, deadline: float | None, on_piece: OnPiece | None,
        detector: ToolCallDetector | None = None, lazy_grammar: LazyGrammar | None = None, index: int = 0,
        splitter: AnswerSplitter | None = None,
        images: tuple[ImageSpan, ...] = (),
    ) -> None:  # fmt: skip
        #: The places of images in the prompt.
        self.images = images
        #: Which text of the request it is.
        self.index = index
        #: Rises with each task, so it is also the order of submission.
        self.id = self.order = task_id
        self.request, self.prompt, self.grammar, self.seed = request, prompt, grammar, seed
        #: Set when the grammar constrains the text only from the first tool call on.
        self.lazy_grammar = lazy_grammar
        self.rank = RANKS[request.priority]
        #: The most KV cells that it can use.
        self.limit = len(prompt) + request.max_tokens
        self.tokens = list(prompt)
        #: How many of `tokens`, from the first on, are in the KV cache or in `state`.
        self.computed = 0
        self.written = 0
        #: Prompt tokens that were reused from another sequence.
        self.cached = 0
        self.stream = TextStream(stop, detector, splitter)
        #: Tokens of the thinking, and tokens that are known to be of it or not.
        self.reasoning_tokens = self._classified = 0
        self._on_piece = on_piece
        #: Log-probabilities that were passed to the reader.
        self._passed = 0
        self._scanner = call_forms.scanner(detector.style, request.tools) if detector and on_piece else None
        self.future: Future[Generated] = Future()
        self.submitted = perf_counter()
        self.first_at = 0.0
        #: On the clock of perf_counter.
        self.deadline = deadline
        self.cancelled = False
        self.work: BatchWork | None = None
        self.sampler: TokenSampler | None = None
        self.logprobs: list[TokenLogprob] = []
        #: The KV state of its sequence while it is parked.
        self.state: npt.NDArray[np.uint8] | None = None
        #: It is parked, and its state is in the store of prefixes.
        self.is_overflowed = False
        #: Its progress when it was parked last.
        self.parked_at: int | None = None
        #: The task that computes a prefix of this one, and the length of that prefix in tokens.
        self.awaited_prefix: tuple[EngineTask, int] | None = None
        #: A prefix could not be reused, so all tokens are computed.
        self.sharing_failed = False
        #: Faults of the engine that it survived.
        self.faults = 0
        #: The prediction of its next tokens; None until the first, and when there are none.
        self.draft: DraftState | None = None

    @property
    def pending_image(self) -> ImageSpan | None:
        """The image that is to be computed next; None while text is."""
        return image_spans.span_at(self.images, self.computed)

    @property
    def position(self) -> int:
        """The position in the sequence of its next text token."""
        return image_spans.next_position(self.images, self.computed) if self.images else self.computed

    @property
    def progress(self) -> int:
        """Tokens computed plus tokens written."""
        return self.computed + self.written

    @property
    def latency_sensitive(self) -> bool:
        """Whether each token is awaited: the text is streamed, or the request is interactive."""
        return self._on_piece is not None or self.rank == INTERACTIVE

    def write(self, piece: bytes) -> None:
        """Add the bytes of the token that was written last, and pass what they decide to the reader."""
        stream = self.stream
        thought = stream.is_thinking
        text = stream.feed(piece)
        if thought or stream.is_thinking:
            # What was undecided until now was the opening tag.
            self.reasoning_tokens += self.written - self._classified
            del self.logprobs[self.written - self.reasoning_tokens :]
            self._classified = self.written
        elif not stream.is_undecided:
            self._classified = self.written
        self.emit(text)

    def emit(self, text: str) -> None:
        """
        Pass new text, thinking, new parts of tool calls, and their log-probabilities to the reader.

        A reader that raises is not called again; the text continues.
        """
        if self._on_piece is None:
            return
        try:
            parts = () if self._scanner is None else self._scanner.feed(self.stream.calls)
            reasoning = self.stream.take_reasoning()
            logprobs: tuple[TokenLogprob, ...] = ()
            if text or parts:  # log-probabilities wait for their text
                logprobs = tuple(self.logprobs[self._passed : self.written - self.reasoning_tokens])
                self._passed += len(logprobs)
            if text or parts or reasoning:
                self._on_piece(TextPiece(text, self.index, logprobs, parts, reasoning))
        except Exception:  # noqa: BLE001 (the reader is foreign code, and its errors end here)
            _LOG.exception("text_reader_failed", task_id=self.id)
            self._on_piece = None

    def finish(self, reason: FinishReason) -> None:
        """Set the result: the text is complete."""
        self.emit(self.stream.finish())
        now = perf_counter()
        self._end(
            Generated(
                text=self.stream.text,
                finish=reason,
                tokens_in=len(self.prompt),
                tokens_out=self.written,
                tokens_cached=self.cached,
                time_to_first=timedelta(seconds=(self.first_at or now) - self.submitted),
                time_total=timedelta(seconds=now - self.submitted),
                # The token that ended the text is not part of it.
                logprobs=tuple(self.logprobs[: self.written - self.reasoning_tokens]),
                seed=self.seed,
                reasoning=self.stream.reasoning,
                reasoning_tokens=self.reasoning_tokens,
                tokens_drafted=0 if self.draft is None else self.draft.drafted,
                tokens_accepted=0 if self.draft is None else self.draft.accepted,
            )
        )

    def fail(self, error: BaseException) -> None:
        """End the text without a result. A StepFailure keeps the text written so far."""
        if isinstance(error, StepFailure) and error.text is None and self.written:
            error = StepFailure(error.reason, error.message, text=self.stream.text + self.stream.calls)
        self._end(error)

    def _end(self, outcome: Generated | BaseException) -> None:
        if self.sampler is not None:
            self.sampler.close()
            self.sampler = None
        self.state = None
        if self.future.done():
            return
        if isinstance(outcome, BaseException):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)


def ended_tasks(tasks: Sequence[EngineTask], now: float) -> tuple[list[tuple[EngineTask, BaseException]], float]:
    """Return the tasks that were cancelled or whose deadline has passed, with the error, and the next deadline."""
    ended: list[tuple[EngineTask, BaseException]] = []
    next_deadline = float("inf")
    for task in tasks:
        if task.cancelled:
            ended.append((task, CancelledError()))
        elif task.deadline is not None and now >= task.deadline:
            late = "the deadline passed before the text was complete"
            ended.append((task, StepFailure(FailureReason.TIMEOUT, late)))
        elif task.deadline is not None:
            next_deadline = min(next_deadline, task.deadline)
    return ended, next_deadline


def new_sampler(model: LlamaModel, task: EngineTask, byte_index: FirstByteIndex, context: int) -> TokenSampler:
    """Return the sampler of a task; the entries of images are no tokens for it."""
    grammar = task.grammar.new_sampler() if task.grammar is not None and task.lazy_grammar is None else None
    return TokenSampler(
        model,
        task.request.sampling,
        task.seed,
        task.prompt if not task.images else tuple(token for token in task.prompt if token >= 0),
        grammar=grammar,
        lazy=task.lazy_grammar,
        byte_index=byte_index,
        context=context,
    )


class LlamaTicket:
    """The caller's handle on a request, which has one or several tasks."""

    def __init__(self, tasks: Sequence[EngineTask], wake: Callable[[], None], style: ToolCallStyle | None) -> None:
        """`style` is the style of tool calls in the texts; None when the request has no tools."""
        self._tasks, self._wake, self._style = tuple(tasks), wake, style
        self._lock = threading.Lock()
        self._checked: Generated | None = None

    def result(self, timeout: float | None = None) -> Generated:
        """See the protocol. A text that does not conform to its schema raises a StepFailure that keeps the text."""
        until = None if timeout is None else perf_counter() + timeout
        texts = []
        for task in self._tasks:
            left = None if until is None else max(0.0, until - perf_counter())
            texts.append(task.future.result(left))
        with self._lock:
            if self._checked is None:
                texts = [self._check(task, text) for task, text in zip(self._tasks, texts, strict=True)]
                self._checked = replace(texts[0], alternatives=tuple(texts[1:]))
            return self._checked

    def written(self) -> int:
        """See the protocol."""
        return sum(task.written for task in self._tasks)

    def cancel(self) -> None:
        """See the protocol."""
        for task in self._tasks:
            task.cancelled = True
        self._wake()

    def when_done(self, action: Callable[[], None]) -> None:
        """See the protocol."""
        left = itertools.count(len(self._tasks) - 1, -1)

        def ended(_: Future[Generated]) -> None:
            if not next(left):
                action()

        for task in self._tasks:
            task.future.add_done_callback(ended)

    def done(self) -> bool:
        """Whether `result` would return at once."""
        return all(task.future.done() for task in self._tasks)

    def _check(self, task: EngineTask, text: Generated) -> Generated:
        cut_is_kept = task.request.keeps_cut and text.finish is FinishReason.LENGTH
        if task.grammar is not None and task.grammar.schema is not None and not cut_is_kept:
            try:
                task.grammar.check(text.text)
            except StepFailure:
                if text.finish is FinishReason.LENGTH:
                    raise answers.cut(task.request, text.text) from None
                raise
        written = task.stream.calls
        if self._style is None or not written:
            return text
        whole = text.text + written
        # Whoever takes what there is gets what is no call, or one that does not conform, as text.
        text_is_kept = cut_is_kept or (task.request.keeps_cut and task.request.tool_choice == "auto")
        try:
            tool_calls = call_forms.parse(written, self._style, task.request.tools)
        except ValueError as error:
            if text_is_kept:
                return replace(text, text=whole)
            cut = f"was cut at max_tokens ({task.request.max_tokens}) inside a tool call"
            why = cut if text.finish is FinishReason.LENGTH else f"contains an invalid tool call: {error}"
            raise StepFailure(FailureReason.INVALID_OUTPUT, f"the text {why}", text=whole) from None
        try:
            answers.require_calls(tool_calls, task.request, whole)
        except StepFailure:
            if text_is_kept:
                return replace(text, text=whole)
            raise
        return replace(text, tool_calls=tool_calls)


__all__ = ["CancelledError", "EngineTask", "LlamaTicket", "ended_tasks", "new_sampler"]
