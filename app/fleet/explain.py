"""
Explain: why a model is not served, what must happen, and when it will be; in sentences for people.

Nothing here reads a clock or a database: the caller passes what is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from app.fleet.fleet import PoolState
from app.kernel.sizes import rounded


class Standing(StrEnum):
    """How a model stands."""

    #: A pool serves it.
    SERVED = "served"
    #: A pool of it begins.
    STARTING = "starting"
    #: A pool of it is granted, and waits for the bytes of others.
    WAITING = "waiting"
    #: It is asked for, and cannot be started now.
    REFUSED = "refused"
    #: Nobody asks for it.
    ASLEEP = "asleep"
    #: It was asked for a moment ago, and nothing is decided yet.
    PENDING = "pending"


@dataclass(frozen=True, slots=True)
class Seen:
    """A pool, as far as an explanation needs it."""

    name: str
    model: str
    state: PoolState
    places: Sequence[str]
    #: Of the loading, 0 to 1, and what it does.
    progress: float
    stage: str
    told: str
    since: datetime
    #: From its grant until it serves, as it was expected.
    estimate: timedelta
    busy: int
    slots: int
    #: Why it is to end.
    why: str
    #: Names of the pools that it waits for.
    after: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Refused:
    """The last refusal."""

    reason: str
    needs: int
    estimate: timedelta | None
    since: datetime


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a model."""

    model: str
    pools: Sequence[Seen]
    #: By name, the pools that others wait for.
    victims: Mapping[str, Seen]
    refused: Refused | None
    #: Steps that wait for it, and steps that it works on.
    ready: int
    running: int
    #: Orders to start it that nobody has answered yet.
    orders: int
    #: How its last pool ended, if it failed; empty otherwise.
    failure: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """An answer."""

    model: str
    standing: Standing
    #: Why it stands so.
    why: str
    #: What must happen until it serves, in order; nothing when it does.
    needs: tuple[str, ...] = ()
    #: Until it serves; None when that takes more than the passing of time, or nobody knows.
    estimate: timedelta | None = None


def explain(facts: Facts, now: datetime) -> Explanation:
    """How the model stands, and why."""
    by_state: dict[PoolState, list[Seen]] = {}
    for pool in facts.pools:
        by_state.setdefault(pool.state, []).append(pool)
    if served := by_state.get(PoolState.SERVING):
        return _served(facts, served)
    if starting := by_state.get(PoolState.STARTING):
        return _starting(facts, starting[0], now)
    if waiting := by_state.get(PoolState.WAITING):
        return _waiting(facts, waiting[0], now)
    asked = _asked(facts)
    if facts.refused is not None:
        refused = facts.refused
        needs = f"it needs {rounded(refused.needs)}" if refused.needs else ""
        why = f"{asked}; {refused.reason}"
        return Explanation(facts.model, Standing.REFUSED, why, (needs,) if needs else (), refused.estimate)
    if facts.ready or facts.orders:
        return Explanation(facts.model, Standing.PENDING, f"{asked}; the next turn of the reconciler decides")
    leaving = by_state.get(PoolState.DRAINING, []) + by_state.get(PoolState.SUSPECT, [])
    last = f"; {leaving[0].name} ends: {leaving[0].why}" if leaving else ""
    failed = f"; its last pool failed: {facts.failure}" if facts.failure else ""
    return Explanation(facts.model, Standing.ASLEEP, f"nobody asks for it{last}{failed}")


def _served(facts: Facts, pools: Sequence[Seen]) -> Explanation:
    slots, busy = sum(pool.slots for pool in pools), sum(pool.busy for pool in pools)
    places = ", ".join(place for pool in pools for place in pool.places)
    why = f"{_count(len(pools), 'pool')} on {places}: {busy} of {_count(slots, 'slot')} busy"
    if facts.ready:
        why += f", {_count(facts.ready, 'step')} waiting for a slot"
    return Explanation(facts.model, Standing.SERVED, why, (), timedelta(0))


def _starting(facts: Facts, pool: Seen, now: datetime) -> Explanation:
    done = f" ({pool.progress:.0%})" if pool.stage == "loading" else ""
    why = f"{_asked(facts)}; {pool.name} is {pool.stage}{done} on {', '.join(pool.places)}"
    return Explanation(facts.model, Standing.STARTING, why, ("it loads",), _left(pool, now))


def _waiting(facts: Facts, pool: Seen, now: datetime) -> Explanation:
    needs = []
    for name in pool.after:
        victim = facts.victims.get(name)
        if victim is None:
            continue
        busy = f" finishes {_count(victim.busy, 'step')} and" if victim.busy else ""
        needs.append(f"{victim.name} ({victim.model}) on {', '.join(victim.places)}{busy} ends: {victim.why}")
    why = f"{_asked(facts)}; {pool.name} is granted {', '.join(pool.places)} and waits for the bytes of others"
    return Explanation(facts.model, Standing.WAITING, why, (*needs, "it loads"), _left(pool, now))


def _left(pool: Seen, now: datetime) -> timedelta:
    return max(pool.since + pool.estimate - now, timedelta(0))


def _asked(facts: Facts) -> str:
    if facts.ready:
        return f"{_count(facts.ready, 'step')} {'waits' if facts.ready == 1 else 'wait'} for it"
    return (
        "an operator wants it"
        if facts.orders
        else "it is to be kept up"
        if facts.refused or facts.pools
        else "nobody asks for it"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
