"""
The engine loop: one thread that owns the model's context and carries out the decisions of batch.py.

A step is one decode: one token for each running text, and parts of prompts in the remaining room.
A failing request does not affect others. A failed decode is repeated chunk by chunk. After a fault of the backend the
context is rebuilt and the texts continue from their tokens. When that fails too, the engine logs it, fails all requests
and counts as stalled from then on, so that its lease expires.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError
from time import perf_counter
from typing import Any

import structlog

from app.inference.requests import FinishReason, PriorityClass
from app.kernel.errors import ArrieroError, FailureReason, StepFailure
from workers.engine import batch
from workers.engine.bindings.first_decodes import choose_threads
from workers.engine.bindings.llama import Context, LlamaModel, Logits
from workers.engine.kv_store.saving import IdleSaving
from workers.engine.kv_store.store import PrefixStore
from workers.engine.metrics import EngineMetrics, Meter
from workers.engine.options import EngineOptions
from workers.engine.prefix import Match
from workers.engine.sampling.batch_sampler import BatchSampler
from workers.engine.sampling.constraint import FirstByteIndex
from workers.engine.slots import Slots
from workers.engine.speculation.speculator import Speculator
from workers.engine.tasks import EngineTask, ended_tasks, new_sampler
from workers.engine.vision.image_steps import ImageSteps
from workers.engine.waiting import Job, Jobs, WaitingTasks

_LOG = structlog.get_logger(__name__)

#: How often one text is continued after a fault of the engine.
_MAX_RESTARTS = 2
#: Faults without a successful decode in between, after which the engine gives up.
_MAX_FAULTS = 3


class EngineLoop:
    """The engine's thread. The methods of the first section are safe from any thread, the others belong to this one."""

    def __init__(self, model: LlamaModel, options: EngineOptions, store: PrefixStore | None = None) -> None:
        """Create the context. `store` keeps evicted prefixes. Raises what `Context` raises."""
        self.model, self.options = model, options
        self.meter = Meter()
        self.context = Context(model, options)
        self._idle = IdleSaving(store)
        self.slots = Slots(self.context, options, self.meter, store)
        #: What computes images; None when the model has no projector.
        self.images: ImageSteps | None = None
        self._sampler = BatchSampler(model)
        self.speculator = Speculator(model, options, self.meter)
        #: Prepared by the thread that first requests a grammar, not by this one: a large vocabulary needs 0.5 s.
        self.byte_index = FirstByteIndex(model)
        self._waiting = WaitingTasks(options)
        self._jobs = Jobs()
        self._inbox: list[EngineTask] = []
        self._wake = threading.Condition()
        self._sweep_needed = self._stopping = False
        self._next_deadline = float("inf")
        self._faults = 0
        self._progress_at = perf_counter()
        self._busy, self._paused = False, 0
        self._adapters: Sequence[tuple[Any, float]] = ()
        #: Why the engine gave up; None while it has not.
        self.fatal_reason: str | None = None
        self._thread = threading.Thread(target=self._run, name=f"engine-{model.path.stem}", daemon=True)

    # ---- from any thread ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread."""
        self._idle.on_read(self.wake)
        self._thread.start()

    def submit(self, tasks: list[EngineTask]) -> None:
        """Queue tasks. Raises StepFailure when the queue is full or the engine has ended."""
        with self._wake:
            if (end_failure := self.end_failure) is not None:
                raise end_failure
            if len(self._inbox) + len(self._waiting) + len(tasks) > self.options.queue:
                self.meter.refused += len(tasks)
                message = f"the queue is full; it holds at most {self.options.queue} requests"
                raise StepFailure(FailureReason.ENGINE_ERROR, message)
            self.meter.submitted += len(tasks)
            self._mark_busy()
            self._inbox += tasks
            self._wake.notify()

    def submit_job(self, job: Job, priority: PriorityClass | None = None) -> None:
        """Run the job on the engine's thread, a part between decodes. Raises StepFailure when the engine has ended."""
        with self._wake:
            if (end_failure := self.end_failure) is not None:
                raise end_failure
            self._mark_busy()
            self._jobs.add(job, priority)
            self._wake.notify()

    def submit_paused_job(self, job: Job) -> None:
        """As `submit_job`, with admission paused until the job is done. Running requests continue meanwhile."""
        self._paused += 1

        def counted(busy: bool) -> bool:
            more = job(busy)
            self._paused -= not more
            return more

        self.submit_job(counted)

    def wake(self) -> None:
        """Make the loop look for cancelled tasks, and for images that were encoded."""
        self._sweep_needed = True
        with self._wake:
            self._wake.notify()

    def stop(self) -> None:
        """Fail all tasks after the running decode, and wait for the thread to end."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def stalled_seconds(self) -> float:
        """Seconds since the last decode ended while there has been work; 0 when idle."""
        return perf_counter() - self._progress_at if self._busy or self.fatal_reason is not None else 0.0

    def metrics(self) -> EngineMetrics:
        """Return the figures, at most one step old."""
        parked, parked_bytes = self._waiting.parked()
        now = self.slots.figures() | {"parked_now": parked, "parked_bytes": parked_bytes}
        return self.meter.snapshot(**now, waiting=len(self._waiting) + len(self._inbox), store=self._idle.figures())

    def use_threads(self, count: int) -> None:
        """Decode with at most `count` CPU threads from now on."""
        self.options = self.options.model_copy(update={"most_threads": count})
        self.context.threads.limit(count)
        self.speculator.limit_threads(count)

    def use_loras(self, adapters: Sequence[tuple[Any, float]]) -> None:
        """Apply these adapters, with their scales, from now on. Prefixes computed with others are dropped."""
        self._adapters = adapters
        self.slots.evict_all()
        self.context.use_loras(adapters)

    def _mark_busy(self) -> None:
        if not self._busy:
            self._progress_at = perf_counter()
            self._busy = True

    # ---- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            choose_threads(self.context, self.options.slots)
            while self._wait_for_work():
                try:
                    self._iterate()
                except Exception as error:  # noqa: BLE001 (the outermost shell of an iteration)
                    _LOG.exception("engine_iteration_failed")
                    self._recover(f"{type(error).__name__}: {error}")
            self._shut_down()
        except Exception as error:  # noqa: BLE001 (the outermost shell of the thread)
            _LOG.exception("engine_thread_failed")
            self._fail_without_context(f"{type(error).__name__}: {error}")

    def _wait_for_work(self) -> bool:
        """Block until there is work, and queue the new tasks. Returns False when the loop must end."""
        with self._wake:
            while not (self._stopping or self._inbox or self._jobs or self.slots.running or self._waiting):
                self._busy = False
                self._wake.wait(self._idle.step(self.slots))
            if self._stopping:
                return False
            new_tasks, self._inbox = self._inbox, []
        self._waiting.add(new_tasks)
        deadlines = [task.deadline for task in new_tasks if task.deadline is not None]
        self._next_deadline = min((self._next_deadline, *deadlines))
        return True

    def _iterate(self) -> None:
        """One iteration: end cancelled and late tasks, admit waiting ones, decode once."""
        now = perf_counter()
        if self._sweep_needed or now >= self._next_deadline:
            self._sweep(now)
        self._idle.poll()
        admitting = not self._paused
        if self._waiting and admitting:
            self._admit_waiting(now)
        if self._jobs:
            self._run_job()
        works = self.slots.works
        if self.images is not None and works:
            works = self._image_step(self.images)
        if works:
            self._decode_step(works, now)
        elif self._waiting and not self.slots.running and admitting and not self._jobs:
            self._rest(0.1) if self._idle.is_reading else self._fail_stuck()

    def _sweep(self, now: float) -> None:
        """End the tasks that were cancelled or whose deadline has passed."""
        self._sweep_needed = False
        ended, self._next_deadline = ended_tasks([*self.slots.running.values(), *self._waiting], now)
        for task, error in ended:
            self.meter.cancelled += isinstance(error, CancelledError)
            self.meter.timed_out += isinstance(error, StepFailure)
            self._abort(task, error)

    def _abort(self, task: EngineTask, error: BaseException) -> None:
        """End a running or waiting task without a result."""
        if task.work is not None:
            self.slots.finish(task)
        else:
            self._waiting.remove(task)
        self._record_grammar(task)
        task.fail(error)

    def _record_grammar(self, task: EngineTask) -> None:
        if (sampler := task.sampler) is not None:
            self.meter.note_grammar(sampler.grammar_seconds, sampler.grammar_masks)

    # ---- admission ------------------------------------------------------------------------------------------------

    def _admit_waiting(self, now: float) -> None:
        free = self.options.slots - len(self.slots.running)
        if free <= 0 and not self._waiting.has_interactive():
            return
        while self._waiting:
            matches: dict[int, tuple[EngineTask, Match]] = {}
            room = batch.FreeCapacity(self.options.slots - len(self.slots.running), self.slots.free_cells())
            candidates = self._waiting.candidates(now, self.slots, matches)
            action = batch.next_admission(candidates, self._waiting.victims(self.slots), room)
            if action is None:
                return
            if isinstance(action, batch.Park):
                self._park(action.id)
                continue
            task, match = matches[action.id]
            self._admit(task, match, now)

    def _park(self, task_id: int) -> None:
        task = next(task for task in self.slots.running.values() if task.id == task_id)
        self.slots.park(task, self._waiting.park_room())
        self._waiting.add([task])
        self._idle.note_parked(self._waiting)
        self.meter.parked += 1

    def _admit(self, task: EngineTask, match: Match, now: float) -> None:
        resumed = task.state is not None or task.is_overflowed
        if not self.slots.admit(task, match):
            return
        self._waiting.remove(task)
        if resumed:
            task.is_overflowed = False
            self._idle.note_parked(self._waiting)
            self.meter.resumed += 1
        elif not task.faults:
            self.meter.waited(now - task.submitted)
            self.meter.tokens_in += len(task.prompt)
        if task.sampler is None:
            task.sampler = new_sampler(self.model, task, self.byte_index, self.context.n_context)

    def _fail_stuck(self) -> None:
        """Nothing runs and no task could be admitted, which must not happen: fail the first waiting task."""
        task = next(self._waiting.in_order(perf_counter()))
        _LOG.error("engine_admission_stuck", task_id=task.id, limit=task.limit, room=self.slots.free_cells())
        self.slots.evict_all()
        self._abort(task, StepFailure(FailureReason.ENGINE_ERROR, "the engine could not admit the request"))
        self.meter.failed += 1

    def _run_job(self) -> None:
        job = self._jobs.first()
        if not job(bool(self.slots.running)):
            with self._wake:
                self._jobs.remove(job)
        self._progress_at = perf_counter()

    # ---- a decode -------------------------------------------------------------------------------------------------

    def _image_step(self, images: ImageSteps) -> list[batch.BatchWork]:
        """Compute an image, or a part of one, if one is due. Returns the works whose next part is text."""
        for task, failure in (plan := images.plan(self.slots)).failed:
            self.meter.failed += 1
            self._abort(task, failure)
        done = images.decode(plan, self.context, self.meter.pace(self.options.step_latency))
        if done is not None and done.code == 0:
            self._record_decode([done.chunk], done.seconds)
        elif done is not None:
            self._decode_failed([done.chunk], done.code)
            return []  # there may be a new context
        elif not plan.texts and not plan.failed:  # wait until an image is encoded, or something else happens
            self._progress_at = perf_counter() if images.encoder.is_working() else self._progress_at
            self._rest(1.0)
        return plan.texts

    def _rest(self, seconds: float) -> None:
        """Wait for something to do, at most so long."""
        with self._wake:
            self._wake.wait_for(lambda: self._stopping or self._inbox or self._jobs or self._sweep_needed, seconds)

    def _decode_step(self, works: list[batch.BatchWork], started_at: float) -> None:
        context, size, apart = self.context, self.context.n_batch, self.context.computes_apart
        pace, one = self.meter.pace(self.options.step_latency, context.threads.prompt_part), self.options.reproducible
        chunks = batch.plan_reproducible(works, size) if one else batch.plan_decode(works, size, pace, apart=apart)
        batch.count_skips(works, chunks)
        self.meter.bookkeeping_seconds += perf_counter() - started_at
        for part in batch.decodes_of(chunks, apart=apart):
            if not self._decode_part(part):
                return

    def _decode_part(self, chunks: list[batch.Chunk]) -> bool:
        """Decode the chunks together, and sample. Returns whether all went well."""
        began = perf_counter()
        self.speculator.plan(chunks, self.slots.running)
        code = self._decode(chunks)
        if code == 1 and self.slots.index.kept:
            # By the accounting there are free cells. Kept prefixes are evicted before any request fails.
            _LOG.error("engine_cells_missing", used=self.slots.cells.used, cells=self.slots.cells.capacity)
            self.slots.evict_all()
            code = self._decode(chunks)
        if code in (-1, 1) and len(chunks) + self.speculator.drafted > 1:
            self._decode_separately(chunks)
            return False
        if code:
            self._decode_failed(chunks, code)
            return False
        last = [chunk for chunk in chunks if chunk.is_last]
        logits = self.context.logits(len(last) + self.speculator.drafted) if last else None
        done = perf_counter()
        self.speculator.decoded(chunks, done - began)
        self._record_decode(chunks, done - began)
        if logits is not None:
            self._sample(last, logits)
        self.meter.sampling_seconds += perf_counter() - done
        return True

    def _decode(self, chunks: list[batch.Chunk]) -> int:
        return self.context.decode(self.speculator.pieces(chunks, self.slots.running))

    def _record_decode(self, chunks: list[batch.Chunk], seconds: float) -> None:
        """Record a successful decode."""
        self._faults = 0
        self._progress_at = perf_counter()
        written = total = 0
        for chunk in chunks:
            total += chunk.count
            written += chunk.is_text
            self.slots.advance(self.slots.running[chunk.work.sequence], chunk.count)
        self.meter.decoded(seconds, total - written, written)

    def _sample(self, last: list[batch.Chunk], logits: Logits) -> None:
        """Sample the next token of each text whose last known token was decoded."""
        for tasks, rows in self.speculator.rounds(last, self.slots, logits):
            for task, token in self._sampler.sample(tasks, rows):
                if isinstance(token, StepFailure):
                    self.meter.failed += 1
                    self._abort(task, token)
                else:
                    self._append(task, token)

    def _append(self, task: EngineTask, token: int) -> None:
        """Append the token to the text, or end the text."""
        if not task.written:
            task.first_at = perf_counter()
        if token in self.model.end_tokens and not task.request.sampling.ignore_end:
            self._finish(task, FinishReason.STOP)
            return
        task.written += 1
        self.meter.tokens_out += 1
        task.write(self.model.piece(token))
        if task.stream.stopped:
            self._finish(task, FinishReason.STOP)
        elif task.written >= task.request.max_tokens:
            self._finish(task, FinishReason.LENGTH)
        else:
            task.tokens.append(token)
            work = task.work
            assert work is not None
            work.remaining, work.decoding = 1, True

    def _finish(self, task: EngineTask, reason: FinishReason) -> None:
        self.slots.finish(task)
        self._record_grammar(task)
        self.meter.finished += 1
        task.finish(reason)

    # ---- faults ---------------------------------------------------------------------------------------------------

    def _decode_separately(self, chunks: list[batch.Chunk]) -> None:
        """Decode each chunk alone, so that only the bad one fails."""
        self.speculator.drop()
        for chunk in chunks:
            code = self._decode([chunk])
            if code:
                self._decode_failed([chunk], code)
                if code not in (-1, 1):
                    return
                continue
            logits = self.context.logits(1) if chunk.is_last else None
            self._record_decode([chunk], 0.0)
            if logits is not None:
                self._sample([chunk], logits)

    def _decode_failed(self, chunks: list[batch.Chunk], code: int) -> None:
        _LOG.error("engine_decode_failed", code=code, tokens=sum(chunk.count for chunk in chunks), chunks=len(chunks))
        if code not in (-1, 1):
            self._recover(f"llama_decode returned {code}")
            return
        reason = "no free KV cells were left" if code == 1 else "llama.cpp rejected the batch"
        for chunk in chunks:
            task = self.slots.running[chunk.work.sequence]
            self.slots.discard([task])
            self._record_grammar(task)
            self.meter.failed += 1
            task.fail(StepFailure(FailureReason.ENGINE_ERROR, f"the text could not be computed: {reason}"))

    def _recover(self, reason: str) -> None:
        """Rebuild the context. Texts continue from their tokens, unless they have already survived too many faults."""
        self._faults += 1
        tasks = list(self.slots.running.values())
        self.slots.discard(tasks)
        for task in tasks:
            task.faults, task.computed = task.faults + 1, 0
            if task.faults > _MAX_RESTARTS:
                self._record_grammar(task)
                self.meter.failed += 1
                task.fail(StepFailure(FailureReason.ENGINE_ERROR, f"the engine failed {task.faults} times: {reason}"))
            else:
                self._waiting.add([task])
        if self._faults >= _MAX_FAULTS:
            self._give_up(reason)
            return
        try:
            threads = self.context.threads
            self.context.close()
            self.context = Context(self.model, self.options)
            self.context.threads = threads  # chosen by measurement, and limited
            self.slots = Slots(self.context, self.options, self.meter, self._idle.store)
            self.context.use_loras(self._adapters)
            self.speculator.rebuild()
        except (ArrieroError, OSError, MemoryError):
            _LOG.exception("engine_context_lost")
            self._give_up(f"{reason}; no new context could be created")
            return
        self.meter.rebuilt += 1
        _LOG.warning("engine_context_rebuilt", reason=reason, tasks=len(tasks))

    def _give_up(self, reason: str) -> None:
        _LOG.error("engine_gave_up", reason=reason)
        with self._wake:
            self.fatal_reason = reason
            self._stopping = True
        self._fail_all()

    def _fail_all(self) -> None:
        """Fail all running, waiting and new tasks with the reason."""
        with self._wake:
            tasks, self._inbox = [*self.slots.running.values(), *self._waiting, *self._inbox], []
        self._idle.ended = self.slots.end(self._waiting) if self.fatal_reason is None else ()
        self.slots.discard(list(self.slots.running.values()))
        self._waiting.clear()
        end_failure = self.end_failure or CancelledError()
        for task in tasks:
            self.meter.cancelled += task.cancelled
            self.meter.failed += not task.cancelled
            task.fail(CancelledError() if task.cancelled else end_failure)

    def _fail_without_context(self, reason: str) -> None:
        """As `_fail_all`, without touching the context. The engine counts as stalled, so its agent ends the pool."""
        with self._wake:
            self.fatal_reason, self._stopping = reason, True
            tasks = [*self.slots.running.values(), *self._waiting, *self._inbox]
        for task in tasks:
            task.fail(self.end_failure or CancelledError())
        for job in self._jobs:
            job(True)

    def _shut_down(self) -> None:
        self._fail_all()
        for job in self._jobs:
            job(True)
        self._jobs.clear()
        self._busy = False
        self._idle.close(self.slots if self.fatal_reason is None else None)
        self.context.close()
        self.speculator.close()

    @property
    def end_failure(self) -> StepFailure | None:
        """The failure of all further requests once the engine has ended; None while it runs."""
        if self.fatal_reason is not None:
            return StepFailure(FailureReason.ENGINE_ERROR, f"the engine has given up: {self.fatal_reason}")
        return StepFailure(FailureReason.WORKER_STOPPED, "the engine is closed") if self._stopping else None
