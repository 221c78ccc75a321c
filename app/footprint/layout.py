"""A layout: the bytes that a configuration needs on devices of a type."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True, slots=True)
class KnownLayout:
    """The known needs of a configuration on devices of a type."""

    configuration: str
    type: str
    #: Bytes on each device, the largest first, margins included.
    parts: tuple[int, ...]
    #: The source: measured, dry run, closed form; or the catalogue, for a simulated engine.
    source: str
    load: timedelta
    tokens_per_second: float
    #: Bytes of the host's RAM, for a layout on GPUs.
    ram: int = 0
