"""
Tasks: one text under way each, and the ticket that its asker holds.

A task goes waiting → running → done; it may be parked in between, and runs again. Only the engine's thread changes it.
A ticket can be used from any thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from datetime import timedelta
from time import perf_counter

import numpy as np
import numpy.typing as npt
import structlog

from app.inference import answers
from app.inference.requests import RANKS, FinishReason, Generated, GenerateRequest, TokenLogprob
from app.kernel.errors import FailureReason, StepFailure
from workers.engine import calls
from workers.engine.batch import INTERACTIVE, BatchWork
from workers.engine.calls import Style, ToolCallWatch
from workers.engine.grammars import Form
from workers.engine.lazy import Lazy
from workers.engine.sampling import Chooser
from workers.engine.text import TextStream

_LOG = structlog.get_logger(__name__)

OnText = Callable[[str], None]


class EngineTask:
    """One text under way."""

    __slots__ = (
        "_on_text", "awaits", "cached", "cancelled", "chooser", "computed", "deadline", "faults", "first_at", "form",
        "future", "id", "lazy", "limit", "logprobs", "order", "parked_at", "prompt", "rank", "request", "seed", "state",
        "stream", "submitted", "tokens", "unshared", "work", "written",
    )  # fmt: skip

    def __init__(
        self, number: int, request: GenerateRequest, prompt: tuple[int, ...], stop: Sequence[str], form: Form | None,
        seed: int, deadline: float | None, on_text: OnText | None, watch: ToolCallWatch | None = None,
        lazy: Lazy | None = None,
    ) -> None:  # fmt: skip
        #: Rises with each task: also its age among the waiting.
        self.id = self.order = number
        self.request, self.prompt, self.form, self.seed = request, prompt, form, seed
        #: The form binds only what begins a call.
        self.lazy = lazy
        self.rank = RANKS[request.priority]
        #: Cells that it holds at the most.
        self.limit = len(prompt) + request.max_tokens
        self.tokens = list(prompt)
        #: The first so many of `tokens` are in the KV cache, or in `state`.
        self.computed = 0
        self.written = 0
        #: Of the prompt's tokens, those that were taken over.
        self.cached = 0
        self.stream = TextStream(stop, watch)
        self._on_text = on_text
        self.future: Future[Generated] = Future()
        self.submitted = perf_counter()
        self.first_at = 0.0
        #: On the clock of perf_counter.
        self.deadline = deadline
        self.cancelled = False
        self.work: BatchWork | None = None
        self.chooser: Chooser | None = None
        self.logprobs: list[TokenLogprob] = []
        #: The state of its sequence while it is parked.
        self.state: npt.NDArray[np.uint8] | None = None
        #: Tokens that were computed when it was parked the last time.
        self.parked_at: int | None = None
        #: The task that computes a prefix of this one, and the tokens that are worth waiting for.
        self.awaits: tuple[EngineTask, int] | None = None
        #: A prefix could not be taken over: it is computed.
        self.unshared = False
        #: Faults of the engine that it lived through.
        self.faults = 0

    @property
    def progress(self) -> int:
        """Tokens computed and written."""
        return self.computed + self.written

    @property
    def watched(self) -> bool:
        """Whether somebody waits for each token: whoever reads along, and every interactive asker."""
        return self._on_text is not None or self.rank == INTERACTIVE

    def show(self, text: str) -> None:
        """Hand a piece of text to the reader. A reader that fails harms nobody else."""
        if text and self._on_text is not None:
            try:
                self._on_text(text)
            except Exception:  # noqa: BLE001 (foreign code: its outermost shell is here)
                _LOG.exception("text_reader_failed", task_id=self.id)
                self._on_text = None

    def finish(self, reason: FinishReason) -> None:
        """The text is complete."""
        self.show(self.stream.finish())
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
                logprobs=tuple(self.logprobs),
                seed=self.seed,
            )
        )

    def fail(self, error: BaseException) -> None:
        """The text ends without a result; a StepFailure keeps what was written."""
        if isinstance(error, StepFailure) and error.text is None and self.written:
            error = StepFailure(error.reason, error.message, text=self.stream.text + self.stream.calls)
        self._end(error)

    def _end(self, outcome: Generated | BaseException) -> None:
        if self.chooser is not None:
            self.chooser.close()
            self.chooser = None
        self.state = None
        if self.future.done():
            return
        if isinstance(outcome, BaseException):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)


class LlamaTicket:
    """What the asker of one or several texts holds."""

    def __init__(self, tasks: Sequence[EngineTask], wake: Callable[[], None], style: Style | None) -> None:
        """`style` is that of the calls that may stand in the texts."""
        self._tasks, self._wake, self._style = tuple(tasks), wake, style
        self._lock = threading.Lock()
        self._checked: Generated | None = None

    def result(self, timeout: float | None = None) -> Generated:
        """As the protocol says. A text that does not conform to its schema is a StepFailure that keeps it."""
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

    def cancel(self) -> None:
        """As the protocol says."""
        for task in self._tasks:
            task.cancelled = True
        self._wake()

    def done(self) -> bool:
        """Whether `result` would not wait."""
        return all(task.future.done() for task in self._tasks)

    def on_done(self, call: Callable[[], None]) -> None:
        """Call once when it is done, on the engine's thread: it must return at once."""
        left = [len(self._tasks)]

        def one(_: Future[Generated]) -> None:
            left[0] -= 1
            if not left[0]:
                call()

        for task in self._tasks:
            task.future.add_done_callback(one)

    def _check(self, task: EngineTask, text: Generated) -> Generated:
        if task.form is not None and task.form.schema is not None:
            if text.finish is FinishReason.LENGTH:
                message = f"the text was cut at max_tokens ({task.request.max_tokens}) before its JSON was complete"
                _still_valid(task.form, text.text, message)
            else:
                task.form.check(text.text)
        written = task.stream.calls
        if self._style is None or not written:
            return text
        whole = text.text + written
        try:
            asked = calls.read(written, self._style)
        except ValueError as error:
            cut = f"was cut at max_tokens ({task.request.max_tokens}) inside a call of a tool"
            why = cut if text.finish is FinishReason.LENGTH else f"holds what is no call of a tool: {error}"
            raise StepFailure(FailureReason.INVALID_OUTPUT, f"the text {why}", text=whole) from None
        answers.require_calls(asked, task.request, whole)
        return replace(text, tool_calls=asked)


def _still_valid(form: Form, text: str, message: str) -> None:
    try:
        form.check(text)
    except StepFailure:
        raise StepFailure(FailureReason.INVALID_OUTPUT, message, text=text) from None


__all__ = ["CancelledError", "EngineTask", "LlamaTicket", "OnText"]
