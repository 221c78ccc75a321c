"""
The policy: every number that placement depends on, with its unit and its trade-off.

Waiting is counted in weighted seconds: a step of class standard that waits for a second counts 1.
The defaults were found on simulated fleets, with other seeds than the reported ones (`benchmarks/scheduling.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from app.kernel.priority import Priority


def _by_class(interactive: float, standard: float, batch: float) -> Mapping[Priority, float]:
    return {Priority.INTERACTIVE: interactive, Priority.STANDARD: standard, Priority.BATCH: batch}


@dataclass(frozen=True, slots=True)
class PlacementPolicy:
    """The numbers of placement. Times without a unit in their type are seconds."""

    #: The weight of a second of waiting, by class.
    weights: Mapping[Priority, float] = field(default_factory=lambda: _by_class(6.0, 1.0, 0.3))
    #: The longest that a step should wait. A start that can just meet it has a lower price.
    target: Mapping[Priority, float] = field(default_factory=lambda: _by_class(20.0, 60.0, 120.0))
    #: A step that waited for that time is served next, at any cost to others.
    bound: Mapping[Priority, float] = field(default_factory=lambda: _by_class(60.0, 180.0, 360.0))

    #: Pools are evicted for a model when its pressure reaches that part of the regret for them.
    #: A larger value means fewer evictions and longer tails.
    threshold: float = 0.25
    #: The part of the price that applies, for pools that are not in use, for each load in progress on the host; at most
    #: all of it. While nothing loads there, they are evicted at once.
    per_load: float = 0.5
    #: Factor for the threshold at the last moment at which a start meets the target.
    due: float = 0.25
    #: The part of the threshold that is added for each further model with waiting steps and no pool.
    crowding: float = 0.5
    #: A pool is regretted when its model is requested within that time.
    horizon: float = 60.0
    #: Until a model whose pool was evicted is expected to find room again.
    recovery: float = 10.0
    #: Factor for the regret when other pools serve the same model.
    sibling: float = 0.25
    #: From the end of a process until its bytes are seen to be free.
    unload: float = 1.5

    #: A pool with work is not evicted until it has served for that many times its own load time, except for reserved
    #: bytes. So a device loads for at most one part in `amortise + 1` of the time while it has work.
    amortise: float = 4.0
    #: Steps in flight are preempted for a higher class when they would take longer than that.
    drain_limit: float = 10.0
    #: A step that was preempted that often is not preempted again.
    max_preemptions: int = 3
    #: A pool with work of an equal class is drained when the pressure reaches that many times the regret for it.
    drain_factor: float = 2.0
    #: A pool is drained for steps that have waited for that many times as long as its own steps will take, but for no
    #: more than the drain limit: meanwhile a pool may become idle. Larger: fewer evictions of pools with work.
    drain_wait_factor: float = 3.0

    #: Another pool is started when the queue would take that many times as long as the load.
    replica_factor: float = 4.0
    #: One of several pools of a model is stopped after that time without work.
    replica_keep_alive: float = 60.0
    #: The weight of a step that will soon be ready, compared with one that is; 0: such steps are ignored.
    look_ahead: float = 0.5
    #: A model is expected, and loaded ahead, when half of the gaps between its arrivals differ by no more than that.
    #: A larger value means more pools that wait in vain; 0: no model is expected.
    spread: float = 120.0
    #: Idle reserves are lent to other models.
    lend: bool = True
    #: An evicted pool whose model is likely to be requested is started again at once where bytes are free.
    migrate: bool = True
    #: The probability of a request within the horizon from which a model is likely to be requested, and the part of its
    #: gaps that must end soon for it to be loaded ahead.
    likely: float = 0.5

    #: Limit of starts in one plan; the next plan continues.
    max_starts: int = 32
    #: Limit of device sets that are examined for one start.
    max_sets: int = 32
