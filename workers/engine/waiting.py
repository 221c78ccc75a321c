"""
The waiting queue: tasks without a slot, in order of admission, and the running tasks that may be parked for them.

A parked task waits here too, in order of its submission. Only the engine's thread uses it.
The jobs, which need no slot, have a queue of their own: embeddings, rerankings, and changes of the engine itself.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable, Iterator
from heapq import merge

from app.inference.requests import RANKS, PriorityClass
from workers.engine import batch
from workers.engine.options import EngineOptions
from workers.engine.prefix import Match
from workers.engine.slots import MIN_AWAITED_TOKENS, Slots
from workers.engine.tasks import EngineTask

#: Most waiting tasks that are considered for one admission.
_MAX_CONSIDERED = 256

#: Does the next part of a job. Is given whether texts are being written; returns whether more is left.
Job = Callable[[bool], bool]


class WaitingTasks:
    """The waiting tasks, one queue for each priority class."""

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self._queues: tuple[list[EngineTask], ...] = ([], [], [])

    def __len__(self) -> int:
        return sum(map(len, self._queues))

    def __iter__(self) -> Iterator[EngineTask]:
        return iter([task for queue in self._queues for task in list(queue)])

    def parked(self) -> tuple[int, int]:
        """Return the number of parked tasks, and the bytes of their states."""
        states = [state for task in self if (state := task.state) is not None]
        return len(states), sum(map(len, states))

    def has_interactive(self) -> bool:
        """Whether an interactive task waits."""
        return bool(self._queues[batch.INTERACTIVE])

    def add(self, tasks: Iterable[EngineTask]) -> None:
        """Insert tasks by class and order of submission."""
        for task in tasks:
            insort(self._queues[task.rank], task, key=lambda other: other.order)

    def remove(self, task: EngineTask) -> None:
        """Remove a task."""
        self._queues[task.rank].remove(task)

    def clear(self) -> None:
        """Remove all tasks."""
        for queue in self._queues:
            queue.clear()

    def in_order(self, now: float) -> Iterator[EngineTask]:
        """Iterate over all tasks, best first: by class as raised by waiting, then by order of submission."""
        patience = self._options.patience

        def place(task: EngineTask) -> tuple[int, int]:
            return batch.effective_rank(task.rank, now - task.submitted, patience), task.order

        return merge(*(list(queue) for queue in self._queues if queue), key=place)

    def candidates(
        self, now: float, slots: Slots, matches: dict[int, tuple[EngineTask, Match]]
    ) -> Iterator[batch.Candidate]:
        """Yield the candidates for admission, best first. `matches` receives each yielded task and its prefix match."""
        for task in self.in_order(now):
            if len(matches) >= _MAX_CONSIDERED:
                return
            if _is_deferred(task):
                continue
            match = slots.match(task)
            deferred = match.pending_length - match.length >= MIN_AWAITED_TOKENS and task.state is None
            if deferred and match.pending_source is not None:
                awaited = slots.running[match.pending_source]
                task.awaited_prefix = (awaited, match.pending_length)
                if awaited.work is not None:  # the awaited task inherits the urgency of the waiting one
                    awaited.work.rank = min(awaited.work.rank, task.rank)
            deferred = deferred or match.is_awaited
            matches[task.id] = task, match
            yield batch.Candidate(task.id, task.rank, slots.cells_needed(task, match), deferred)

    def park_room(self) -> int:
        """Return the free bytes of host memory for parked tasks."""
        parked = [task.state for task in self._queues[batch.BATCH] if task.state is not None]
        return self._options.park_bytes - sum(map(len, parked))

    def victims(self, slots: Slots) -> list[batch.Victim]:
        """Return the running batch tasks that may be parked; none unless an interactive task waits."""
        if not self.has_interactive():
            return []
        room = slots.park_room(self.park_room())
        victims = []
        for sequence, task in slots.running.items():
            if task.rank != batch.BATCH or (slots.park_bytes(task) > room and not slots.can_overflow(task)):
                continue
            if task.parked_at is not None and task.progress < task.parked_at + self._options.park_progress:
                continue
            others = [other for other in slots.running if other != sequence]
            freed = slots.cells.held_by(slots.running) - slots.cells.held_by(others)
            freed += task.limit - slots.cells.length(sequence)
            victims.append(batch.Victim(task.id, task.progress, task.order, freed))
        return victims


def _is_deferred(task: EngineTask) -> bool:
    """Whether the prefix that the task waits for is still being computed."""
    if task.awaited_prefix is None:
        return False
    awaited, length = task.awaited_prefix
    if awaited.work is not None and awaited.computed < length:
        return True
    task.awaited_prefix = None
    return False


class Jobs:
    """
    The jobs that wait, with the one that runs. The caller holds a lock while it adds or removes one.

    Requests are computed in the order of their classes, and within a class in the order in which they came. One of a
    higher class is computed between two groups of texts of a lower one. A change of the engine keeps its place: what
    came before is computed before it, what came after, after it.
    """

    def __init__(self) -> None:
        self._jobs: list[tuple[int | None, Job]] = []

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[Job]:
        return (job for _, job in list(self._jobs))

    def add(self, job: Job, priority: PriorityClass | None) -> None:
        """Queue a request by its class, or a change of the engine, which has none."""
        rank, at = None if priority is None else RANKS[priority], len(self._jobs)
        while rank is not None and at and (before := self._jobs[at - 1][0]) is not None and before > rank:
            at -= 1
        self._jobs.insert(at, (rank, job))

    def first(self) -> Job:
        """Return the job whose next part is to be done."""
        return self._jobs[0][1]

    def remove(self, job: Job) -> None:
        """Remove a job that is done; it need no longer be the first."""
        self._jobs = [entry for entry in self._jobs if entry[1] is not job]

    def clear(self) -> None:
        """Remove all."""
        self._jobs = []
