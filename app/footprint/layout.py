"""A layout: what a configuration was found to need on devices of a type."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True, slots=True)
class KnownLayout:
    """What a configuration needs on devices of a type."""

    configuration: str
    type: str
    #: Bytes on each device, the largest first; margins are in them.
    parts: tuple[int, ...]
    #: How it is known: measured, dry run, closed form; or the catalogue, for a stand-in.
    source: str
    load: timedelta
    tokens_per_second: float
    #: Bytes of the host's RAM beside GPUs.
    ram: int = 0
