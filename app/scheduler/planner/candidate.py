"""
Candidates: ways to start a pool, the pools that would have to make room for it (its victims), and vacancies.

Values only; `search` finds them.
"""

from __future__ import annotations

from dataclasses import dataclass

from app.footprint.layout import KnownLayout
from app.scheduler.planner.cluster import Pool
from app.scheduler.planner.state import DeviceSet


@dataclass(frozen=True, slots=True)
class PlacementCandidate:
    """One way to start a pool, with its cost. Times are seconds."""

    layout: KnownLayout
    devices: DeviceSet
    #: Pools whose bytes it waits for.
    victims: tuple[Pool, ...]
    regret: float
    #: Until it serves.
    estimate: float
    #: Weighted seconds of waiting until it serves and on slow or shared devices, and the regret; rounded.
    cost: float
    #: It takes idle bytes that are reserved for others.
    borrows: bool
    #: The smallest is the best.
    order: tuple[object, ...]
    #: Victims that targets keep running and that therefore move, with their new places.
    moves: tuple[tuple[Pool, PlacementCandidate], ...] = ()

    @property
    def computing(self) -> DeviceSet:
        """The devices without the RAM that is used in addition to GPUs."""
        return self.devices[: len(self.layout.parts)]

    @property
    def bytes(self) -> dict[str, int]:
        """By id of the device."""
        return self.layout.on(self.devices)

    @property
    def total_bytes(self) -> int:
        """Bytes on all devices together, the RAM in addition to GPUs included."""
        return sum(self.bytes.values())


@dataclass(frozen=True, slots=True)
class Vacancy:
    """A device set that pools will leave, without being evicted."""

    #: Until then.
    seconds: float
    devices: DeviceSet
    #: Pools that leave.
    pools: tuple[Pool, ...]


@dataclass(frozen=True, slots=True)
class Victims:
    """Pools that are stopped to make room."""

    pools: tuple[Pool, ...]
    regret: float
    #: Seconds until all of them are gone.
    wait: float
    moves: tuple[tuple[Pool, PlacementCandidate], ...]


@dataclass(frozen=True, slots=True)
class MostRegret:
    """No victims with more regret are worth it, except for bytes that are reserved for the model."""

    #: Where no victim is in use.
    unused: float
    #: Where one is.
    used: float


#: For bytes that are free.
NO_VICTIMS = Victims((), 0.0, 0.0, ())
