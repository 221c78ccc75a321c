"""
The values of CEL as Python has them, what counts the work on them, and when two of them are the same.

Null, truth values, integers of 64 bits, doubles, texts, lists, maps, timestamps and durations are Python's own; a type
as a value and a value that may be absent are here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice
from typing import Any

from app.workflows.expressions.cel.tree import OPERATORS

#: Units of work of one evaluation: a part worked out, an item compared or copied, 64 characters, a microsecond.
MAX_WORK = 1_000_000
#: Characters of one text that is made.
MAX_TEXT = 4_000_000

_INT = range(-(1 << 63), 1 << 63)


class NoValue(Exception):
    """The expression has no value over this data."""


class Bound(Exception):
    """The expression wants more than it may have. `||` and `&&` do not forgive it."""


class Budget:
    """What is left of the work that one evaluation may do."""

    def __init__(self, left: int = MAX_WORK) -> None:
        self._left = left

    def spend(self, units: int) -> None:
        """Count what is about to be done. Raises Bound when it is too much."""
        self._left -= units
        if self._left < 0:
            raise Bound(f"it takes more than {MAX_WORK} steps of work")


@dataclass(frozen=True, slots=True)
class Kind:
    """A type as a value: what `type(x)` gives and `string` names."""

    name: str


@dataclass(frozen=True, slots=True)
class Optional:
    """A value, or its absence: what `.?` gives."""

    #: Empty, or the value.
    held: tuple[Any, ...] = ()


_KINDS: Mapping[type, Kind] = {
    type(None): Kind("null_type"),
    bool: Kind("bool"),
    int: Kind("int"),
    float: Kind("double"),
    str: Kind("string"),
    list: Kind("list"),
    dict: Kind("map"),
    datetime: Kind("google.protobuf.Timestamp"),
    timedelta: Kind("google.protobuf.Duration"),
    Kind: Kind("type"),
    Optional: Kind("optional_type"),
}
#: The names of types, which are values too.
KINDS: Mapping[str, Kind] = {kind.name: kind for kind in _KINDS.values() if "." not in kind.name}
_SHORT = {"null_type": "null", "google.protobuf.Timestamp": "timestamp", "google.protobuf.Duration": "duration"}
_UNKNOWN = Kind("unknown")
#: The types in words, by what `told` calls them.
NAMES: Mapping[str, str] = {
    "bool": "true or false",
    "int": "an integer",
    "double": "a number",
    "string": "a text",
    "null": "null",
    "list": "a list",
    "map": "a map",
    "type": "a type",
    "timestamp": "a timestamp",
    "duration": "a duration",
    "optional_type": "an optional value",
}


def kind_of(value: Any) -> Kind:
    """The type of a value."""
    return _KINDS.get(type(value)) or (_KINDS[dict] if isinstance(value, Mapping) else _UNKNOWN)


def told(value: Any) -> str:
    """The type of a value, for a message."""
    name = kind_of(value).name
    return _SHORT.get(name, name)


def named(value: Any) -> str:
    """The type of a value, in words."""
    return NAMES.get(told(value), "something else")


def refused(function: str, *given: Any) -> NoValue:
    """No overload of the function takes this."""
    return NoValue(f"'{OPERATORS.get(function, function)}' does not take ({', '.join(map(told, given))})")


def equal(work: Budget, left: Any, right: Any) -> bool:
    """Whether two values are the same: 1 and 1.0 are, 1 and true are not."""
    work.spend(2)
    kinds = (type(left), type(right))
    if kinds == (str, str):
        work.spend(min(len(left), len(right)) >> 6)
        return bool(left == right)
    if kinds == (list, list):
        return len(left) == len(right) and all(equal(work, a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return len(left) == len(right) and all(key in right and equal(work, left[key], right[key]) for key in left)
    if are_numbers(*kinds) or kinds[0] is kinds[1]:
        return bool(left == right)
    return False


def are_numbers(left: type, right: type) -> bool:
    """Whether values of these types can be compared as numbers."""
    return left in (int, float) and right in (int, float)


def int64(value: int) -> int:
    """The integer. Raises NoValue when it is beyond 64 bits."""
    if value not in _INT:
        raise NoValue("a number is beyond 64 bits")
    return value


def require_room(work: Budget, length: int) -> None:
    """Before a text of that length is made."""
    if length > MAX_TEXT:
        raise Bound(f"a text is longer than {MAX_TEXT} characters")
    work.spend(length >> 6)


def index(_: Budget, of: Any, key: Any) -> Any:
    """An item of a list by its place, or a value of a map by its key."""
    if isinstance(of, Mapping) and type(key) in (str, int, float, bool):
        if type(key) is bool or key not in of:
            raise missing(key, of)
        return of[key]
    if type(of) is list and (type(key) is int or (type(key) is float and key.is_integer())):
        if not 0 <= key < len(of):
            raise NoValue(f"there is no item {int(key)}: the list has {len(of)}")
        return of[int(key)]
    raise refused("[]", of, key)


def missing(key: Any, of: Mapping[Any, Any]) -> NoValue:
    """A map has no such key."""
    names = ", ".join(map(str, islice(of, 12)))
    return NoValue(f"there is no {key!r} (there is: {names})" if names else f"there is no {key!r} in an empty map")


def is_whole(text: str) -> bool:
    """Whether a text can be written in UTF-8: no half of a character (a lone surrogate) is in it."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False
