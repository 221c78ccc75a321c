"""
The functions and operators of CEL over Python values.

A function raises `EvaluationError` for unsupported arguments, as CEL specifies: for `1 + 1.5` and for `1 / 0`.
Work is charged before it is done: `BudgetExceeded` is raised before an expression uses too much time or memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any

from app.workflows.expressions.cel import library, texts, vectors
from app.workflows.expressions.cel.values import (
    Budget,
    EvaluationError,
    Optional,
    are_numbers,
    charge_text,
    equal,
    index,
    int64,
    no_overload,
    type_of,
)

_ORDERED = (str, bool, datetime, timedelta)


def _compared(sign: str, compare: Callable[[Any, Any], bool]) -> Callable[..., bool]:
    def function(budget: Budget, left: Any, right: Any) -> bool:
        kinds = (type(left), type(right))
        if are_numbers(*kinds) or (kinds[0] is kinds[1] and kinds[0] in _ORDERED):
            if kinds[0] is str:
                budget.spend(min(len(left), len(right)) >> 6)
            return compare(left, right)
        raise no_overload(sign, left, right)

    return function


def _add(budget: Budget, left: Any, right: Any) -> Any:
    match left, right:
        case str(), str():
            charge_text(budget, len(left) + len(right))
            return left + right
        case list(), list():
            budget.spend(len(left) + len(right))
            return left + right
        case (datetime() | timedelta(), timedelta()) | (timedelta(), datetime()):
            return _moment(lambda: left + right)
    return _arithmetic("+", left, right, lambda: left + right)


def _subtract(_: Budget, left: Any, right: Any) -> Any:
    match left, right:
        case (datetime(), datetime() | timedelta()) | (timedelta(), timedelta()):
            return _moment(lambda: left - right)
    return _arithmetic("-", left, right, lambda: left - right)


#: The longest duration: CEL stores nanoseconds in 64 bits, which is 292 years.
_MAX_DURATION = timedelta(microseconds=(1 << 63) // 1000)


def _moment(make: Callable[[], Any]) -> Any:
    try:
        made = make()
    except OverflowError:
        raise EvaluationError("a timestamp or duration is out of range") from None
    if type(made) is timedelta and abs(made) > _MAX_DURATION:
        raise EvaluationError("a duration is out of range")
    return made


def _arithmetic(sign: str, left: Any, right: Any, make: Callable[[], Any]) -> Any:
    match type(left), type(right):
        case (kind, other) if kind is int and other is int:
            int64(left)
            int64(right)
            return int64(make())
        case (kind, other) if kind is float and other is float:
            return make()
    raise no_overload(sign, left, right)


def _multiply(_: Budget, left: Any, right: Any) -> Any:
    return _arithmetic("*", left, right, lambda: left * right)


def _divide(_: Budget, left: Any, right: Any) -> Any:
    def make() -> Any:
        if type(left) is int:
            if right == 0:
                raise EvaluationError("division by zero")
            quotient = abs(left) // abs(right)
            return quotient if (left < 0) == (right < 0) else -quotient
        if right == 0:
            return (
                math.nan if left == 0 or math.isnan(left) else math.copysign(math.inf, left) * math.copysign(1, right)
            )
        return left / right

    return _arithmetic("/", left, right, make)


def _remainder(_: Budget, left: Any, right: Any) -> int:
    if type(left) is not int or type(right) is not int:
        raise no_overload("%", left, right)
    int64(left)
    int64(right)
    if right == 0:
        raise EvaluationError("division by zero")
    rest = abs(left) % abs(right)
    return rest if left >= 0 else -rest


def _negate(_: Budget, value: Any) -> Any:
    if type(value) is int:
        return int64(-value)
    if type(value) is float:
        return -value
    raise no_overload("-", value)


def _not(_: Budget, value: Any) -> bool:
    if type(value) is bool:
        return not value
    raise no_overload("!", value)


def _in(budget: Budget, item: Any, of: Any) -> bool:
    if type(of) is list:
        return any(equal(budget, item, other) for other in of)
    if isinstance(of, Mapping) and type(item) in (str, int, float, bool):
        return type(item) is not bool and item in of
    raise no_overload("@in", item, of)


def _size(_: Budget, value: Any) -> int:
    if type(value) in (str, list) or isinstance(value, Mapping):
        return len(value)
    raise no_overload("size", value)


def _to_int(budget: Budget, value: Any) -> int:
    if type(value) in (int, bool):
        return int(value)
    if type(value) is float:
        if not math.isfinite(value):
            raise EvaluationError("infinity and NaN cannot be converted to an integer")
        return int64(int(value))
    return int(_of_kinds("int", str, datetime)(budget, value))


def _to_double(budget: Budget, value: Any) -> float:
    if type(value) is int:
        return float(int64(value))
    return value if type(value) is float else float(_of_kinds("double", str)(budget, value))


def _to_string(budget: Budget, value: Any) -> str:
    if type(value) is str:
        return value
    return str(_of_kinds("string", int, float, bool, datetime, timedelta)(budget, value))


def _to_bool(budget: Budget, value: Any) -> bool:
    return value if type(value) is bool else bool(_of_kinds("bool", str)(budget, value))


def _to_timestamp(budget: Budget, value: Any) -> Any:
    return value if type(value) is datetime else _of_kinds("timestamp", str, int)(budget, value)


def _to_duration(budget: Budget, value: Any) -> Any:
    return value if type(value) is timedelta else _of_kinds("duration", str)(budget, value)


def _of_kinds(name: str, *kinds: type) -> Callable[..., Any]:
    """Return a function that delegates to the library for one value of these types."""

    def called(budget: Budget, value: Any) -> Any:
        if type(value) not in kinds:
            raise no_overload(name, value)
        return library.call(budget, f"{name}(a)", value)

    return called


def _getter(name: str) -> Callable[..., Any]:
    def called(budget: Budget, moment: Any, *zone: Any) -> Any:
        if type(moment) not in (datetime, timedelta) or any(type(text) is not str for text in zone):
            raise no_overload(name, moment, *zone)
        return library.call(budget, f"a.{name}({'b' if zone else ''})", moment, *zone)

    return called


def _has_value(_: Budget, value: Any) -> bool:
    if type(value) is Optional:
        return bool(value.held)
    raise no_overload("hasValue", value)


def _value(_: Budget, value: Any) -> Any:
    if type(value) is not Optional:
        raise no_overload("value", value)
    if not value.held:
        raise EvaluationError("an optional has no value")
    return value.held[0]


_MOMENTS = ("FullYear", "Month", "Date", "DayOfMonth", "DayOfWeek", "DayOfYear", "Hours", "Minutes", "Seconds")

#: The functions and operators by their CEL names. The first argument of each is the budget. `program` implements `&&`,
#: `||`, `?:`, `or` and `orValue`, which do not always evaluate all of their arguments.
FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "_+_": _add,
    "_-_": _subtract,
    "_*_": _multiply,
    "_/_": _divide,
    "_%_": _remainder,
    "-_": _negate,
    "!_": _not,
    "_==_": equal,
    "_!=_": lambda budget, left, right: not equal(budget, left, right),
    "_<_": _compared("<", lambda left, right: bool(left < right)),
    "_<=_": _compared("<=", lambda left, right: bool(left <= right)),
    "_>_": _compared(">", lambda left, right: bool(left > right)),
    "_>=_": _compared(">=", lambda left, right: bool(left >= right)),
    "@in": _in,
    "_[_]": index,
    "size": _size,
    **texts.FUNCTIONS,
    **vectors.FUNCTIONS,
    "int": _to_int,
    "double": _to_double,
    "string": _to_string,
    "bool": _to_bool,
    "timestamp": _to_timestamp,
    "duration": _to_duration,
    **{f"get{name}": _getter(f"get{name}") for name in (*_MOMENTS, "Milliseconds")},
    "type": lambda _, value: type_of(value),
    "dyn": lambda _, value: value,
    "optional.of": lambda _, value: Optional((value,)),
    "optional.none": lambda _: Optional(),
    "hasValue": _has_value,
    "value": _value,
}
