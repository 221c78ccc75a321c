"""
The test of a rule against history: when it would have fired.

The rule is evaluated with the same functions as in the evaluation job, at each minute of the last day or at each hour
of a longer time, on what was measured up to then. Windows shorter than an hour see the whole hour there.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from app.governance.rules import active_hours, readings
from app.governance.rules.evaluation import FiringChange, RuleMemory, decide
from app.governance.rules.readings import Wanted
from app.governance.rules.rule import Rule
from app.governance.signals.sample import Aggregate, WindowValue

#: Most values of the rule's label that are tested; those with the most points.
MAX_TESTED_GROUPS = 50
#: Most evaluations of a condition.
_MAX_EVALUATIONS = 150_000
#: The least part of a window between two evaluations.
_STEPS_OF_WINDOW = 60


@dataclass(frozen=True, slots=True)
class HistoryPoint:
    """What was observed in a minute or an hour, for a value of a label."""

    at: datetime
    group: str
    aggregate: Aggregate


@dataclass(frozen=True, slots=True)
class PastFiring:
    """A firing that would have been."""

    value: str
    pending_at: datetime
    fired_at: datetime
    #: None: it would still fire.
    cleared_at: datetime | None
    reason: str


@dataclass(frozen=True, slots=True)
class HistoryTest:
    """The result of a test."""

    begin: datetime
    end: datetime
    #: Between two evaluations.
    step: timedelta
    #: Evaluations for each value, and the values of the label that were tested.
    evaluations: int
    groups: tuple[str, ...]
    firings: tuple[PastFiring, ...]
    #: The part of the time in which it fired for any value, from 0 to 1.
    firing_ratio: float
    #: The first instant for which anything was measured; None: nothing was.
    measured_from: datetime | None


@dataclass(slots=True)
class _Series:
    """The points of a window and a value of a label, in the order of time."""

    points: list[HistoryPoint] = field(default_factory=list)
    #: The points in the window are those from `first` until `next`.
    first: int = 0
    next: int = 0

    def window(self, begin: datetime, end: datetime, seconds: float) -> WindowValue | None:
        """Return the value of the points that begin in `[begin, end)`. Both only ever rise."""
        while self.next < len(self.points) and self.points[self.next].at < end:
            self.next += 1
        while self.first < self.next and self.points[self.first].at < begin:
            self.first += 1
        if self.first == self.next:
            return None
        total = Aggregate()
        for point in self.points[self.first : self.next]:
            total.add(point.aggregate)
        newest = self.points[self.next - 1].aggregate
        return WindowValue(
            total.observations,
            total.weight,
            total.total,
            total.least,
            total.greatest,
            newest.total / max(newest.weight, 1),
            seconds,
            total.histogram,
        )


def replay(
    rule: Rule,
    namespace: str,
    points: Mapping[Wanted, Sequence[HistoryPoint]],
    begin: datetime,
    end: datetime,
    resolution: timedelta,
) -> HistoryTest:
    """Return when the rule would have fired between two instants; `points` reach back by the windows."""
    groups = _groups(rule, points)
    step = _step(rule, begin, end, resolution, len(groups))
    series = {wanted: _by_group(found, groups if wanted.by else ("",)) for wanted, found in points.items()}
    ticks = [begin + step * n for n in range(1, (end - begin) // step + 1)]
    firings, seconds_firing = [], 0
    memories = {group: RuleMemory(1) for group in groups}
    open_: dict[str, PastFiring] = {}
    pending: dict[str, datetime] = {}
    measured = min((found[0].at for found in points.values() if found), default=None)
    since = measured or begin
    for now in ticks:
        values = {wanted: _window_values(found, wanted, now, resolution) for wanted, found in series.items()}
        active = active_hours.is_active(rule.schedule, now)
        for group in groups:
            seen = readings.readings(rule, namespace, group, values, since, now)
            decision = decide(rule, 1, memories[group], seen, now, begin, active=active)
            memories[group] = decision.memory
            match decision.change:
                case FiringChange.BEGAN:
                    pending[group] = now
                case FiringChange.FIRED:
                    open_[group] = PastFiring(group, pending.pop(group, now), now, None, decision.reason)
                case FiringChange.CEASED:
                    pending.pop(group, None)
                case FiringChange.CLEARED:
                    found = open_.pop(group)
                    firings.append(PastFiring(group, found.pending_at, found.fired_at, now, found.reason))
        seconds_firing += bool(open_)
    firings += open_.values()
    return HistoryTest(
        begin,
        end,
        step,
        len(ticks),
        groups,
        tuple(sorted(firings, key=lambda one: (one.fired_at, one.value))),
        seconds_firing / len(ticks) if ticks else 0.0,
        measured,
    )


def _groups(rule: Rule, points: Mapping[Wanted, Sequence[HistoryPoint]]) -> tuple[str, ...]:
    if rule.by is None:
        return ("",)
    counts: dict[str, int] = defaultdict(int)
    for wanted, found in points.items():
        for point in found if wanted.by else ():
            if point.group:
                counts[point.group] += 1
    return tuple(sorted(sorted(counts, key=lambda group: -counts[group])[:MAX_TESTED_GROUPS]))


def _step(rule: Rule, begin: datetime, end: datetime, resolution: timedelta, groups: int) -> timedelta:
    """Return the time between evaluations: a multiple of the resolution, so that the work is bounded."""
    longest = max(condition.window for condition in rule.conditions)
    step = max(resolution, longest / _STEPS_OF_WINDOW)
    evaluations = (end - begin) / step * groups * len(rule.conditions)
    step *= max(1.0, evaluations / _MAX_EVALUATIONS)
    return resolution * max(1, math.ceil(step / resolution))


def _by_group(points: Sequence[HistoryPoint], groups: Sequence[str]) -> dict[str, _Series]:
    found = {group: _Series() for group in groups}
    for point in points:
        if point.group in found:
            found[point.group].points.append(point)
    return found


def _window_values(
    found: Mapping[str, _Series], wanted: Wanted, now: datetime, resolution: timedelta
) -> dict[str, WindowValue]:
    length = max(wanted.window, resolution)
    end = now - wanted.ended
    begin = end - length
    # As in the evaluation job, a window begins with the minute or hour in which it begins.
    begin -= timedelta(seconds=begin.timestamp() % resolution.total_seconds())
    return dict(_present(found, begin, end, length.total_seconds()))


def _present(
    found: Mapping[str, _Series], begin: datetime, end: datetime, seconds: float
) -> Iterator[tuple[str, WindowValue]]:
    for group, series in found.items():
        value = series.window(begin, end, seconds)
        if value is not None:
            yield group, value
