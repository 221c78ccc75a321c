"""
Checks of a rule document that need no database.

One call reports every problem, each with its path, its line (where the source has lines) and what would be accepted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from app.governance.rules.readings import PREVIOUS_NAME, SIGNALS_NAME
from app.governance.rules.rule import (
    CONDITION_TAGS,
    RULE_NAME,
    ActiveHours,
    ExpressionCondition,
    Rule,
    RuleAction,
    SignalCondition,
)
from app.governance.signals.names import SIGNALS, Statistic, Unit
from app.kernel.errors import InvalidInput, Problem
from app.kernel.units import durations
from app.workflows.expressions import conditions
from app.workflows.expressions.cel.tree import Malformed
from app.workflows.expressions.templates import Scope
from app.workflows.language import source
from app.workflows.language.shape_errors import nearest
from app.workflows.language.source import SourceDocument

#: How messages call the input.
SUBJECT = "rule"
#: Most rules in one file.
MAX_RULES = 500
#: Ratios of which a value above one is possible.
_UNBOUNDED = frozenset({"pool_memory", "thrash_rate"})
_SCOPE = Scope(inputs=(), steps=(), extra=(SIGNALS_NAME, PREVIOUS_NAME), roots=())

#: Returns the problems of an action at a path.
ActionCheck = Callable[[RuleAction, str], Iterable[Problem]]


def no_action_problems(_: RuleAction, __: str) -> Iterable[Problem]:
    """Find no problem: for documents whose actions were checked before."""
    return ()


def parse(text: str) -> list[SourceDocument]:
    """Return the rules of a file: one, or a list under `rules`. Raises InvalidInput."""
    try:
        document = source.read(text)
    except InvalidInput as error:
        raise InvalidInput(error.problems, SUBJECT) from None
    if isinstance(document.data, dict) and set(document.data) == {"rules"}:
        listed = document.data["rules"]
        if not isinstance(listed, list) or not 0 < len(listed) <= MAX_RULES:
            problem = Problem("rules", "this is not a list of rules", f"a list of 1 to {MAX_RULES} rules")
            raise InvalidInput([problem], SUBJECT)
        return [SourceDocument(one, document.lines, f"rules[{place}]") for place, one in enumerate(listed)]
    return [document]


def check(document: SourceDocument, namespace: str = "", check_action: ActionCheck = no_action_problems) -> Rule:
    """
    Return a rule from plain data. Raises InvalidInput with every problem found.

    A rule of a namespace sees only signals of that namespace; one with the namespace '' sees all.
    """
    try:
        try:
            rule = Rule.model_validate(document.data)
        except ValidationError as error:
            raise InvalidInput([_problem(item) for item in error.errors()[:50]]) from None
        _require(rule, namespace, check_action)
    except InvalidInput as error:
        found = [_placed(problem, document) for problem in error.problems]
        raise InvalidInput(sorted(found, key=lambda problem: problem.line or 0), SUBJECT) from None
    return rule


def _require(rule: Rule, namespace: str, check_action: ActionCheck) -> None:
    """Raise InvalidInput with every problem of a rule of the right shape."""
    found = list(_problems(rule, namespace))
    for place, action in enumerate(rule.actions):
        found += check_action(action, f"actions[{place}]")
    if found:
        raise InvalidInput(found)


def name_of(document: SourceDocument) -> str:
    """Return the name that a document gives its rule. Raises InvalidInput."""
    name = document.data.get("rule") if isinstance(document.data, dict) else None
    if not isinstance(name, str) or re.fullmatch(RULE_NAME, name, re.ASCII) is None:
        problem = Problem("rule", f"{_shown(name)} is not a name of a rule", "lower-case words joined by hyphens")
        raise InvalidInput([_placed(problem, document)], SUBJECT)
    return name


def stored(document: Mapping[str, Any]) -> Rule:
    """Return a rule that was checked and stored. Raises InvalidInput when this version knows no such rule any more."""
    return check(SourceDocument(document, {}))


def _placed(problem: Problem, document: SourceDocument) -> Problem:
    where = f"{document.prefix}.{problem.where}".strip(".") if document.prefix else problem.where
    return Problem(where, problem.message, problem.accepted, document.line(problem.where))


def _problems(rule: Rule, namespace: str) -> Iterator[Problem]:
    if bool(rule.all) == bool(rule.any):
        yield Problem("all", "a rule needs either 'all' or 'any'", "a list of conditions under one of the two")
        return
    name = "all" if rule.all else "any"
    for place, condition in enumerate(rule.conditions):
        yield from _condition_problems(condition, f"{name}[{place}]", namespace)
    if rule.by is not None and not any(rule.by in labels for labels in _labels(rule.conditions)):
        known = sorted({label for labels in _labels(rule.conditions) for label in labels})
        yield Problem("by", f"no signal of the rule has the label {rule.by!r}", ", ".join(known) or "leave it out")
    if rule.schedule is not None:
        yield from _schedule_problems(rule.schedule)


def _labels(found: Sequence[SignalCondition | ExpressionCondition]) -> Iterator[tuple[str, ...]]:
    for condition in found:
        for signal in _signals(condition):
            yield SIGNALS[signal].labels


def _signals(condition: SignalCondition | ExpressionCondition) -> set[str]:
    if isinstance(condition, SignalCondition):
        return {condition.signal} & SIGNALS.keys()
    try:
        return {path[1] for path in conditions.paths(condition.expression) if len(path) > 1} & SIGNALS.keys()
    except (Malformed, RecursionError):  # it is not an expression, which is reported
        return set()


def _condition_problems(
    condition: SignalCondition | ExpressionCondition, where: str, namespace: str
) -> Iterator[Problem]:
    if isinstance(condition, ExpressionCondition):
        problems = list(_expression_problems(condition, f"{where}.expression"))
    else:
        problems = list(_signal_problems(condition, where))
    yield from problems
    if problems:
        return
    for signal in sorted(_signals(condition)):
        labels = SIGNALS[signal].labels
        for label in sorted(set(condition.scope) - set(labels)):
            accepted = ", ".join(labels) or "no label: leave it out"
            yield Problem(f"{where}.scope.{label}", f"the signal {signal!r} has no label {label!r}", accepted)
        if namespace and "namespace" not in labels:
            known = ", ".join(name for name, one in SIGNALS.items() if "namespace" in one.labels)
            message = f"the signal {signal!r} is of the whole installation, and the rule of a namespace"
            yield Problem(f"{where}.signal", message, known)
    if namespace and condition.scope.get("namespace", namespace) != namespace:
        yield Problem(f"{where}.scope.namespace", "this is another namespace than that of the rule", namespace)


def _signal_problems(condition: SignalCondition, where: str) -> Iterator[Problem]:
    definition = SIGNALS.get(condition.signal)
    if definition is None:
        yield Problem(f"{where}.signal", f"there is no signal {condition.signal!r}", nearest(condition.signal, SIGNALS))
        return
    if condition.absent:
        given = condition.model_fields_set & {"operator", "threshold", "clear", "statistic", "at_least"}
        for field in sorted(given):
            yield Problem(f"{where}.{field}", "a condition with 'absent' compares nothing", "leave it out")
        return
    if condition.operator is None or condition.threshold is None:
        missing = "operator" if condition.operator is None else "threshold"
        accepted = ">, >=, <, <=, ==, !=" if condition.operator is None else "a number"
        yield Problem(f"{where}.{missing}", "this field is missing", f"{accepted}; or absent: true")
        return
    if condition.statistic is not None and condition.statistic not in definition.statistics:
        accepted = ", ".join(definition.statistics)
        message = f"the signal {condition.signal!r} has no {condition.statistic.value!r}"
        yield Problem(f"{where}.statistic", message, accepted)
        return
    statistic = condition.statistic or definition.statistics[0]
    is_ratio = definition.unit is Unit.RATIO and definition.name not in _UNBOUNDED
    if is_ratio and statistic not in (Statistic.COUNT, Statistic.SUM, Statistic.PER_MINUTE):
        for field, value in (("threshold", condition.threshold), ("clear", condition.clear)):
            if value is not None and not 0 <= value <= 1:
                yield Problem(f"{where}.{field}", f"{value:g} is no ratio", "from 0 to 1: 0.8 for 80 %")
    if condition.clear is not None:
        yield from _clear_problems(condition, where)


def _clear_problems(condition: SignalCondition, where: str) -> Iterator[Problem]:
    threshold, clear = condition.threshold, condition.clear
    assert threshold is not None, "the caller has looked"
    assert clear is not None, "the caller has looked"
    if condition.operator in ("==", "!="):
        yield Problem(f"{where}.clear", f"'clear' has no meaning with {condition.operator!r}", "leave it out")
    elif condition.operator in (">", ">=") and clear > threshold:
        yield Problem(f"{where}.clear", f"{clear:g} is above the threshold", f"at most {threshold:g}")
    elif condition.operator in ("<", "<=") and clear < threshold:
        yield Problem(f"{where}.clear", f"{clear:g} is below the threshold", f"at least {threshold:g}")


def _expression_problems(condition: ExpressionCondition, where: str) -> Iterator[Problem]:
    problems = conditions.check(condition.expression, where, _SCOPE)
    yield from problems
    if problems:
        return
    found = sorted(conditions.paths(condition.expression))
    if not any(len(path) > 1 for path in found):
        yield Problem(where, "the expression reads no signal", "such as signals.error_rate.mean > 0.2")
    for path in found:
        if len(path) < 3:
            yield Problem(where, f"{'.'.join(path)!r} is not a statistic of a signal", f"{path[0]}.error_rate.mean")
        elif path[1] not in SIGNALS:
            yield Problem(where, f"there is no signal {path[1]!r}", nearest(path[1], SIGNALS))
        elif path[2] not in (known := SIGNALS[path[1]].statistics):
            yield Problem(where, f"the signal {path[1]!r} has no {path[2]!r}", ", ".join(known))


def _schedule_problems(schedule: ActiveHours) -> Iterator[Problem]:
    try:
        ZoneInfo(schedule.timezone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        yield Problem("schedule.timezone", "the time zone is unknown", "a name of the IANA database")
    if not schedule.days and schedule.hours is None:
        yield Problem("schedule", "this is empty", "days: [mon, tue], or hours: 08:00-18:00")
    if schedule.hours is not None and len(set(schedule.hours.split("-"))) == 1:
        yield Problem("schedule.hours", "the hours end when they begin", "such as 08:00-18:00")


_FIELDS: Mapping[str, Sequence[str]] = {
    "": [field.alias or name for name, field in Rule.model_fields.items()],
    "signal": [field.alias or name for name, field in SignalCondition.model_fields.items()],
    "expression": [field.alias or name for name, field in ExpressionCondition.model_fields.items()],
    "schedule": list(ActiveHours.model_fields),
    "actions": [field.alias or name for name, field in RuleAction.model_fields.items()],
}


def _problem(item: ErrorDetails) -> Problem:
    location, kind, given, context = item["loc"], item["type"], item["input"], item.get("ctx", {})
    place, fields = "", _FIELDS[""]
    for before, part in zip(("", *location), location, strict=False):
        if isinstance(before, int) and part in CONDITION_TAGS:
            fields = _FIELDS[str(part)]
            continue
        place += f"[{part}]" if isinstance(part, int) else f".{str(part)[:200]}"
        fields = _FIELDS.get(str(part), fields)
    where, shown = place.removeprefix("."), _shown(given)
    match kind:
        case "extra_forbidden":
            return Problem(where, "unknown field", nearest(str(location[-1]), fields))
        case "missing":
            return Problem(where, "this field is missing")
        case "model_type" | "model_attributes_type":
            return Problem(where, "this must be a mapping of fields")
        case "enum" | "literal_error":
            return Problem(where, f"{shown} is not supported here", str(context["expected"]))
        case "string_pattern_mismatch" if where == "rule":
            return Problem(where, f"{shown} is not a name of a rule", "lower-case words joined by hyphens")
        case "greater_than_equal" | "less_than_equal":
            bound = context.get("ge", context.get("le"))
            text = f"{bound:g}" if isinstance(bound, int | float) else str(bound)
            return Problem(where, f"{shown} is out of range", f"{'at least' if 'ge' in context else 'at most'} {text}")
    message = item["msg"].removeprefix("Value error, ")
    return Problem(where, message if isinstance(given, dict | list) else f"{shown}: {message}")


def _shown(value: Any) -> str:
    text = repr(durations.show(value) if isinstance(value, timedelta) else value)
    return text if len(text) <= 100 else f"{text[:99]}…"
