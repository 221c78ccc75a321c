"""
Waiting: the tasks that have no slot, in the order in which they may come in, and whom they may displace.

A parked task waits here too, at the place of its age. It belongs to the engine's thread.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Iterator
from heapq import merge

from workers.engine import batch
from workers.engine.options import EngineOptions
from workers.engine.prefix import Match
from workers.engine.slots import WORTH_WAITING, Slots
from workers.engine.tasks import EngineTask

#: Waiting tasks that are looked at in one step.
_LOOKED_AT = 256


class WaitingTasks:
    """The line before the slots."""

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self._lines: tuple[list[EngineTask], ...] = ([], [], [])

    def __len__(self) -> int:
        return sum(map(len, self._lines))

    def __iter__(self) -> Iterator[EngineTask]:
        return iter([task for line in self._lines for task in list(line)])

    def urgent(self) -> bool:
        """Whether an interactive task waits."""
        return bool(self._lines[batch.INTERACTIVE])

    def add(self, tasks: Iterable[EngineTask]) -> None:
        """Take tasks, each to the place of its class and age."""
        for task in tasks:
            insort(self._lines[task.rank], task, key=lambda other: other.order)

    def remove(self, task: EngineTask) -> None:
        """The task waits no more."""
        self._lines[task.rank].remove(task)

    def clear(self) -> None:
        """Nobody waits."""
        for line in self._lines:
            line.clear()

    def in_order(self, now: float) -> Iterator[EngineTask]:
        """All of them, best first."""
        patience = self._options.patience

        def place(task: EngineTask) -> tuple[int, int]:
            return batch.effective_rank(task.rank, now - task.submitted, patience), task.order

        return merge(*(list(line) for line in self._lines if line), key=place)

    def candidates(
        self, now: float, slots: Slots, seen: dict[int, tuple[EngineTask, Match]]
    ) -> Iterator[batch.Candidate]:
        """What the best ones would need; `seen` gets each task that is given, with the prefix found for it."""
        for task in self.in_order(now):
            if len(seen) >= _LOOKED_AT:
                return
            if _still_aside(task):
                continue
            match = slots.match(task)
            aside = match.soon - match.length >= WORTH_WAITING and task.state is None
            if aside and match.awaited is not None:
                awaited = slots.running[match.awaited]
                task.awaits = (awaited, match.soon)
                if awaited.work is not None:  # whoever is waited for is as urgent as who waits
                    awaited.work.rank = min(awaited.work.rank, task.rank)
            seen[task.id] = task, match
            yield batch.Candidate(task.id, task.rank, slots.needs(task, match), aside)

    def victims(self, slots: Slots) -> list[batch.Victim]:
        """The running batch tasks that may be parked; none unless an interactive task waits."""
        if not self.urgent():
            return []
        parked = [task.state for task in self._lines[batch.BATCH] if task.state is not None]
        room = self._options.park_bytes - sum(map(len, parked))
        victims = []
        for sequence, task in slots.running.items():
            if task.rank != batch.BATCH or slots.park_bytes(task) > room:
                continue
            if task.parked_at is not None and task.progress < task.parked_at + self._options.park_progress:
                continue
            others = [other for other in slots.running if other != sequence]
            freed = slots.cells.held(slots.running) - slots.cells.held(others)
            freed += task.limit - slots.cells.length(sequence)
            victims.append(batch.Victim(task.id, task.progress, task.order, freed))
        return victims


def _still_aside(task: EngineTask) -> bool:
    """Whether the prefix that the task waits for is still under way."""
    if task.awaits is None:
        return False
    awaited, length = task.awaits
    if awaited.work is not None and awaited.computed < length:
        return True
    task.awaits = None
    return False
