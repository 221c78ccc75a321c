"""
Placement: which pools are started, stopped and waited for, given the fleet and what is waited for.

Everything that a plan does, and everything that it refuses, carries a reason that a user understands.

Nothing here reads a clock or a database: the caller passes `now` and applies the plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum


class Purpose(StrEnum):
    """Why a pool is started."""

    #: Steps wait, and no pool serves them.
    DEMAND = "demand"
    #: Steps wait, and the pools that there are do not suffice.
    REPLICA = "replica"
    #: Steps will soon be ready.
    LOOK_AHEAD = "look_ahead"
    #: Its entry keeps so many pools up.
    STANDING = "standing"
    #: A pool on a device that is drained is replaced.
    EVACUATION = "evacuation"


class Stop(StrEnum):
    """How a pool is stopped. It takes no new work in either way."""

    #: What it works on ends first.
    DRAIN = "drain"
    #: What it works on is handed back at the next token, and tried again elsewhere.
    PREEMPT = "preempt"


@dataclass(frozen=True, slots=True)
class StartPool:
    """Grant the bytes and start a pool; first wait until the pools `after` are gone."""

    configuration: str
    #: By id of the device. The pools `after` cover what is not free.
    bytes: Mapping[str, int]
    purpose: Purpose
    reason: str
    #: Until it is expected to serve.
    estimate: timedelta
    #: Ids of pools that the same plan stops, or that are draining already.
    after: frozenset[str] = frozenset()
    #: On whose behalf.
    namespace: str = ""


@dataclass(frozen=True, slots=True)
class StopPool:
    """Stop a pool."""

    pool: str
    how: Stop
    reason: str
    #: Id of the configuration that gets its bytes; empty when nobody in particular does.
    room_for: str = ""


@dataclass(frozen=True, slots=True)
class MovePool:
    """Stop an idle pool and start its like on other devices, whose bytes are free."""

    pool: str
    #: By id of the device.
    bytes: Mapping[str, int]
    reason: str
    #: Until the pool serves again.
    estimate: timedelta


@dataclass(frozen=True, slots=True)
class GrantReserve:
    """Set bytes aside for a configuration."""

    configuration: str
    bytes: Mapping[str, int]
    reason: str


@dataclass(frozen=True, slots=True)
class DropReserve:
    """Give a reserve back that is not asked for any more."""

    reserve: str
    reason: str


Action = StartPool | StopPool | MovePool | GrantReserve | DropReserve


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why nothing was done for a configuration that is asked for."""

    configuration: str
    model: str
    #: With figures: what it needs, what there is, what must happen.
    reason: str
    #: Bytes of the smallest layout.
    needs_bytes: int
    #: Until it is expected to serve; None when that takes more than the passing of time.
    estimate: timedelta | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do now, in order, and what is not done."""

    actions: tuple[Action, ...] = ()
    refusals: tuple[Refusal, ...] = ()
