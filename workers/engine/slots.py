"""
Slots: the sequences of the context, who writes to them, and what they share.

Bookkeeping in `Cells` and `PrefixIndex` and the calls that change llama.cpp's cache stand side by side here, so that
the one never says what the other does not do. It belongs to the engine's thread.
"""

from __future__ import annotations

from collections.abc import Iterable

from workers.engine.batch import BatchWork
from workers.engine.cells import Cells
from workers.engine.llama import Context
from workers.engine.metrics import Meter
from workers.engine.options import EngineOptions
from workers.engine.prefix import Match, PrefixIndex
from workers.engine.tasks import EngineTask

#: Tokens of a prefix under way that are worth waiting for.
WORTH_WAITING = 32


class Slots:
    """The sequences of one context."""

    def __init__(self, context: Context, options: EngineOptions, meter: Meter) -> None:
        self._context, self._options, self._meter = context, options, meter
        self.running: dict[int, EngineTask] = {}
        self._free = set(range(options.sequences))
        self.index = PrefixIndex()
        capacity = context.n_sequence if options.streams else context.n_context
        self.cells = Cells(capacity, streams=options.streams)
        #: Bytes of parked states for one cell, as last seen.
        self._cell_bytes = 0.0

    @property
    def works(self) -> list[BatchWork]:
        """What the tasks in slots want of the next decode."""
        return [task.work for task in self.running.values() if task.work is not None]

    def room(self) -> int:
        """Cells that no running task holds or may come to hold."""
        if self._options.streams:
            return self.cells.capacity
        return self.cells.capacity - self.cells.held(self.running) - self.cells.growth()

    def match(self, task: EngineTask) -> Match:
        """What of the task's tokens is there. One token is always left to compute."""
        if not self._options.shares or task.unshared:
            return Match()
        wanted = tuple(task.tokens[:-1])
        if not self._context.model.recurrent:
            return self.index.find(wanted)
        found = self.index.find(wanted, self._whole)  # what is under way will not be whole in its turn: no waiting
        return Match(found.length, found.source)

    def needs(self, task: EngineTask, match: Match) -> int:
        """Cells that the task adds to those of the running ones."""
        if self._options.streams:
            return task.limit
        if task.state is not None or match.source is None:
            return task.limit
        new = self.cells.held(self.running, also=(match.source, match.length)) - self.cells.held(self.running)
        return task.limit - match.length + new

    def admit(self, task: EngineTask, match: Match) -> bool:
        """
        Give the task a sequence with its prefix or its parked state. There is room for it.

        False: its prefix could not be taken over, and it must be asked for again without one.
        """
        shared = match.length if task.state is None else 0
        sequence = self._sequence(match if shared else Match())
        if shared and match.source is not None:
            if match.source == sequence:
                self.index.take(sequence)
                kept = self.cells.length(sequence) == shared or self._context.cut(sequence, shared)
                self.cells.cut(sequence, shared)
            else:
                kept = self._context.copy(match.source, sequence, shared)
                if kept:
                    self.cells.share(match.source, sequence, shared)
                    self.index.touch(match.source)
            if not kept:
                self._release(sequence)
                task.unshared = True
                return False
        self._make_room(task.limit - self.cells.length(sequence), sequence)
        self.cells.promise(sequence, task.limit)
        if task.state is not None:
            shared = task.computed if self._context.restore(sequence, task.state, task.computed) else 0
            self.cells.adopt(sequence, shared)
            task.state = None
        elif shared:
            self._meter.prefix_hits += 1
            self._meter.tokens_reused += shared
            if not task.written:
                task.cached = shared
        task.computed = shared
        left, writing = len(task.tokens) - shared, task.written > 0
        task.work = BatchWork(task.id, sequence, task.rank, task.order, left, writing, task.watched)
        self.running[sequence] = task
        if self._options.shares:
            self.index.insert(sequence, tuple(task.tokens), shared)
        return True

    def advance(self, task: EngineTask, count: int) -> None:
        """A decode computed `count` more tokens of the task."""
        work = task.work
        assert work is not None
        self.cells.extend(work.sequence, count)
        indexed = self._options.shares and (count > 1 or not work.writing)
        task.computed += count
        work.left -= count
        if indexed and work.sequence in self.index:
            self.index.advance(work.sequence, min(task.computed, len(self.index.tokens(work.sequence))))

    def leave(self, task: EngineTask) -> None:
        """The task needs its slot no more. What it computed may stay for others."""
        work, task.work = task.work, None
        assert work is not None
        sequence = work.sequence
        del self.running[sequence]
        self.cells.settle(sequence)
        if self._options.shares and task.computed and self.index.keep(sequence, tuple(task.tokens[: task.computed])):
            return
        self._release(sequence)

    def park(self, task: EngineTask) -> None:
        """Take the task's state out of the cache into host memory."""
        work, task.work = task.work, None
        assert work is not None
        task.state = self._context.save(work.sequence)
        if task.computed:
            self._cell_bytes = len(task.state) / task.computed
        task.parked_at = task.progress
        del self.running[work.sequence]
        self._release(work.sequence)

    def park_bytes(self, task: EngineTask) -> int:
        """About the bytes that the task's state takes in host memory."""
        if not self._cell_bytes and task.computed and task.work is not None:
            self._cell_bytes = self._context.state_bytes(task.work.sequence) / task.computed
        return int(self._cell_bytes * task.computed)

    def abandon(self, tasks: Iterable[EngineTask]) -> None:
        """Take the tasks out of their slots and let nothing of them stay."""
        for task in list(tasks):
            if task.work is not None:
                del self.running[task.work.sequence]
                self._release(task.work.sequence)
                task.work = None

    def evict(self, sequence: int) -> None:
        """A kept sequence goes."""
        self._meter.prefixes_evicted += 1
        self._release(sequence)

    def evict_all(self) -> None:
        """All kept sequences go."""
        for sequence in list(self.index.kept):
            self.evict(sequence)

    def _sequence(self, match: Match) -> int:
        """A sequence for a new task: the source itself, a free one, or that of the prefix longest unused."""
        source = match.source if match.source in self.index.kept else None
        if source is not None and (self.cells.length(source) == match.length or not self._free):
            return source
        if not self._free:
            self.evict(next(sequence for sequence in self.index.kept if sequence != match.source))
        sequence = min(self._free)
        self._free.discard(sequence)
        return sequence

    def _make_room(self, cells: int, sequence: int) -> None:
        """Evict kept sequences, the longest unused first, until so many cells can be promised."""
        if self._options.streams:
            return
        while self.cells.free() < cells:
            self.evict(next(kept for kept in self.index.kept if kept != sequence))

    def _release(self, sequence: int) -> None:
        self.index.remove(sequence)
        self.cells.drop(sequence)
        self._context.drop(sequence)
        self._free.add(sequence)

    def _whole(self, sequence: int, length: int) -> int:
        """Recurrent states cannot be cut: all of a sequence or nothing."""
        return length if self.cells.length(sequence) == length else 0
