"""
The timeline of a run: when its steps are expected to begin and end, by list scheduling on the slots of its models.

A step begins when the steps that it needs have ended and its model has a free slot; the slots of a model are free when
what waits for it now is done. Items of a map take as many slots as the map and the model allow. A step that is often
skipped counts by its share.

Nothing here reads a clock: instants are seconds from now.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ExpectedStep:
    """A step that has not ended."""

    key: str
    needs: Sequence[str] = ()
    #: Of one execution; for a map, of one item.
    seconds: float = 0.0
    model: str | None = None
    items: int = 1
    #: Most items at a time.
    parallel: int = 1
    #: It runs already, in a slot of its own: `seconds` are those that are left.
    runs: bool = False


@dataclass(frozen=True, slots=True)
class ModelSlots:
    """The slots that a run can use of a model."""

    slots: int = 1
    #: Seconds until one is free for a step that is ready now.
    free_in: float = 0.0
    #: Seconds that a later step waits, as it did of late.
    later_wait: float = 0.0


@dataclass(frozen=True, slots=True)
class Timeline:
    """When steps are expected to end."""

    ends: Mapping[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Seconds until the last one ends."""
        return max(self.ends.values(), default=0.0)


def timeline(steps: Sequence[ExpectedStep], models: Mapping[str, ModelSlots]) -> Timeline:
    """Return the timeline of the steps of a run that have not ended; needs of others count as met."""
    by_key = {step.key: step for step in steps}
    missing = {step.key: len({need for need in step.needs if need in by_key}) for step in steps}
    followers: dict[str, list[str]] = {}
    for step in steps:
        for need in set(step.needs) & by_key.keys():
            followers.setdefault(need, []).append(step.key)
    free = {name: [of.free_in] * max(of.slots, 1) for name, of in models.items()}
    ready = [(0.0, place, step.key) for place, step in enumerate(steps) if not missing[step.key]]
    heapq.heapify(ready)
    ends: dict[str, float] = {}
    begins = dict.fromkeys(by_key, 0.0)
    places = {step.key: place for place, step in enumerate(steps)}
    while ready:
        at, _, key = heapq.heappop(ready)
        step = by_key[key]
        ends[key] = _placed(step, at, free, models)
        for follower in followers.get(key, ()):
            begins[follower] = max(begins[follower], ends[key])
            missing[follower] -= 1
            if not missing[follower]:
                heapq.heappush(ready, (begins[follower], places[follower], follower))
    return Timeline(ends)


def _placed(step: ExpectedStep, at: float, free: dict[str, list[float]], models: Mapping[str, ModelSlots]) -> float:
    """Return the end of a step that is ready at an instant, and take its slots until then."""
    if step.runs:
        return at + step.seconds
    if step.model is None or step.model not in free:
        return at + math.ceil(step.items / max(step.parallel, 1)) * step.seconds
    slots = free[step.model]
    width = max(min(step.parallel, len(slots), step.items), 1)
    earliest = heapq.nsmallest(width, slots)
    begin = max(at, earliest[0], at + models[step.model].later_wait if at > 0 else 0.0)
    # Slots that are free later take part from then on: the items are shared among what all of them have.
    work = step.items * step.seconds + sum(max(one, begin) - begin for one in earliest)
    end = begin + max(work / width, step.seconds if step.items else 0.0)
    for one in earliest:
        slots.remove(one)
    slots.extend([end] * width)
    return end
