"""A plan: the actions that the reconciler applies, and the refusals. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum


class Purpose(StrEnum):
    """Why a pool is started."""

    #: Steps wait, and no pool serves them.
    DEMAND = "demand"
    #: Steps wait, and the pools of the model do not suffice.
    REPLICA = "replica"
    #: Steps will soon be ready.
    LOOK_AHEAD = "look_ahead"
    #: No step waits; its model is requested with regularity, and the next time is near.
    EXPECTED = "expected"
    #: The entry of the model, the settings or an operator keep a number of pools running.
    TARGET = "target"
    #: It replaces a pool on a device that is drained.
    EVACUATION = "evacuation"


class StopMode(StrEnum):
    """How a pool is stopped. It takes no new work in either mode."""

    #: Its steps end first.
    DRAIN = "drain"
    #: Its steps are requeued at the next token.
    PREEMPT = "preempt"


@dataclass(frozen=True, slots=True)
class StartPool:
    """Claim the bytes and start a pool, once the pools of `after` are gone."""

    configuration: str
    #: By id of the device. The pools of `after` cover what is not free.
    bytes: Mapping[str, int]
    purpose: Purpose
    reason: str
    #: Until it is expected to serve.
    estimate: timedelta
    #: Ids of pools that the same plan stops, or that drain already.
    after: frozenset[str] = frozenset()
    #: The namespace to whose quota it is charged.
    namespace: str = ""
    #: It is one of the pools that a pinned model keeps; the ledger never counts on its bytes for others.
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class StopPool:
    """Stop a pool."""

    pool: str
    mode: StopMode
    reason: str
    #: Id of the configuration that gets its bytes; empty when it makes room for none.
    room_for: str = ""


@dataclass(frozen=True, slots=True)
class MovePool:
    """Stop an idle pool and start another of its configuration on other devices, whose bytes are free."""

    pool: str
    #: By id of the device.
    bytes: Mapping[str, int]
    reason: str
    #: Until the new pool serves.
    estimate: timedelta


@dataclass(frozen=True, slots=True)
class GrantReserve:
    """Reserve bytes for a configuration."""

    configuration: str
    bytes: Mapping[str, int]
    reason: str


@dataclass(frozen=True, slots=True)
class DropReserve:
    """Return the bytes of a reserve."""

    reserve: str
    reason: str


Action = StartPool | StopPool | MovePool | GrantReserve | DropReserve


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why nothing is done for a model with demand."""

    configuration: str
    model: str
    #: With figures: what it needs, what is free, what must happen first.
    reason: str
    #: Bytes of the smallest layout.
    needs_bytes: int
    #: Until it is expected to serve; None when waiting alone does not help.
    estimate: timedelta | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """The actions, in order, and the refusals."""

    actions: tuple[Action, ...] = ()
    refusals: tuple[Refusal, ...] = ()
