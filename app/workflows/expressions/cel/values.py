"""
The values of CEL in Python, the budget for work on them, and their equality.

Null, booleans, 64-bit integers, doubles, strings, lists, maps, timestamps and durations are the native Python types.
This module defines the two others: a type as a value, and an optional value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice
from typing import Any

from app.workflows.expressions.cel.tree import OPERATORS

#: Maximum units of work of one evaluation. One unit: an evaluated part, a compared or copied item, 64 characters; about
#: a microsecond.
MAX_WORK = 1_000_000
#: Maximum characters of a created string.
MAX_TEXT = 4_000_000

_INT = range(-(1 << 63), 1 << 63)


class EvaluationError(Exception):
    """The expression cannot be evaluated over this data."""


class BudgetExceeded(Exception):
    """The expression needs more work or memory than it may use. `||` and `&&` do not absorb this error."""


class Budget:
    """The remaining work of one evaluation."""

    def __init__(self, left: int = MAX_WORK) -> None:
        self._left = left

    def spend(self, units: int) -> None:
        """Charge work that is about to be done. Raises BudgetExceeded when the budget is exhausted."""
        self._left -= units
        if self._left < 0:
            raise BudgetExceeded(f"it needs more than {MAX_WORK} units of work")


@dataclass(frozen=True, slots=True)
class TypeValue:
    """A type as a value: the result of `type(x)`, and names such as `string`."""

    name: str


@dataclass(frozen=True, slots=True)
class Optional:
    """An optional value: the result of `.?`."""

    #: Empty, or the value.
    held: tuple[Any, ...] = ()


_TYPES: Mapping[type, TypeValue] = {
    type(None): TypeValue("null_type"),
    bool: TypeValue("bool"),
    int: TypeValue("int"),
    float: TypeValue("double"),
    str: TypeValue("string"),
    list: TypeValue("list"),
    dict: TypeValue("map"),
    datetime: TypeValue("google.protobuf.Timestamp"),
    timedelta: TypeValue("google.protobuf.Duration"),
    TypeValue: TypeValue("type"),
    Optional: TypeValue("optional_type"),
}
#: The names of types that an expression can use as values.
TYPE_VALUES: Mapping[str, TypeValue] = {kind.name: kind for kind in _TYPES.values() if "." not in kind.name}
_SHORT = {"null_type": "null", "google.protobuf.Timestamp": "timestamp", "google.protobuf.Duration": "duration"}
_UNKNOWN = TypeValue("unknown")
#: Descriptions of types for messages, by the result of `type_name`.
TYPE_DESCRIPTIONS: Mapping[str, str] = {
    "bool": "true or false",
    "int": "an integer",
    "double": "a number",
    "string": "a string",
    "null": "null",
    "list": "a list",
    "map": "a map",
    "type": "a type",
    "timestamp": "a timestamp",
    "duration": "a duration",
    "optional_type": "an optional value",
}


def type_of(value: Any) -> TypeValue:
    """Return the type of a value."""
    return _TYPES.get(type(value)) or (_TYPES[dict] if isinstance(value, Mapping) else _UNKNOWN)


def type_name(value: Any) -> str:
    """Return the name of a value's type for a message."""
    name = type_of(value).name
    return _SHORT.get(name, name)


def describe_type(value: Any) -> str:
    """Return a description of a value's type, with its article."""
    return TYPE_DESCRIPTIONS.get(type_name(value), "something else")


def no_overload(function: str, *given: Any) -> EvaluationError:
    """Return the error that no overload of the function accepts these arguments."""
    return EvaluationError(
        f"'{OPERATORS.get(function, function)}' does not accept ({', '.join(map(type_name, given))})"
    )


def equal(budget: Budget, left: Any, right: Any) -> bool:
    """Return whether two values are equal: 1 equals 1.0, but not true."""
    budget.spend(2)
    kinds = (type(left), type(right))
    if kinds == (str, str):
        budget.spend(min(len(left), len(right)) >> 6)
        return bool(left == right)
    if kinds == (list, list):
        return len(left) == len(right) and all(equal(budget, a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return len(left) == len(right) and all(key in right and equal(budget, left[key], right[key]) for key in left)
    if are_numbers(*kinds) or kinds[0] is kinds[1]:
        return bool(left == right)
    return False


def are_numbers(left: type, right: type) -> bool:
    """Return whether values of these types are compared as numbers."""
    return left in (int, float) and right in (int, float)


def int64(value: int) -> int:
    """Return the integer. Raises EvaluationError when it is beyond 64 bits."""
    if value not in _INT:
        raise EvaluationError("a number is beyond 64 bits")
    return value


def charge_text(budget: Budget, length: int) -> None:
    """Charge a string of that length that is about to be created. Raises BudgetExceeded when it is too long."""
    if length > MAX_TEXT:
        raise BudgetExceeded(f"a string is longer than {MAX_TEXT} characters")
    budget.spend(length >> 6)


def index(_: Budget, of: Any, key: Any) -> Any:
    """Return an item of a list by its position, or a value of a map by its key. Raises EvaluationError."""
    if isinstance(of, Mapping) and type(key) in (str, int, float, bool):
        if type(key) is bool or key not in of:
            raise no_such_key(key, of)
        return of[key]
    if type(of) is list and (type(key) is int or (type(key) is float and key.is_integer())):
        if not 0 <= key < len(of):
            raise EvaluationError(f"there is no item {int(key)}: the list has {len(of)}")
        return of[int(key)]
    raise no_overload("[]", of, key)


def no_such_key(key: Any, of: Mapping[Any, Any]) -> EvaluationError:
    """Return the error that a map does not have this key."""
    names = ", ".join(map(str, islice(of, 12)))
    return EvaluationError(
        f"there is no key {key!r} (the keys are: {names})" if names else f"there is no key {key!r} in an empty map"
    )
