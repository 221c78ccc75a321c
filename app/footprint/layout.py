"""A layout: the bytes that a configuration needs on devices of one type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True, slots=True)
class KnownLayout:
    """The bytes of a configuration on one device, or split over several devices of one host and type."""

    configuration: str
    #: Type of the devices, such as `NVIDIA L4` or `cpu`.
    type: str
    #: Bytes on each device, the largest first; margins are included.
    parts: tuple[int, ...]
    #: How it is known: measured, dry run, closed form; or the catalogue, for a simulated engine.
    source: str
    #: Time from the start of the process until it serves, once the file is on the host.
    load: timedelta
    #: For one slot.
    tokens_per_second: float
    #: Bytes of the host's RAM in addition to GPUs: the process, layers that stay there, states of parked requests.
    ram: int = 0

    @property
    def total_bytes(self) -> int:
        """Bytes on all devices together, without the RAM in addition to GPUs."""
        return sum(self.parts)

    def on(self, devices: Sequence[str]) -> dict[str, int]:
        """Bytes by device, for a set that ends with the host's RAM where the layout needs some."""
        return dict(zip(devices, (*self.parts, self.ram), strict=False))
