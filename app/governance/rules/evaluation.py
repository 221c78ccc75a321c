"""
The evaluation of a rule: a pure function from what was measured, and what is remembered, to the next state.

    quiet → pending     its conditions hold
    pending → firing    they have held for long enough, and the cooldown is over
    pending → quiet     they ceased before
    firing → cleared    they have ceased for long enough; from then on it is quiet

A condition without observations does not hold. One that has held holds until its value for `clear` is passed too, so a
value that wavers about the threshold changes nothing. Times without evaluation do not count: `since` is the instant
from which on rules were evaluated without a long break.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from typing import Any

from app.governance.rules.rule import ExpressionCondition, Rule, SignalCondition
from app.governance.signals.names import SIGNALS, Statistic, Unit
from app.kernel.units import durations

_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
}


class RulePhase(StrEnum):
    """Where a rule is, for one value of its label."""

    QUIET = "quiet"
    PENDING = "pending"
    FIRING = "firing"


class FiringChange(StrEnum):
    """What an evaluation changes."""

    #: A pending firing begins, and ends without having fired.
    BEGAN = "began"
    CEASED = "ceased"
    FIRED = "fired"
    CLEARED = "cleared"


@dataclass(frozen=True, slots=True)
class Reading:
    """What a condition saw."""

    #: The statistic; None without observations. Of an expression: None.
    value: float | None = None
    observations: int = 0
    #: The value of an expression.
    holds: bool = False
    #: Why an expression has no value.
    problem: str = ""


@dataclass(frozen=True, slots=True)
class RuleMemory:
    """What is remembered of a rule and a value of its label."""

    version: int = 0
    phase: RulePhase = RulePhase.QUIET
    #: Since when each condition holds; None: it does not.
    held: tuple[datetime | None, ...] = ()
    #: Since when the conditions hold together, each for as long as it says.
    met_since: datetime | None = None
    #: Since when a firing rule's conditions do not hold.
    ceased_since: datetime | None = None
    #: When the last firing began.
    fired_at: datetime | None = None

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to remember but a cooldown that may be over."""
        return self.phase is RulePhase.QUIET and not any(self.held)

    def as_json(self) -> dict[str, Any]:
        """Return it as it is stored."""
        return {
            "version": self.version,
            "phase": self.phase,
            "held": [_text(at) for at in self.held],
            "met_since": _text(self.met_since),
            "ceased_since": _text(self.ceased_since),
            "fired_at": _text(self.fired_at),
        }

    @staticmethod
    def of_json(stored: Mapping[str, Any]) -> RuleMemory:
        """Return it as it was stored."""
        return RuleMemory(
            stored["version"],
            RulePhase(stored["phase"]),
            tuple(_instant(at) for at in stored["held"]),
            _instant(stored["met_since"]),
            _instant(stored["ceased_since"]),
            _instant(stored["fired_at"]),
        )


@dataclass(frozen=True, slots=True)
class Decision:
    """What an evaluation decides."""

    memory: RuleMemory
    change: FiringChange | None = None
    reason: str = ""
    #: What the conditions saw, by their position.
    values: Mapping[str, Any] = field(default_factory=dict)


def decide(
    rule: Rule,
    version: int,
    memory: RuleMemory,
    readings: Sequence[Reading],
    now: datetime,
    since: datetime,
    *,
    active: bool = True,
) -> Decision:
    """Return what follows from the readings of all conditions, in their order."""
    if not active:
        return stop(memory, "outside the hours of its schedule")
    if memory.version != version:
        if memory.phase is not RulePhase.QUIET:
            return stop(memory, "the rule was changed")
        memory = RuleMemory(version, fired_at=memory.fired_at)
    held = _held(rule, memory, readings, now)
    combine = all if rule.all else any
    holds_now = combine(at is not None for at in held)
    met = combine(
        at is not None and _long_enough(now, at, since, condition.for_)
        for at, condition in zip(held, rule.conditions, strict=True)
    )
    values = _values(rule, readings, held)
    if memory.phase is RulePhase.FIRING:
        return _while_firing(rule, memory, held, holds_now, now, since, values)
    met_since = (memory.met_since or now) if met else None
    following = replace(memory, held=held, met_since=met_since)
    if not holds_now:
        ceased = memory.phase is RulePhase.PENDING
        quiet = replace(following, phase=RulePhase.QUIET, met_since=None)
        return Decision(quiet, FiringChange.CEASED if ceased else None, "its conditions ceased" if ceased else "")
    cooled = memory.fired_at is None or now - memory.fired_at >= rule.cooldown
    reason = describe(rule, readings, held)
    if met_since is not None and cooled and _long_enough(now, met_since, since, rule.for_):
        fired = replace(following, phase=RulePhase.FIRING, fired_at=now, ceased_since=None)
        return Decision(fired, FiringChange.FIRED, reason, values)
    pending = replace(following, phase=RulePhase.PENDING)
    return Decision(pending, FiringChange.BEGAN if memory.phase is RulePhase.QUIET else None, reason, values)


def stop(memory: RuleMemory, reason: str) -> Decision:
    """Return the end of what is open: the rule is not evaluated, for this reason."""
    quiet = RuleMemory(memory.version, fired_at=memory.fired_at)
    changes = {RulePhase.PENDING: FiringChange.CEASED, RulePhase.FIRING: FiringChange.CLEARED}
    return Decision(quiet, changes.get(memory.phase), reason)


def _while_firing(
    rule: Rule,
    memory: RuleMemory,
    held: tuple[datetime | None, ...],
    holds_now: bool,
    now: datetime,
    since: datetime,
    values: Mapping[str, Any],
) -> Decision:
    if holds_now:
        return Decision(replace(memory, held=held, ceased_since=None), values=values)
    ceased_since = memory.ceased_since or now
    if _long_enough(now, ceased_since, since, rule.clear_for):
        quiet = RuleMemory(memory.version, held=held, fired_at=memory.fired_at)
        return Decision(quiet, FiringChange.CLEARED, "its conditions ceased", values)
    return Decision(replace(memory, held=held, ceased_since=ceased_since), values=values)


def _long_enough(now: datetime, begin: datetime, since: datetime, wanted: Any) -> bool:
    """Whether something that began then has lasted so long, times without evaluation left out."""
    return bool(now - max(begin, min(since, now)) >= wanted)


def _held(rule: Rule, memory: RuleMemory, readings: Sequence[Reading], now: datetime) -> tuple[datetime | None, ...]:
    before = memory.held or (None,) * len(rule.conditions)
    return tuple(
        (at or now) if _holds(condition, reading, at is not None) else None
        for condition, reading, at in zip(rule.conditions, readings, before, strict=True)
    )


def _holds(condition: SignalCondition | ExpressionCondition, reading: Reading, before: bool) -> bool:
    if isinstance(condition, ExpressionCondition) or condition.absent:
        return reading.holds
    if reading.value is None or reading.observations < condition.at_least:
        return False
    assert condition.operator is not None, "it was checked"
    assert condition.threshold is not None, "it was checked"
    bound = condition.clear if before and condition.clear is not None else condition.threshold
    return _OPERATORS[condition.operator](reading.value, bound)


def statistic_of(condition: SignalCondition) -> Statistic:
    """Return the statistic of a condition."""
    return condition.statistic or SIGNALS[condition.signal].statistics[0]


def describe(rule: Rule, readings: Sequence[Reading], held: Sequence[datetime | None]) -> str:
    """Return why a rule fires: the conditions that hold, with their values."""
    parts = [
        _described(condition, reading)
        for condition, reading, at in zip(rule.conditions, readings, held, strict=True)
        if at is not None
    ]
    return (" and " if rule.all else ", ").join(parts)


def _described(condition: SignalCondition | ExpressionCondition, reading: Reading) -> str:
    window = durations.show(condition.window)
    if isinstance(condition, ExpressionCondition):
        return f"{condition.expression} (in {window})"
    scope = "".join(f" of {name} {value}" for name, value in sorted(condition.scope.items()))
    if condition.absent:
        return f"no {condition.signal}{scope} in {window}"
    unit = SIGNALS[condition.signal].unit
    compared = f"{condition.operator} {shown(condition.threshold, unit)}"
    return (
        f"{condition.signal}{scope} is {shown(reading.value, unit)} ({statistic_of(condition)} in {window}), {compared}"
    )


def shown(value: float | None, unit: Unit) -> str:
    """Return a value for a person."""
    if value is None:
        return "unknown"
    if unit is Unit.RATIO:
        return f"{value:.3g}" if value > 10 else f"{value * 100:.4g} %"
    return f"{value:.4g}" + (" s" if unit is Unit.SECONDS else "")


def _values(rule: Rule, readings: Sequence[Reading], held: Sequence[datetime | None]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for place, (condition, reading, at) in enumerate(zip(rule.conditions, readings, held, strict=True)):
        seen: dict[str, Any] = {"holds": at is not None}
        if isinstance(condition, ExpressionCondition):
            seen["expression"] = condition.expression
        else:
            seen |= {"signal": condition.signal, "observations": reading.observations}
            if not condition.absent:
                seen |= {"statistic": statistic_of(condition).value, "value": reading.value}
        if reading.problem:
            seen["problem"] = reading.problem[:500]
        found[str(place)] = seen
    return found


def _text(at: datetime | None) -> str | None:
    return None if at is None else at.isoformat()


def _instant(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)
