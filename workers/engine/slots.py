"""
Slots: the sequences of one context, the tasks that run in them, and the prefixes they share.

Each change of llama.cpp's cache is made here together with its bookkeeping in `Cells` and `PrefixIndex`, so the two
always agree. Only the engine's thread uses it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from time import perf_counter

from workers.engine.batch import BatchWork
from workers.engine.bindings.llama import Context
from workers.engine.cells import Cells
from workers.engine.kv_store.rates import MIN_TOKENS
from workers.engine.kv_store.saving import EndedText
from workers.engine.kv_store.state_file import StateData
from workers.engine.kv_store.store import PrefixStore, StoredMatch
from workers.engine.metrics import Meter
from workers.engine.options import EngineOptions
from workers.engine.prefix import Match, PrefixIndex
from workers.engine.tasks import EngineTask
from workers.engine.threads import kind_of
from workers.engine.vision import image_spans

#: Fewest tokens of a prefix under computation for which a task waits instead of computing them itself.
MIN_AWAITED_TOKENS = 32


class Slots:
    """The sequences of one context and the tasks in them."""

    def __init__(
        self, context: Context, options: EngineOptions, meter: Meter, store: PrefixStore | None = None
    ) -> None:
        """`store` keeps the states of evicted sequences; None keeps none."""
        self._context, self._options, self._meter = context, options, meter
        self._store = store
        self.running: dict[int, EngineTask] = {}
        self._free = set(range(options.sequences))
        self.index = PrefixIndex()
        capacity = context.n_sequence if options.streams else context.n_context
        self.cells = Cells(capacity, streams=options.streams)
        #: Draft tokens in the cache, by sequence, after those that count as computed.
        self._drafted: dict[int, int] = {}
        #: Bytes of a saved state per KV cell, as measured last.
        self._cell_bytes = 0.0

    @property
    def works(self) -> list[BatchWork]:
        """The work of all running tasks, for the planning of the next decode."""
        return [task.work for task in self.running.values() if task.work is not None]

    def free_cells(self) -> int:
        """KV cells that no running task holds or has reserved."""
        if self._options.streams:
            return self.cells.capacity
        return self.cells.capacity - self.cells.held_by(self.running) - self.cells.reserved_unused()

    def figures(self) -> dict[str, int]:
        """Return the current state for the metrics."""
        return {
            "slots": self._options.slots,
            "running": len(self.running),
            "cells": self._context.n_context,
            "cells_used": self.cells.used,
            "prefixes_kept": len(self.index.kept),
            "threads": self._context.threads.chosen(kind_of(self._options.slots, 1)),
        }

    def match(self, task: EngineTask) -> Match:
        """Return the reusable prefix of the task's tokens. At least one token is always left to compute."""
        if not self._options.shares or task.sharing_failed:
            return Match()
        found = self._found(task)
        if task.images:
            found = _with_whole_images(task, found)
        return found if self._store is None or task.state is not None else self._longer(task, found, self._store)

    def _found(self, task: EngineTask) -> Match:
        tokens = tuple(task.tokens[:-1])
        if not self._context.model.recurrent:
            return self.index.find(tokens)
        # A running recurrent sequence will be longer than the prefix, so waiting for it is of no use.
        found = self.index.find(tokens, self._whole_or_nothing)
        return Match(found.length, found.source)

    def _longer(self, task: EngineTask, found: Match, store: PrefixStore) -> Match:
        """Return a match in the store, if it is longer and has room; else what was found."""
        cut = partial(image_spans.before_spans, task.images)
        stored = store.find(tuple(task.tokens[:-1]), found, self._meter.prefill_rate, cut)
        if stored is None or stored.cells > max(task.limit, self.free_cells()):
            return found
        return stored

    def cells_needed(self, task: EngineTask, match: Match) -> int:
        """KV cells that the running tasks would hold in addition if the task was admitted."""
        if self._options.streams:
            return task.limit
        if isinstance(match, StoredMatch):
            return max(task.limit, match.cells)
        if task.state is not None or match.source is None:
            return task.limit
        new = self.cells.held_by(self.running, also=(match.source, match.length)) - self.cells.held_by(self.running)
        return task.limit - match.length + new

    def admit(self, task: EngineTask, match: Match) -> bool:
        """
        Give the task a sequence with its prefix or its parked state. The caller has checked that there is room.

        Returns False when the prefix could not be reused; the caller matches again, then without a prefix.
        """
        stored = match if isinstance(match, StoredMatch) and task.state is None else None
        shared = match.length if task.state is None and stored is None else 0
        sequence = self._take_sequence(match if shared else Match())
        if shared and match.source is not None:
            if match.source == sequence:
                if self.cells.length(sequence) >= shared + MIN_TOKENS:
                    self._save_kept(sequence)
                self.index.activate(sequence)
                kept = self.cells.length(sequence) == shared or self._context.truncate(sequence, *_end(task, shared))
                self.cells.truncate(sequence, shared)
            else:
                kept = self._context.copy(match.source, sequence, *_end(task, shared))
                if kept:
                    self.cells.share(match.source, sequence, shared)
                    self.index.touch(match.source)
            if not kept:
                self._release(sequence)
                task.sharing_failed = True
                return False
        # A stored sequence may be longer than the task, until it is truncated.
        most = task.limit if stored is None else max(task.limit, stored.cells)
        self._make_room(most - self.cells.length(sequence), sequence)
        self.cells.reserve(sequence, most)
        if stored is not None:
            shared = self._restore(sequence, stored, task)
            self.cells.release_unused(sequence)
            self.cells.reserve(sequence, task.limit)
        if task.state is not None:
            restored = self._context.restore(sequence, task.state, *_end(task, task.computed))
            shared = task.computed if restored else 0
            self.cells.restore(sequence, shared)
            task.state = None
        elif shared:
            self._meter.prefix_hits += 1
            self._meter.tokens_reused += shared
            if not task.written:
                task.cached = shared
        task.computed = shared
        remaining, decoding = len(task.tokens) - shared, task.written > 0
        task.work = BatchWork(
            task.id,
            sequence,
            task.rank,
            task.order,
            remaining,
            decoding,
            task.latency_sensitive,
            submitted=task.submitted,
        )
        self.running[sequence] = task
        if self._options.shares:
            self.index.insert(sequence, tuple(task.tokens), shared)
        return True

    def advance(self, task: EngineTask, count: int) -> None:
        """Record that a decode computed `count` more tokens of the task."""
        work = task.work
        assert work is not None
        self.cells.extend(work.sequence, count)
        indexed = self._options.shares and (count > 1 or not work.decoding)
        task.computed += count
        work.remaining -= count
        if indexed and work.sequence in self.index:
            self.index.advance(work.sequence, min(task.computed, len(self.index.tokens(work.sequence))))

    def drafted(self, task: EngineTask, count: int) -> None:
        """Record that a decode computed `count` draft tokens after those that `advance` records."""
        assert task.work is not None
        self._drafted[task.work.sequence] = count

    def accept(self, task: EngineTask) -> None:
        """Count the next draft token as computed: it is now the last one of the text."""
        assert task.work is not None
        self._drafted[task.work.sequence] -= 1
        self.advance(task, 1)

    def roll_back(self, task: EngineTask) -> None:
        """Remove the draft tokens that were not accepted. If llama.cpp cannot, the task's tokens are computed again."""
        work = task.work
        assert work is not None
        if not self._drafted.pop(work.sequence, 0) or self._context.truncate(work.sequence, *_end(task, task.computed)):
            return
        self.cells.truncate(work.sequence, 0)
        task.computed, work.remaining = 0, len(task.tokens)
        if work.sequence in self.index:
            self.index.advance(work.sequence, 0)

    def finish(self, task: EngineTask) -> None:
        """Free the task's slot. Its sequence may be kept as a prefix for others."""
        self.roll_back(task)
        work, task.work = task.work, None
        assert work is not None
        sequence = work.sequence
        del self.running[sequence]
        self.cells.release_unused(sequence)
        if self._options.shares and task.computed and self.index.keep(sequence, tuple(task.tokens[: task.computed])):
            return
        self._release(sequence)

    def _restore(self, sequence: int, match: StoredMatch, task: EngineTask) -> int:
        """Load a stored state into an empty sequence. Returns the tokens that need not be computed: 0 if it failed."""
        data, store, length, began = match.data, self._store, match.stored_length, perf_counter()
        assert data is not None
        assert store is not None
        assert match.entry is not None
        succeeded = self._context.restore(sequence, data, match.cells, match.entry.last)
        self.cells.restore(sequence, match.cells if succeeded else 0)
        if succeeded and length < match.cells:
            succeeded = self._context.truncate(sequence, *_end(task, length))
            self.cells.truncate(sequence, length if succeeded else 0)
        store.note_restored(match, perf_counter() - began, succeeded=succeeded)
        return length if succeeded else 0

    def _save(self, sequence: int, tokens: tuple[int, ...], *, is_busy: bool) -> bool:
        """Keep the state of a sequence of these tokens in the store. `is_busy` says whether texts wait meanwhile."""
        return self._store is not None and self._store.keep(
            tokens,
            lambda: self._context.state_bytes(sequence),
            lambda: self._context.save(sequence),
            last=self._context.positions(sequence)[1],
            prefill_rate=self._meter.prefill_rate,
            is_busy=is_busy,
        )

    def _save_kept(self, sequence: int) -> None:
        """Keep the state of a kept sequence, before it is dropped or truncated."""
        self._save(sequence, self.index.tokens(sequence), is_busy=bool(self.running))

    def save_one(self) -> bool:
        """Save the kept sequence that was used last among those not saved and with room. False when there is none."""
        if (store := self._store) is None:
            return False
        for sequence in reversed(list(self.index.kept)):
            tokens = self.index.tokens(sequence)
            if not store.holds(tokens) and store.has_room(self._context.state_bytes(sequence)):
                return self._save(sequence, tokens, is_busy=False)
        return False

    def end(self, waiting: Iterable[EngineTask]) -> list[EndedText]:
        """
        End the running tasks and keep their sequences, because the engine ends. No task ends its future here.

        Returns how each of them, and each parked one of `waiting`, is saved: the one with most progress first.
        """
        ended = []
        for task in sorted(self.running.values(), key=lambda task: task.progress):
            work, progress = task.work, task.progress
            assert work is not None
            self.finish(task)
            if work.sequence in self.index.kept:
                size, save = self._context.state_bytes, self._save_kept
                ended.append(EndedText(progress, partial(size, work.sequence), partial(save, work.sequence)))
        for task in waiting:
            if task.state is not None and self._store is not None:
                tokens = tuple(task.tokens[: task.computed])
                save_parked = partial(self._save_parked, self._store, tokens, _last(task), task.state)
                ended.append(EndedText(task.progress, partial(len, task.state), save_parked))
        return sorted(ended, key=lambda text: -text.progress)

    def _save_parked(self, store: PrefixStore, tokens: tuple[int, ...], last: int, state: StateData) -> None:
        store.yield_room(-len(state))
        rate = self._meter.prefill_rate
        store.keep(tokens, lambda: len(state), lambda: state, last=last, prefill_rate=rate, is_busy=False)

    def park(self, task: EngineTask, room: int) -> None:
        """Move the task's state from the KV cache to host memory, which has `room` bytes, or else to the store."""
        overflows = self.park_bytes(task) > self.park_room(room)
        work, task.work = task.work, None
        assert work is not None
        if overflows:
            self._save(work.sequence, tuple(task.tokens[: task.computed]), is_busy=False)
            task.is_overflowed, task.computed = True, 0  # the prefix is found again when it is admitted
        else:
            if self._store is not None:
                self._store.yield_room(self._context.state_bytes(work.sequence))
            task.state = self._context.save(work.sequence)
            if task.computed:
                self._cell_bytes = len(task.state) / task.computed
        task.parked_at = task.progress
        del self.running[work.sequence]
        self._release(work.sequence)

    def park_room(self, room: int) -> int:
        """Return how much of `room` bytes of host memory a state can have now: the store may use some of it."""
        return room if self._store is None else min(room, self._store.room_for_parked())

    def park_bytes(self, task: EngineTask) -> int:
        """Estimate the bytes of the task's state in host memory."""
        if not self._cell_bytes and task.computed and task.work is not None:
            self._cell_bytes = self._context.state_bytes(task.work.sequence) / task.computed
        return int(self._cell_bytes * task.computed)

    def can_overflow(self, task: EngineTask) -> bool:
        """Whether the state of a task may go to the store when host memory has no room for parked ones."""
        store = self._store
        if store is None or not store.writes_files or task.sharing_failed:
            return False
        return store.has_room(self.park_bytes(task))

    def discard(self, tasks: Iterable[EngineTask]) -> None:
        """Free the slots of the tasks and keep nothing of their sequences."""
        for task in list(tasks):
            if task.work is not None:
                del self.running[task.work.sequence]
                self._release(task.work.sequence)
                task.work = None

    def evict(self, sequence: int) -> None:
        """Drop a kept sequence."""
        self._meter.prefixes_evicted += 1
        self._release(sequence)

    def evict_all(self) -> None:
        """Drop all kept sequences, and store none of them."""
        for sequence in list(self.index.kept):
            self.evict(sequence)

    def _take_sequence(self, match: Match) -> int:
        """Choose a sequence for a new task: the source itself, a free one, or the least recently used kept one."""
        source = match.source if match.source in self.index.kept else None
        if source is not None and (self.cells.length(source) == match.length or not self._free):
            return source
        if not self._free:
            self._store_and_evict(next(sequence for sequence in self.index.kept if sequence != match.source))
        sequence = min(self._free)
        self._free.discard(sequence)
        return sequence

    def _make_room(self, cells: int, sequence: int) -> None:
        """Evict kept sequences, the least recently used first, until `cells` cells can be reserved."""
        if self._options.streams:
            return
        while self.cells.free() < cells:
            self._store_and_evict(next(kept for kept in self.index.kept if kept != sequence))

    def _store_and_evict(self, sequence: int) -> None:
        self._save_kept(sequence)
        self.evict(sequence)

    def _release(self, sequence: int) -> None:
        self._drafted.pop(sequence, None)
        self.index.remove(sequence)
        self.cells.drop(sequence)
        self._context.drop(sequence)
        self._free.add(sequence)

    def _whole_or_nothing(self, sequence: int, length: int) -> int:
        """Return `length` if that is the whole sequence, else 0: a recurrent state cannot be truncated."""
        return length if self.cells.length(sequence) == length else 0


def _with_whole_images(task: EngineTask, found: Match) -> Match:
    """Return the match without the images that it does not contain as a whole."""
    length, pending = (image_spans.before_spans(task.images, one) for one in (found.length, found.pending_length))
    if pending <= length:
        return Match(length, found.source if length else None)
    return Match(length, found.source if length else None, pending, found.pending_source)


def _end(task: EngineTask, count: int) -> tuple[int] | tuple[int, int]:
    """Return the position after the first `count` tokens of the task; with images also the highest in the cache."""
    if not task.images:
        return (count,)
    last = image_spans.last_position(task.images, count)
    return max(image_spans.next_position(task.images, count), last + 1), last


def _last(task: EngineTask) -> int:
    """Return the highest position of the computed tokens of the task in the cache."""
    return image_spans.last_position(task.images, task.computed) if task.images else task.computed - 1
