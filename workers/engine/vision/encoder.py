"""
The image encoder: one thread that encodes images for the engine's loop, so that texts go on meanwhile.

Encoded images are kept, the last used longest, up to a number of bytes: several texts about one image, and a text that
is computed again, encode it once. A job that no text waits for any more is not begun.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from time import perf_counter

import structlog

from app.kernel.errors import FailureReason, StepFailure
from workers.engine.tasks import EngineTask
from workers.engine.vision.image_spans import Embeddings, ImageChunk
from workers.engine.vision.projector import Projector

_LOG = structlog.get_logger(__name__)

#: Bytes of embeddings that are kept: an image of 256 cells for a model of width 4096 has 4 MiB.
_KEPT_BYTES = 64 * 2**20
#: Seconds after which an image that is still being encoded counts as stalled.
_LONGEST = 600.0


class ImageJob:
    """The encoding of one chunk. Only the encoder changes it."""

    def __init__(self, chunk: ImageChunk) -> None:
        self.chunk = chunk
        #: The tasks that wait for it.
        self.tasks: list[EngineTask] = []
        self.result: Embeddings | None = None
        self.failure: StepFailure | None = None

    @property
    def done(self) -> bool:
        """Whether it has ended, in one way or the other."""
        return self.result is not None or self.failure is not None


class ImageEncoder:
    """The thread and what it has encoded."""

    def __init__(self, projector: Projector, notify: Callable[[], None]) -> None:
        """`notify` is called after each job, on the encoder's thread."""
        self.projector, self._notify = projector, notify
        self._kept: OrderedDict[str, ImageJob] = OrderedDict()
        self._waiting: dict[str, ImageJob] = {}
        self._active: ImageJob | None = None
        self._began = 0.0
        self._condition = threading.Condition()
        self._stopping = False
        #: Chunks that were encoded, and the seconds that it took.
        self.encoded, self.seconds = 0, 0.0
        self._thread = threading.Thread(target=self._run, name="engine-images", daemon=True)
        self._thread.start()

    def job(self, chunk: ImageChunk, task: EngineTask) -> ImageJob:
        """Return the job of a chunk for a task, which is queued unless it is known. From the loop's thread."""
        with self._condition:
            if (kept := self._kept.get(chunk.key)) is not None:
                self._kept.move_to_end(chunk.key)
                return kept
            active = self._active if self._active is not None and self._active.chunk.key == chunk.key else None
            found = active or self._waiting.get(chunk.key)
            if found is None:
                found = self._waiting[chunk.key] = ImageJob(chunk)
                self._condition.notify()
            if task not in found.tasks:
                found.tasks.append(task)
            return found

    def is_working(self) -> bool:
        """Whether an image is being encoded, and has not taken too long."""
        return self._active is not None and perf_counter() - self._began < _LONGEST

    def close(self) -> None:
        """End the thread after the image that is being encoded, and free the projector."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        self._thread.join()
        self.projector.close()

    def _run(self) -> None:
        while (job := self._next()) is not None:
            try:
                job.result = self.projector.encode(job.chunk)
            except StepFailure as failure:
                job.failure = failure
            except Exception as error:  # noqa: BLE001 (the outermost shell of the thread)
                _LOG.exception("image_encoding_failed")
                job.failure = StepFailure(FailureReason.ENGINE_ERROR, f"the image could not be encoded: {error}")
            with self._condition:
                self._active = None
                self.encoded += 1
                self.seconds += perf_counter() - self._began
                job.tasks.clear()
                if job.failure is None:
                    self._keep(job)
            self._notify()

    def _next(self) -> ImageJob | None:
        """Return the next job, when there is one: the best class first, then the oldest. None at the end."""
        with self._condition:
            while True:
                for key in [key for key, job in self._waiting.items() if not any(map(_waits, job.tasks))]:
                    del self._waiting[key]
                if self._stopping:
                    return None
                if self._waiting:
                    break
                self._condition.wait()
            key = min(self._waiting, key=lambda one: min((t.rank, t.order) for t in self._waiting[one].tasks))
            self._active, self._began = self._waiting.pop(key), perf_counter()
            return self._active

    def _keep(self, job: ImageJob) -> None:
        self._kept[job.chunk.key] = job
        size = sum(one.result.nbytes for one in self._kept.values() if one.result is not None)
        while size > _KEPT_BYTES and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            size -= 0 if dropped.result is None else dropped.result.nbytes


def _waits(task: EngineTask) -> bool:
    return task.work is not None and not task.cancelled and not task.future.done()
