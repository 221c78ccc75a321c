"""
The loop: one thread that owns the model's context and does what batch.py decides.

A step is one decode: a token for each text under way, and parts of prompts in the room that is left.
A request that fails takes no other with it: a decode that fails is repeated piece by piece, and after a fault of the
backend the context is made again and the texts go on from their tokens. When that does not help either, the engine
says so, ends everything, and counts as stalled from then on, so that its lease runs out.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from time import perf_counter
from typing import Any

import structlog

from app.inference.requests import FinishReason
from app.kernel.errors import ArrieroError, FailureReason, StepFailure
from workers.engine import batch
from workers.engine.constraint import Alphabet
from workers.engine.llama import Context, LlamaModel, Logits
from workers.engine.metrics import EngineMetrics, Meter
from workers.engine.options import EngineOptions
from workers.engine.prefix import Match
from workers.engine.rows import Rows
from workers.engine.sampling import Chooser
from workers.engine.slots import Slots
from workers.engine.tasks import EngineTask
from workers.engine.waiting import WaitingTasks

_LOG = structlog.get_logger(__name__)

#: Times that a text goes on after a fault of the engine.
_LIVES = 2
#: Faults with no decode in between, after which the engine gives up.
_FAULTS = 3
#: Prompt tokens in a step at the least, however slow the machine.
_LEAST_PREFILL = 16
#: Does a piece of other work on the engine's thread, and says whether there is more.
Job = Callable[[bool], bool]


class EngineLoop:
    """The engine's thread. All but `submit`, `do`, `wake`, `stop` and the figures belongs to that thread."""

    def __init__(self, model: LlamaModel, options: EngineOptions) -> None:
        """Makes the context; raises what `Context` raises."""
        self.model, self.options = model, options
        self.meter = Meter()
        self.context = Context(model, options)
        self.slots = Slots(self.context, options, self.meter)
        self._rows = Rows(model)
        #: Prepared by whoever first asks for a grammar, off this thread: a large vocabulary takes half a second.
        self.alphabet = Alphabet(model)
        self._waiting = WaitingTasks(options)
        self._jobs: deque[Job] = deque()
        self._inbox: list[EngineTask] = []
        self._wake = threading.Condition()
        self._attention = False
        self._stopping = False
        self._next_deadline = float("inf")
        self._faults = 0
        self._progress_at = perf_counter()
        self._busy = False
        self._paused = 0
        self._adapters: Sequence[tuple[Any, float]] = ()
        #: Cores to compute on, where that was changed.
        self._threads: int | None = None
        #: Why the engine gave up, if it did.
        self.broken: str | None = None
        self._thread = threading.Thread(target=self._run, name=f"engine-{model.path.stem}", daemon=True)

    # ---- from any thread ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def submit(self, tasks: list[EngineTask]) -> None:
        """Take tasks. Raises StepFailure when too many wait, or when the engine has ended."""
        with self._wake:
            if (ended := self.ended) is not None:
                raise ended
            if len(self._inbox) + len(self._waiting) + len(tasks) > self.options.queue:
                self.meter.refused += len(tasks)
                raise StepFailure(FailureReason.ENGINE_ERROR, f"{self.options.queue} requests wait already")
            self.meter.submitted += len(tasks)
            self._note_busy()
            self._inbox += tasks
            self._wake.notify()

    def do(self, job: Job) -> None:
        """Run the job's pieces on the engine's thread, one between two steps."""
        with self._wake:
            if (ended := self.ended) is not None:
                raise ended
            self._note_busy()
            self._jobs.append(job)
            self._wake.notify()

    def pause_for(self, job: Job) -> None:
        """Run the job between requests: nobody comes in until it says that there is no more."""
        self._paused += 1

        def counted(watched: bool) -> bool:
            more = job(watched)
            self._paused -= not more
            return more

        self.do(counted)

    def wake(self) -> None:
        """Something was cancelled: look."""
        self._attention = True
        with self._wake:
            self._wake.notify()

    def stop(self) -> None:
        """End everything, after the decode under way, and wait for the thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def stalled_seconds(self) -> float:
        """How long there has been work and no decode has ended."""
        return perf_counter() - self._progress_at if self._busy or self.broken is not None else 0.0

    def metrics(self) -> EngineMetrics:
        """The figures, at most one step old."""
        waiting = list(self._waiting)
        states = [state for task in waiting if (state := task.state) is not None]
        return self.meter.snapshot(
            slots=self.options.slots,
            running=len(self.slots.running),
            waiting=len(waiting) + len(self._inbox),
            parked_now=len(states),
            parked_bytes=sum(map(len, states)),
            cells=self.context.n_context,
            cells_used=self.slots.cells.used,
            prefixes_kept=len(self.slots.index.kept),
        )

    def use_threads(self, count: int) -> None:
        """Compute on so many cores from now on."""
        self._threads = count
        self.context.use_threads(count)

    def use_loras(self, adapters: Sequence[tuple[Any, float]]) -> None:
        """Let these adapters work from now on. What was computed with others is dropped."""
        self._adapters = adapters
        self.slots.evict_all()
        self.context.use_loras(adapters)

    def _note_busy(self) -> None:
        if not self._busy:
            self._progress_at = perf_counter()
            self._busy = True

    # ---- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._rest():
                try:
                    self._turn()
                except Exception as error:  # noqa: BLE001 (the outermost shell of a turn)
                    _LOG.exception("engine_turn_failed")
                    self._recover(f"{type(error).__name__}: {error}")
            self._end()
        except Exception as error:  # noqa: BLE001 (the outermost shell of the thread)
            _LOG.exception("engine_thread_failed")
            self._fail_without_context(f"{type(error).__name__}: {error}")

    def _rest(self) -> bool:
        """Sleep until there is work; take what came. False when it is time to end."""
        with self._wake:
            while not (self._stopping or self._inbox or self._jobs or self.slots.running or self._waiting):
                self._busy = False
                self._wake.wait()
            if self._stopping:
                return False
            arrived, self._inbox = self._inbox, []
        self._waiting.add(arrived)
        for task in arrived:
            if task.deadline is not None:
                self._next_deadline = min(self._next_deadline, task.deadline)
        return True

    def _turn(self) -> None:
        """One step: who leaves, who comes, one decode."""
        now = perf_counter()
        if self._attention or now >= self._next_deadline:
            self._sweep(now)
        open_to_all = not self._paused
        if self._waiting and open_to_all:
            self._admit(now)
        if self._jobs:
            self._job()
        works = self.slots.works
        if works:
            self._step(works, now)
        elif self._waiting and open_to_all and not self._jobs:
            self._unblock()

    def _sweep(self, now: float) -> None:
        """End what was cancelled or is too late."""
        self._attention, self._next_deadline = False, float("inf")
        for task in [*self.slots.running.values(), *self._waiting]:
            if task.cancelled:
                self.meter.cancelled += 1
                self._close(task, CancelledError())
            elif task.deadline is not None:
                if now >= task.deadline:
                    self.meter.timed_out += 1
                    self._close(
                        task, StepFailure(FailureReason.TIMEOUT, "the deadline came before the text was complete")
                    )
                else:
                    self._next_deadline = min(self._next_deadline, task.deadline)

    def _close(self, task: EngineTask, error: BaseException) -> None:
        """The task ends without a result, wherever it is."""
        if task.work is not None:
            self.slots.leave(task)
        else:
            self._waiting.remove(task)
        self._collect(task)
        task.fail(error)

    def _collect(self, task: EngineTask) -> None:
        if task.chooser is not None:
            self.meter.grammar_seconds += task.chooser.grammar_seconds
            self.meter.grammar_masks += task.chooser.grammar_masks

    # ---- who comes in ---------------------------------------------------------------------------------------------

    def _admit(self, now: float) -> None:
        free = self.options.slots - len(self.slots.running)
        if free <= 0 and not self._waiting.urgent():
            return
        while self._waiting:
            seen: dict[int, tuple[EngineTask, Match]] = {}
            room = batch.BatchRoom(self.options.slots - len(self.slots.running), self.slots.room())
            candidates = self._waiting.candidates(now, self.slots, seen)
            action = batch.next_admission(candidates, self._waiting.victims(self.slots), room)
            if action is None:
                return
            if isinstance(action, batch.Park):
                self._park(action.id)
                continue
            task, match = seen[action.id]
            self._let_in(task, match, now)

    def _park(self, number: int) -> None:
        task = next(task for task in self.slots.running.values() if task.id == number)
        self.slots.park(task)
        self._waiting.add([task])
        self.meter.parked += 1

    def _let_in(self, task: EngineTask, match: Match, now: float) -> None:
        resumed = task.state is not None
        if not self.slots.admit(task, match):
            return
        self._waiting.remove(task)
        if resumed:
            self.meter.resumed += 1
        elif not task.faults:
            self.meter.waited(now - task.submitted)
            self.meter.tokens_in += len(task.prompt)
        if task.chooser is None:
            grammar = task.form.sampler() if task.form is not None and task.lazy is None else None
            sampling = task.request.sampling
            task.chooser = Chooser(
                self.model,
                sampling,
                task.seed,
                task.prompt,
                grammar=grammar,
                lazy=task.lazy,
                alphabet=self.alphabet,
                context=self.context.n_context,
            )

    def _unblock(self) -> None:
        """Nothing runs, and yet nobody could come in: that must not be. The first one ends, honestly."""
        task = next(self._waiting.in_order(perf_counter()))
        _LOG.error("engine_admission_stuck", task_id=task.id, limit=task.limit, room=self.slots.room())
        self.slots.evict_all()
        self._close(task, StepFailure(FailureReason.ENGINE_ERROR, "the engine found no room for the request"))
        self.meter.failed += 1

    def _job(self) -> None:
        job = self._jobs[0]
        if not job(bool(self.slots.running)):
            self._jobs.popleft()
        self._progress_at = perf_counter()

    # ---- a decode -------------------------------------------------------------------------------------------------

    def _step(self, works: list[batch.BatchWork], begun: float) -> None:
        options = self.options
        if options.reproducible:
            pieces = batch.plan_alone(works, self.context.n_batch)
        else:
            rate = self.meter.prefill_rate or 256 / max(options.step_latency, 0.01)
            budget = batch.prefill_budget(rate, options.step_latency, _LEAST_PREFILL, self.context.n_batch)
            pieces = batch.plan_decode(works, self.context.n_batch, budget)
        batch.note_turns(works, pieces)
        ready = perf_counter()
        code = self._decode(pieces)
        if code == 1 and self.slots.index.kept:
            # by the accounting there are cells; what the index keeps is given up before anybody fails
            _LOG.error("engine_cells_missing", used=self.slots.cells.used, cells=self.slots.cells.capacity)
            self.slots.evict_all()
            code = self._decode(pieces)
        if code in (-1, 1) and len(pieces) > 1:
            self._step_apart(pieces)
            return
        if code:
            self._decode_failed(pieces, code)
            return
        ends = [piece for piece in pieces if piece.ends]
        logits = self.context.logits(len(ends)) if ends else None
        done = perf_counter()
        self._note(pieces, done - ready)
        if logits is not None:
            self._choose(ends, logits)
        now = perf_counter()
        self.meter.sampling_seconds += now - done
        self.meter.bookkeeping_seconds += ready - begun

    def _decode(self, pieces: list[batch.Piece]) -> int:
        parts = []
        for piece in pieces:
            task = self.slots.running[piece.work.sequence]
            first = task.computed
            parts.append((piece.work.sequence, first, task.tokens[first : first + piece.count], piece.ends))
        return self.context.decode(parts)

    def _note(self, pieces: list[batch.Piece], seconds: float) -> None:
        """The decode went well."""
        self._faults = 0
        self._progress_at = perf_counter()
        written = 0
        total = 0
        for piece in pieces:
            total += piece.count
            written += piece.work.writing and piece.count == 1
            self.slots.advance(self.slots.running[piece.work.sequence], piece.count)
        self.meter.decoded(seconds, total - written, written)

    def _choose(self, ends: list[batch.Piece], logits: Logits) -> None:
        """Choose the next token of each text that a decode ended a piece of."""
        tasks = [self.slots.running[piece.work.sequence] for piece in ends]
        for task, token in self._rows.choose(tasks, logits):
            if isinstance(token, StepFailure):
                self.meter.failed += 1
                self._close(task, token)
            else:
                self._deliver(task, token)

    def _deliver(self, task: EngineTask, token: int) -> None:
        """The text goes on with this token, or ends."""
        if not task.written:
            task.first_at = perf_counter()
        if token in self.model.ends and not task.request.sampling.ignore_end:
            self._finish(task, FinishReason.STOP)
            return
        task.written += 1
        self.meter.tokens_out += 1
        new = task.stream.feed(self.model.piece(token))
        if new:
            task.show(new)
        if task.stream.stopped:
            self._finish(task, FinishReason.STOP)
        elif task.written >= task.request.max_tokens:
            self._finish(task, FinishReason.LENGTH)
        else:
            task.tokens.append(token)
            work = task.work
            assert work is not None
            work.left, work.writing = 1, True

    def _finish(self, task: EngineTask, reason: FinishReason) -> None:
        self.slots.leave(task)
        self._collect(task)
        self.meter.finished += 1
        task.finish(reason)

    # ---- faults ---------------------------------------------------------------------------------------------------

    def _step_apart(self, pieces: list[batch.Piece]) -> None:
        """Decode each piece by itself, so that only the bad one fails."""
        for piece in pieces:
            code = self._decode([piece])
            if code:
                self._decode_failed([piece], code)
                if code not in (-1, 1):
                    return
                continue
            logits = self.context.logits(1) if piece.ends else None
            self._note([piece], 0.0)
            if logits is not None:
                self._choose([piece], logits)

    def _decode_failed(self, pieces: list[batch.Piece], code: int) -> None:
        _LOG.error("engine_decode_failed", code=code, tokens=sum(piece.count for piece in pieces), pieces=len(pieces))
        if code not in (-1, 1):
            self._recover(f"llama_decode gave {code}")
            return
        why = "no cells were left" if code == 1 else "llama.cpp refused the batch"
        for piece in pieces:
            task = self.slots.running[piece.work.sequence]
            self.slots.abandon([task])
            self._collect(task)
            self.meter.failed += 1
            task.fail(StepFailure(FailureReason.ENGINE_ERROR, f"the text could not be computed: {why}"))

    def _recover(self, why: str) -> None:
        """Make the context again; the texts go on from their tokens, if they have a life left."""
        self._faults += 1
        tasks = list(self.slots.running.values())
        self.slots.abandon(tasks)
        for task in tasks:
            task.faults += 1
            task.computed = 0
            if task.faults > _LIVES:
                self._collect(task)
                self.meter.failed += 1
                task.fail(StepFailure(FailureReason.ENGINE_ERROR, f"the engine failed again and again: {why}"))
            else:
                self._waiting.add([task])
        if self._faults >= _FAULTS:
            self._give_up(why)
            return
        try:
            self.context.close()
            self.context = Context(self.model, self.options)
            self.slots = Slots(self.context, self.options, self.meter)
            self.context.use_loras(self._adapters)
            if self._threads is not None:
                self.context.use_threads(self._threads)
        except (ArrieroError, OSError, MemoryError):
            _LOG.exception("engine_context_lost")
            self._give_up(f"{why}; no new context could be made")
            return
        self.meter.rebuilt += 1
        _LOG.warning("engine_context_rebuilt", reason=why, tasks=len(tasks))

    def _give_up(self, why: str) -> None:
        _LOG.error("engine_gave_up", reason=why)
        with self._wake:
            self.broken = why
            self._stopping = True
        self._fail_all()

    def _fail_all(self) -> None:
        """Nobody gets any further: all are told why."""
        with self._wake:
            arrived, self._inbox = self._inbox, []
        tasks = [*self.slots.running.values(), *self._waiting, *arrived]
        self.slots.abandon(list(self.slots.running.values()))
        self._waiting.clear()
        ended = self.ended
        assert ended is not None
        for task in tasks:
            self.meter.cancelled += task.cancelled
            self.meter.failed += not task.cancelled
            task.fail(CancelledError() if task.cancelled else ended)

    def _fail_without_context(self, why: str) -> None:
        """As `_fail_all`, when even the slots cannot be left. The engine stalls then: its agent ends the pool."""
        with self._wake:
            self.broken, self._stopping = why, True
            tasks = [*self.slots.running.values(), *self._waiting, *self._inbox]
        for task in tasks:
            task.fail(self.ended or CancelledError())
        for job in self._jobs:
            job(True)

    def _end(self) -> None:
        self._fail_all()
        for job in self._jobs:
            job(True)
        self._jobs.clear()
        self._busy = False
        self.context.close()

    @property
    def ended(self) -> StepFailure | None:
        """Why nothing is done any more; None while it goes on."""
        if self.broken is not None:
            return StepFailure(FailureReason.ENGINE_ERROR, f"the engine has given up: {self.broken}")
        return StepFailure(FailureReason.WORKER_STOPPED, "the engine is closed") if self._stopping else None
