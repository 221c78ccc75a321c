"""
What the conditions of a rule read, and what they make of it.

`queries` are the windows that a rule needs; many rules need the same ones, which are read once. `groups` and `readings`
are computed from what was read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from app.governance.rules.evaluation import Reading, statistic_of
from app.governance.rules.rule import ExpressionCondition, Rule, SignalCondition
from app.governance.signals.names import QUANTILES, SIGNALS, Statistic
from app.governance.signals.sample import WindowValue
from app.kernel.errors import StepFailure
from app.workflows.expressions import conditions

#: For so long a value of a label counts as known after its last observation: an absence is noticed for that long.
KNOWN_FOR = timedelta(days=1)
#: Most values of a label for which a rule is evaluated.
MAX_GROUPS = 500
#: The names of an expression: the window, and the one before it.
SIGNALS_NAME, PREVIOUS_NAME = "signals", "previous"


class Wanted(NamedTuple):
    """A window that a condition reads."""

    signal: str
    window: timedelta
    where: tuple[tuple[str, str], ...]
    by: str | None
    #: How long ago it ended: nothing, or its own length.
    ended: timedelta = timedelta(0)
    #: Whether quantiles are read, and the mean of the latest minute.
    quantiles: bool = False
    latest: bool = False

    def reads(self, statistics: Collection[str]) -> Wanted:
        """Return the window with what these statistics need."""
        quantiles = not QUANTILES.keys().isdisjoint(statistics)
        return self._replace(quantiles=quantiles, latest=Statistic.LAST in statistics)


#: Windows with their values, by the value of the label `by`, under '' without one.
WindowValues = Mapping[Wanted, Mapping[str, WindowValue]]


def queries(rule: Rule, namespace: str, *, known: bool = True) -> set[Wanted]:
    """Return the windows that a rule reads; without `known`, only those of its conditions."""
    return {
        wanted
        for condition in rule.conditions
        for wanted in _queries(condition, rule, namespace)
        if known or wanted.window == condition.window
    }


def groups(rule: Rule, namespace: str, found: WindowValues, open_: Iterable[str]) -> list[str]:
    """
    Return the values of its label for which a rule is evaluated; '' alone for a rule without a label.

    Those beyond the limit are left out, but none that has something open.
    """
    if rule.by is None:
        return sorted({"", *open_})
    seen = {value for wanted in queries(rule, namespace) if wanted.by for value in found.get(wanted, {}) if value}
    kept = set(open_)
    return sorted(kept | set(sorted(seen - kept)[:MAX_GROUPS]))


def readings(
    rule: Rule, namespace: str, group: str, found: WindowValues, since: datetime, now: datetime
) -> list[Reading]:
    """Return what each condition sees; rules were evaluated without a long break since `since`."""
    return [_reading(condition, rule, namespace, group, found, now - since) for condition in rule.conditions]


def _queries(condition: SignalCondition | ExpressionCondition, rule: Rule, namespace: str) -> Iterable[Wanted]:
    if isinstance(condition, SignalCondition):
        wanted = _wanted(condition.signal, condition, rule, namespace)
        yield wanted
        if condition.absent and wanted.by:
            yield wanted._replace(window=max(KNOWN_FOR, condition.window))
        return
    for root, signal in references(condition.expression):
        wanted = _wanted(signal, condition, rule, namespace)
        yield wanted if root == SIGNALS_NAME else wanted._replace(ended=condition.window)


def references(expression: str) -> set[tuple[str, str]]:
    """Return what an expression that was checked reads: `signals` or `previous`, and the name of a signal."""
    return {(path[0], path[1]) for path in conditions.paths(expression) if len(path) > 1 and path[1] in SIGNALS}


def _wanted(signal: str, condition: SignalCondition | ExpressionCondition, rule: Rule, namespace: str) -> Wanted:
    labels = SIGNALS[signal].labels
    statistics = _statistics_of(condition, signal)
    where: dict[str, str] = {name: value for name, value in condition.scope.items() if name in labels}
    if namespace:
        where["namespace"] = namespace
    by = rule.by if rule.by in labels else None
    return Wanted(signal, condition.window, tuple(sorted(where.items())), by).reads(statistics)


def _statistics_of(condition: SignalCondition | ExpressionCondition, signal: str) -> set[str]:
    """Return the statistics of a signal that a condition reads."""
    if isinstance(condition, SignalCondition):
        return set() if condition.absent else {statistic_of(condition)}
    paths = conditions.paths(condition.expression)
    return {path[2] for path in paths if len(path) > 2 and path[1] == signal}


def _reading(
    condition: SignalCondition | ExpressionCondition,
    rule: Rule,
    namespace: str,
    group: str,
    found: WindowValues,
    evaluated_for: timedelta,
) -> Reading:
    def value_of(wanted: Wanted) -> WindowValue | None:
        return found.get(wanted, {}).get(group if wanted.by else "")

    if isinstance(condition, ExpressionCondition):
        return _of_expression(condition, value_of, rule, namespace)
    wanted = _wanted(condition.signal, condition, rule, namespace)
    value = value_of(wanted)
    observations = 0 if value is None else value.observations
    if condition.absent:
        # What nobody read is not absent: the rules must have been evaluated for the whole window.
        return Reading(None, observations, holds=not observations and evaluated_for >= condition.window)
    return Reading(None if value is None else value.statistic(statistic_of(condition)), observations)


def _of_expression(
    condition: ExpressionCondition, value_of: Callable[[Wanted], WindowValue | None], rule: Rule, namespace: str
) -> Reading:
    data: dict[str, dict[str, Any]] = {SIGNALS_NAME: {}, PREVIOUS_NAME: {}}
    observations = 0
    for root, signal in references(condition.expression):
        wanted = _wanted(signal, condition, rule, namespace)
        value = value_of(wanted if root == SIGNALS_NAME else wanted._replace(ended=condition.window))
        data[root][signal] = statistics(signal, value)
        observations += 0 if value is None else value.observations
    try:
        return Reading(None, observations, holds=conditions.evaluate_bool(condition.expression, data))
    except StepFailure as failure:
        return Reading(None, observations, problem=failure.message)


def statistics(signal: str, value: WindowValue | None) -> dict[str, float | None]:
    """Return the statistics of a signal, as expressions see them; None where there are no observations."""
    allowed = SIGNALS[signal].statistics
    found: dict[str, float | None] = {name: value.statistic(name) if value else None for name in allowed}
    found[Statistic.COUNT] = float(value.observations) if value else 0.0
    return {str(name): number for name, number in found.items()}
