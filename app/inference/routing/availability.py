"""
Availability: whether a model answers now, and how long its first token is expected to take.

Values only. They are read from the database a moment before (`fleet.py`), and are an estimate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum


class ModelState(StrEnum):
    """Whether a model answers at once."""

    #: A pool serves it.
    RESIDENT = "resident"
    #: A pool of it is starting.
    LOADING = "loading"
    #: It is loaded when it is needed.
    COLD = "cold"
    #: No host can serve it, or its server does not.
    UNAVAILABLE = "unavailable"


@dataclass(frozen=True, slots=True)
class Availability:
    """The state of one model. Times are seconds."""

    state: ModelState = ModelState.COLD
    #: Why it is unavailable.
    problem: str = ""
    #: Slots of the pools that serve it, and how many of them are in use.
    slots: int = 0
    busy: int = 0
    #: Steps that wait for a slot.
    waiting: int = 0
    #: Mean time that a request keeps a slot.
    duration: float = 5.0
    #: Tokens a second of one request, as measured; None while too few were.
    pace: float | None = None
    #: Until the first pool that starts serves.
    loading_left: float = 0.0
    #: From the start of a pool until it serves.
    load: float = 10.0
    #: Bytes that a pool needs, and those that other pools would have to free for it.
    bytes: int = 0
    to_free: int = 0
    #: A pool of another entry has loaded the same file.
    shares_file: bool = False


#: Seconds that pools take to make room, at least.
_EVICTION = 5.0
#: The part of a load that is left when the pages of the file are in memory already.
_WARM_LOAD = 0.5


#: Why a model is unavailable, for callers who do not see the fleet.
_OUTLINE = "an operator sees why"


@dataclass(frozen=True, slots=True)
class FleetAvailability:
    """The availability of all models at one moment."""

    models: Mapping[str, Availability] = field(default_factory=dict)

    def of(self, name: str) -> Availability:
        """The availability of a model; of one that is not known, as if it had never been used."""
        return self.models.get(name, Availability())

    def outlined(self) -> FleetAvailability:
        """The same for callers of a namespace: why a model is unavailable names files and hosts."""
        return FleetAvailability(
            {name: replace(one, problem=_OUTLINE) if one.problem else one for name, one in self.models.items()}
        )


#: What is known before anything was read.
NOTHING_KNOWN = FleetAvailability()


def expected_wait(of: Availability) -> float | None:
    """Return the seconds until a request that comes now gets a slot; None when none is expected."""
    match of.state:
        case ModelState.UNAVAILABLE:
            return None
        case ModelState.RESIDENT:
            ahead = of.waiting + max(of.busy - of.slots + 1, 0)
            # A request in a slot is half done on average.
            return of.duration * (ahead - 0.5) / max(of.slots, 1) if ahead else 0.0
        case ModelState.LOADING:
            return of.loading_left + of.duration * of.waiting / max(of.slots, 1)
        case ModelState.COLD:
            load = of.load * (_WARM_LOAD if of.shares_file else 1.0)
            return load + (_EVICTION + of.duration / 2 if of.to_free else 0.0) + of.duration * of.waiting
