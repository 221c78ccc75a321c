"""
The desired number of hosts of a class, with its reasons.

Enough hosts that the steps in flight have slots, and that waiting steps begin within the target.
More hosts are asked for at most once in the cool-down; fewer only after fewer have sufficed for the whole cool-down.
A host is given up after it was drained: nothing that works on it is lost. What is needed again is not drained further.
An unchanged wish is no request.

Nothing here reads a clock or a database: the caller passes `now` and stores the new state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from fnmatch import fnmatchcase

from app.fleet.host import HostState
from app.kernel.sections.scaler import ScaledClass

#: Most reasons of a decision, and most models that one names.
_REASONS, _NAMED = 16, 5


@dataclass(frozen=True, slots=True)
class ModelLoad:
    """What a model needs of the hosts of one class."""

    model: str
    #: Bytes of one pool on one host, and steps that it executes at the same time.
    bytes: int
    slots: int
    #: Waiting steps, the slot seconds that they will take, and since when the oldest waits, in seconds.
    steps: int = 0
    work: float = 0.0
    oldest: float = 0.0
    #: Steps in flight.
    busy: int = 0
    #: A pool of it serves or begins.
    is_placed: bool = False


@dataclass(frozen=True, slots=True)
class ScaledHost:
    """A host of the class."""

    name: str
    state: HostState
    #: Pools that hold bytes, and steps in flight.
    pools: int = 0
    busy: int = 0


@dataclass(frozen=True, slots=True)
class ScalerState:
    """What is remembered of a class between passes."""

    #: The number of hosts that was last asked for; None before the first decision.
    hosts: int | None = None
    #: Rises with each request.
    number: int = 0
    #: When more were last asked for, and since when fewer have sufficed.
    raised_at: datetime | None = None
    below_since: datetime | None = None
    #: Hosts that are drained in order to be given up.
    draining: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ScalerLimits:
    """The settings that hold for all classes."""

    target_wait: timedelta
    up_cooldown: timedelta
    down_cooldown: timedelta


@dataclass(frozen=True, slots=True)
class ScalerDecision:
    """What one pass decides of a class."""

    #: Hosts that the demand needs, within the limits of the class.
    needed: int
    #: Hosts that are asked for now.
    hosts: int
    reasons: tuple[str, ...]
    state: ScalerState
    #: Whether the receiver is asked: the number has changed, or hosts are given up.
    is_asked: bool = False
    #: Hosts to drain, to make schedulable again, and to give up.
    drain: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    release: tuple[str, ...] = ()


@dataclass(slots=True)
class _Need:
    hosts: float = 0.0
    least: float = 0.0
    reasons: list[str] = field(default_factory=list)


def needed_hosts(scaled: ScaledClass, loads: Sequence[ModelLoad], target_wait: timedelta) -> tuple[int, list[str]]:
    """Return how many hosts the demand needs, within the limits of the class, and why."""
    need = _Need()
    for load in loads:
        pools = scaled.devices * (scaled.bytes // max(1, load.bytes))
        if not pools:
            if load.steps:
                need.reasons.append(f"{load.model} fits on no host of the class: it needs {load.bytes} bytes")
            continue
        slots = pools * max(1, load.slots)
        need.hosts += load.busy / slots + load.work / slots / target_wait.total_seconds()
        if load.steps and not load.is_placed and load.oldest > target_wait.total_seconds():
            need.least += load.bytes / (scaled.bytes * scaled.devices)
            need.reasons.append(f"{load.model} could not be placed for {load.oldest:.0f} s")
        if load.steps or load.busy:
            need.least = max(need.least, 1e-9)
            need.reasons.append(
                f"{load.model}: {load.steps} steps wait with {load.work:.0f} s of work, {load.busy} are in flight; "
                f"a host has {slots} slots"
            )
    wanted = math.ceil(max(need.hosts + (need.least if need.least > 1e-6 else 0.0), need.least) - 1e-9)
    wanted = max(wanted, 1) if need.least else wanted
    bounded = min(max(wanted, scaled.min), scaled.max)
    if bounded != wanted:
        need.reasons.insert(0, f"{wanted} would be needed; the limits of the class are {scaled.min} and {scaled.max}")
    return bounded, need.reasons[:_REASONS]


def decide(
    scaled: ScaledClass,
    loads: Sequence[ModelLoad],
    hosts: Sequence[ScaledHost],
    state: ScalerState,
    limits: ScalerLimits,
    now: datetime,
) -> ScalerDecision:
    """Return what is to be done for a class now."""
    own = [one for one in hosts if fnmatchcase(one.name, scaled.match) and one.state is not HostState.LOST]
    needed, reasons = needed_hosts(scaled, loads, limits.target_wait)
    asked = state.hosts if state.hosts is not None else len(own)
    known = {one.name: one for one in own}
    draining = [name for name in state.draining if name in known]
    state = replace(state, hosts=asked, draining=tuple(draining))
    if needed > asked - len(draining):
        return _raised(needed, asked, draining, state, limits, now, reasons)
    if needed == asked - len(draining):
        state = replace(state, below_since=None)
    elif state.below_since is None:
        state = replace(state, below_since=now)
    return _lowered(needed, asked, own, draining, state, limits, now, reasons)


def _raised(
    needed: int,
    asked: int,
    draining: list[str],
    state: ScalerState,
    limits: ScalerLimits,
    now: datetime,
    reasons: list[str],
) -> ScalerDecision:
    """Keep what was to be given up, and ask for the rest once the cool-down is over."""
    keep = tuple(draining[: max(0, needed - (asked - len(draining)))])
    state = replace(state, below_since=None, draining=tuple(name for name in draining if name not in keep))
    if needed <= asked:
        return ScalerDecision(needed, asked, tuple(reasons), state, keep=keep)
    if state.raised_at is not None and now < state.raised_at + limits.up_cooldown:
        wait = (state.raised_at + limits.up_cooldown - now).total_seconds()
        return ScalerDecision(needed, asked, (f"cool-down: {wait:.0f} s until more are asked for", *reasons), state,
                              keep=keep)  # fmt: skip
    state = replace(state, hosts=needed, number=state.number + 1, raised_at=now)
    return ScalerDecision(needed, needed, tuple(reasons), state, is_asked=True, keep=keep)


def _lowered(
    needed: int,
    asked: int,
    own: Sequence[ScaledHost],
    draining: list[str],
    state: ScalerState,
    limits: ScalerLimits,
    now: datetime,
    reasons: list[str],
) -> ScalerDecision:
    """Give up drained hosts, and drain further ones once fewer have sufficed for long enough."""
    by_name = {one.name: one for one in own}
    empty = [
        name
        for name in draining
        if by_name[name].state is HostState.DRAINING and not by_name[name].pools and not by_name[name].busy
    ]
    drain: list[str] = []
    missing = max(0, asked - len(own))
    if state.below_since is not None and now >= state.below_since + limits.down_cooldown:
        surplus = asked - len(draining) - needed
        # Hosts that have not joined need no drain: their places are given up first.
        missing = min(missing, surplus)
        free = sorted((one for one in own if one.name not in draining), key=lambda one: (one.busy, one.pools, one.name))
        drain = [one.name for one in free[: surplus - missing]]
        reasons = [f"{needed} hosts have sufficed for {limits.down_cooldown.total_seconds():.0f} s", *reasons]
        state = replace(state, below_since=None)
    elif state.below_since is not None:
        left = (state.below_since + limits.down_cooldown - now).total_seconds()
        reasons = [f"cool-down: {left:.0f} s until hosts are given up", *reasons]
        missing = 0
    else:
        missing = 0
    hosts = asked - len(empty) - missing
    state = replace(
        state,
        hosts=hosts,
        number=state.number + (hosts != asked),
        draining=(*(name for name in draining if name not in empty), *drain),
    )
    # A host that is to be drained and is not: a worker ended between the decision and the command.
    undone = [name for name in state.draining if by_name[name].state is not HostState.DRAINING]
    return ScalerDecision(
        needed, hosts, tuple(reasons), state, is_asked=hosts != asked, drain=tuple(undone), release=tuple(empty)
    )
