"""
The policy: every number that placement depends on, with its unit and what it trades.

Waiting is counted in weighted seconds: a step of class standard that waits for a second counts 1.
The defaults were found on simulated fleets, with seeds other than those that are reported (`benchmarks/scheduling.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from app.kernel.priority import Priority


def _by_class(interactive: float, standard: float, batch: float) -> Mapping[Priority, float]:
    return {Priority.INTERACTIVE: interactive, Priority.STANDARD: standard, Priority.BATCH: batch}


@dataclass(frozen=True, slots=True)
class PlacementPolicy:
    """How pools are placed. Times without a unit in their type are seconds."""

    #: What a second of waiting counts.
    weights: Mapping[Priority, float] = field(default_factory=lambda: _by_class(6.0, 1.0, 0.3))
    #: A step should not wait for longer than that; a start that can just meet it is made more easily.
    target: Mapping[Priority, float] = field(default_factory=lambda: _by_class(20.0, 60.0, 120.0))
    #: A step that waited for that long is served next, whatever that costs others.
    bound: Mapping[Priority, float] = field(default_factory=lambda: _by_class(60.0, 180.0, 360.0))

    #: Pools are stopped for a model when its steps have waited for that part of what the others will wait for it.
    #: Larger switches less often and lets the tail wait longer.
    threshold: float = 0.25
    #: The part of the threshold that is left at the last moment at which a start meets the target.
    due: float = 0.25
    #: What each further model that waits without a pool adds to the threshold, as a part of it.
    crowding: float = 0.5
    #: A model that is asked for within that time is missed when its pool is stopped.
    horizon: float = 60.0
    #: Until a model that lost its pool is expected to find room again.
    recovery: float = 10.0
    #: What the regret for a pool is worth when others serve the same model.
    sibling: float = 0.25
    #: From the end of a process until its bytes are seen to be back.
    unload: float = 1.5

    #: A pool that has work keeps it until it has served for that many times its own start, but for what is guaranteed
    #: to others. So a device loads for at most one part in `amortise + 1` of the time while there is work on it.
    amortise: float = 4.0
    #: Steps in flight are handed back to a higher class when they would go on for longer than that.
    drain_limit: float = 10.0
    #: A step that was handed back that often is left to end.
    max_preemptions: int = 3
    #: A pool with work for an equal class is drained when waiting comes to that many times the regret for it.
    drain_factor: float = 2.0

    #: Another pool is started when the queue would take that many times as long as the start.
    replica_factor: float = 4.0
    #: A pool beside others of its model is stopped after that time without work.
    replica_keep_alive: float = 60.0
    #: What a step that will soon be ready counts beside one that is; 0 looks at nothing ahead.
    look_ahead: float = 0.5
    #: Idle reserves are lent to other models.
    lend: bool = True
    #: A stopped pool that is likely to be asked for is started again at once where bytes are free.
    migrate: bool = True
    #: Which probability to be asked for within the horizon is likely.
    likely: float = 0.5

    #: Starts that one plan may hold; the next plan goes on.
    max_starts: int = 32
    #: Device sets that are looked at for one start.
    max_sets: int = 32
