"""An option: one way to start a pool, with what it costs."""

from __future__ import annotations

from dataclasses import dataclass

from app.scheduler.planner.cluster import Layout, Pool
from app.scheduler.planner.room import DeviceSet


@dataclass(frozen=True, slots=True)
class Option:
    """One way to start a pool. Times are seconds."""

    layout: Layout
    devices: DeviceSet
    #: Pools whose bytes it waits for.
    victims: tuple[Pool, ...]
    regret: float
    #: Until it serves.
    estimate: float
    #: Smaller is better.
    order: tuple[object, ...]
    #: Victims that are kept up and therefore move, and where to.
    moves: tuple[tuple[Pool, Option], ...] = ()

    @property
    def computing(self) -> DeviceSet:
        """The devices without the RAM beside them."""
        return self.devices[: len(self.layout.parts)]

    @property
    def bytes(self) -> dict[str, int]:
        """By id of the device."""
        return self.layout.on(self.devices)

    @property
    def total_bytes(self) -> int:
        """Bytes on all devices together, the RAM beside GPUs included."""
        return sum(self.bytes.values())
