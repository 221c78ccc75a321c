"""
Image steps: the part of the engine's loop that computes images, one decode of one image beside a decode of texts.

A text whose next part is an image waits until that is encoded; all others go on. The embeddings of an image whose cells
attend only backwards are split like a prompt, so that a large image does not hold up the texts of others.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

from app.kernel.errors import StepFailure
from workers.engine import batch
from workers.engine.batch import BatchWork, Chunk, StepPace, prefill_tokens
from workers.engine.bindings.llama import Context
from workers.engine.slots import Slots
from workers.engine.tasks import EngineTask
from workers.engine.vision import image_spans
from workers.engine.vision.encoder import ImageEncoder, ImageJob
from workers.engine.vision.image_spans import ImageSpan


@dataclass(frozen=True, slots=True)
class ImageDecode:
    """A decode of (a part of) an image: what was computed, llama.cpp's code, and the seconds that it took."""

    chunk: Chunk
    code: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ImagePlan:
    """What the next iteration does."""

    #: Running tasks whose next part is text.
    texts: list[BatchWork]
    #: The task whose image is computed, with its encoding.
    due: tuple[EngineTask, ImageSpan, ImageJob] | None
    #: Tasks whose image could not be encoded.
    failed: list[tuple[EngineTask, StepFailure]]


class ImageSteps:
    """The images of the running tasks. Belongs to the loop's thread."""

    def __init__(self, encoder: ImageEncoder) -> None:
        self.encoder = encoder
        self._jobs: dict[int, ImageJob] = {}

    def plan(self, slots: Slots) -> ImagePlan:
        """Queue what is to be encoded, and return what can be computed now."""
        texts: list[BatchWork] = []
        due: list[tuple[EngineTask, ImageSpan, ImageJob]] = []
        failed: list[tuple[EngineTask, StepFailure]] = []
        for task in slots.running.values():
            work = task.work
            assert work is not None, "it is running"
            if not task.images or task.computed >= task.images[-1].end:
                work.adjacent = batch.MAX_TOKENS
                texts.append(work)
                continue
            span = task.pending_image
            if span is None:
                work.adjacent = image_spans.until_span(task.images, task.computed) or batch.MAX_TOKENS
                texts.append(work)
                continue
            job = self._job(task, span)
            if job.failure is not None:
                failed.append((task, job.failure))
            elif job.done:
                due.append((task, span, job))
        self._jobs = {id_: job for id_, job in self._jobs.items() if any(id_ == t.id for t in slots.running.values())}
        return ImagePlan(texts, _first(due, texts), failed)

    def decode(self, plan: ImagePlan, context: Context, pace: StepPace) -> ImageDecode | None:
        """Compute the image that is due, or a part of it; None when none is."""
        if plan.due is None:
            return None
        task, span, job = plan.due
        work, chunk, rows = task.work, span.chunk, job.result
        assert work is not None, "it is running"
        assert rows is not None, "it is encoded"
        offset = task.computed - span.start
        count = chunk.cells - offset
        if not chunk.non_causal:
            texts = [other for other in plan.texts if other.decoding]
            count = min(count, context.n_batch, prefill_tokens(texts, [work], context.n_batch, pace))
        first = image_spans.next_position(task.images, span.start)
        grid = None if chunk.grid is None else chunk.grid[:, offset : offset + count]
        began = perf_counter()
        code = context.decode_image(
            work.sequence,
            first + (offset if grid is None else 0),
            rows[offset : offset + count],
            grid,
            not chunk.non_causal,
        )
        work.skipped = 0
        return ImageDecode(Chunk(work, count, is_last=False), code, perf_counter() - began)

    def _job(self, task: EngineTask, span: ImageSpan) -> ImageJob:
        known = self._jobs.get(task.id)
        if known is None or known.chunk.key != span.chunk.key or not known.done:
            known = self._jobs[task.id] = self.encoder.job(span.chunk, task)
        return known


def _first(
    due: list[tuple[EngineTask, ImageSpan, ImageJob]], texts: list[BatchWork]
) -> tuple[EngineTask, ImageSpan, ImageJob] | None:
    """Return the first image: of the best class, then the oldest. The class `batch` stands still as in plan_decode."""
    if not due:
        return None
    works = {task.id: task.work for task, _, _ in due if task.work is not None}
    best = min(due, key=lambda one: (works[one[0].id].skipped < batch.STARVED, works[one[0].id].rank, one[0].order))
    for work in works.values():
        work.skipped += 1
    work = works[best[0].id]
    urgent = any(other.rank == batch.INTERACTIVE for other in texts)
    return None if urgent and work.rank == batch.BATCH and work.skipped < batch.BATCH_EVERY else best
