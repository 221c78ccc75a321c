"""
CEL functions of lists of numbers, and of vectors as `embed` steps return them: similarity, top-k, sums, order.

A vector is a list of integers and doubles that is not empty. NaN, infinity and anything else in it is an error that
names its place. A result beyond the range of a double, or of 64 bits, is an error.
Work is charged for each number before it is read: a million units are enough for 16 million of them.
Python computes: to convert lists to arrays of numpy takes as long as the arithmetic.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from operator import mul
from typing import Any

from app.workflows.expressions.cel.tree import SORTED_PAIRS
from app.workflows.expressions.cel.values import Budget, EvaluationError, describe_type, int64, no_overload

#: Numbers that are read or multiplied for one unit of work, as a power of two: 16 need less than a microsecond.
_NUMBERS_PER_UNIT = 4
_NUMBERS = frozenset({int, float})
_ORDERED = (str, bool, datetime, timedelta)


def _checked(budget: Budget, name: str, of: Any, description: str = "") -> Sequence[float]:
    """Return a vector. `description` is for messages: which of several vectors it is."""
    if type(of) is not list:
        raise no_overload(name, of) if not description else EvaluationError(f"'{name}': {description} is no list")
    budget.spend(1 + (len(of) >> _NUMBERS_PER_UNIT))
    at = f" of {description}" if description else ""
    if not _NUMBERS.issuperset(map(type, of)):
        place, value = next((i, value) for i, value in enumerate(of) if type(value) not in _NUMBERS)
        raise EvaluationError(f"'{name}' accepts numbers only; item {place}{at} is {describe_type(value)}")
    if not of:
        raise EvaluationError(f"'{name}' does not accept an empty list of numbers{at and f': {description}'}")
    if not all(map(math.isfinite, of)):
        place = next(i for i, value in enumerate(of) if not math.isfinite(value))
        raise EvaluationError(f"'{name}' does not accept NaN or infinity: item {place}{at}")
    return of


def _pair(budget: Budget, name: str, left: Any, right: Any) -> tuple[Sequence[float], Sequence[float]]:
    if type(left) is not list or type(right) is not list:
        raise no_overload(name, left, right)
    if len(left) != len(right):
        raise EvaluationError(f"'{name}' needs vectors of the same length, not of {len(left)} and {len(right)} numbers")
    return _checked(budget, name, left), _checked(budget, name, right)


def _finite(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise EvaluationError(f"the result of '{name}' is beyond the range of a double")
    return float(value)


def _product(left: Sequence[float], right: Sequence[float]) -> float:
    try:
        return float(sum(map(mul, left, right)))
    except OverflowError:
        return math.inf


def _dot(budget: Budget, left: Any, right: Any) -> float:
    return _finite("dot", _product(*_pair(budget, "dot", left, right)))


def _norm(budget: Budget, of: Any) -> float:
    return _finite("norm", math.hypot(*_checked(budget, "norm", of)))


def _cosine(budget: Budget, left: Any, right: Any) -> float:
    first, second = _pair(budget, "cosine", left, right)
    return _similarity("cosine", first, second, math.hypot(*second))


def _similarity(
    name: str, left: Sequence[float], right: Sequence[float], right_length: float, which: str = ""
) -> float:
    lengths = math.hypot(*left) * right_length
    if not lengths:
        raise EvaluationError(f"'{name}': a vector of zeros has no direction{which}")
    # Rounding must not make two equal directions more than equal.
    return max(-1.0, min(1.0, _finite(name, _product(left, right) / _finite(name, lengths))))


def _top(budget: Budget, *given: Any) -> list[dict[str, Any]]:
    if len(given) == 2:
        scores, count = _numbers(budget, "topK", given[0]), given[1]
    elif len(given) == 3:
        count = given[2]
        scores = _similarities(budget, given[0], given[1])
    else:
        raise no_overload("topK", *given)
    if type(count) is not int:
        raise no_overload("topK", *given)
    if count < 1:
        raise EvaluationError(f"'topK' returns at least one: k is {count}")
    count = min(count, len(scores))
    budget.spend(len(scores) + count * 4)
    # The first of equal scores comes first.
    best = heapq.nlargest(count, range(len(scores)), key=scores.__getitem__)
    return [{"index": place, "score": scores[place]} for place in best]


def _similarities(budget: Budget, vectors: Any, query: Any) -> list[float]:
    if type(vectors) is not list:
        raise no_overload("topK", vectors, query)
    wanted = _checked(budget, "topK", query, "the query")
    length = math.hypot(*wanted)
    made = []
    for place, vector in enumerate(vectors):
        checked = _checked(budget, "topK", vector, f"vector {place}")
        if len(checked) != len(wanted):
            sizes = f"vector {place} has {len(checked)}, the query {len(wanted)}"
            raise EvaluationError(f"'topK' needs vectors of the same length: {sizes} numbers")
        budget.spend(1 + (len(checked) >> _NUMBERS_PER_UNIT))
        made.append(_similarity("topK", checked, wanted, length, f": vector {place}, or the query"))
    return made


def _numbers(budget: Budget, name: str, of: Any) -> Sequence[float]:
    """Return a list of numbers, which may be empty."""
    return of if type(of) is list and not of else _checked(budget, name, of)


def _sum(budget: Budget, of: Any) -> int | float:
    numbers = _numbers(budget, "sum", of)
    if all(type(number) is int for number in numbers):
        return int64(int(sum(numbers)))
    return _finite("sum", _exact_sum(numbers))


def _mean(budget: Budget, of: Any) -> float:
    numbers = _checked(budget, "mean", of)
    return _finite("mean", _exact_sum(numbers) / len(numbers))


def _exact_sum(numbers: Sequence[float]) -> float:
    try:
        return math.fsum(numbers)
    except OverflowError:
        return math.inf


def _extreme(name: str, choose: Callable[..., Any], *, place: bool) -> Callable[..., Any]:
    def called(budget: Budget, of: Any) -> Any:
        if type(of) is not list:
            raise no_overload(name, of)
        if not of:
            raise EvaluationError(f"'{name}' does not accept an empty list")
        _require_ordered(budget, name, of)
        return choose(range(len(of)), key=of.__getitem__) if place else choose(of)

    return called


def _require_ordered(budget: Budget, name: str, values: list[Any]) -> None:
    """Require numbers, or values of one type that has an order."""
    budget.spend(1 + len(values))
    kinds = set(map(type, values))
    if kinds <= _NUMBERS:
        if any(value != value for value in values):  # only NaN differs from itself
            raise EvaluationError(f"'{name}' does not accept NaN")
        return
    if len(kinds) > 1 or next(iter(kinds)) not in _ORDERED:
        described = sorted({describe_type(value) for value in values})
        raise EvaluationError(f"'{name}' cannot order {' and '.join(described)}")
    if kinds == {str}:
        budget.spend(sum(map(len, values)) >> 6)


def _zip(budget: Budget, left: Any, right: Any) -> list[list[Any]]:
    if type(left) is not list or type(right) is not list:
        raise no_overload("zip", left, right)
    if len(left) != len(right):
        raise EvaluationError(f"'zip' needs lists of the same length, not of {len(left)} and {len(right)} items")
    budget.spend(4 * len(left))
    return [[first, second] for first, second in zip(left, right, strict=True)]


def _slice(budget: Budget, of: Any, start: Any, end: Any) -> list[Any]:
    if type(of) is not list or type(start) is not int or type(end) is not int:
        raise no_overload("slice", of, start, end)
    if not 0 <= start <= end <= len(of):
        raise EvaluationError(f"a slice from {start} to {end} is not within a list of {len(of)}")
    budget.spend(end - start)
    return list(of[start:end])


def _sorted_pairs(budget: Budget, pairs: Any) -> list[Any]:
    """Return the first of each pair, sorted by the second; equal ones keep their order."""
    keys = [key for _, key in pairs]
    if not keys:
        return []
    _require_ordered(budget, "sortBy", keys)
    rounds = len(keys).bit_length()
    budget.spend((len(keys) * rounds >> 2) + len(keys))
    if type(keys[0]) is str:
        budget.spend(sum(map(len, keys)) * rounds >> 6)
    return [pairs[place][0] for place in sorted(range(len(keys)), key=keys.__getitem__)]


#: The functions by their CEL names. `tree` expands the macro `sortBy`.
FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "dot": _dot,
    "cosine": _cosine,
    "norm": _norm,
    "topK": _top,
    "sum": _sum,
    "mean": _mean,
    "min": _extreme("min", min, place=False),
    "max": _extreme("max", max, place=False),
    "argmin": _extreme("argmin", min, place=True),
    "argmax": _extreme("argmax", max, place=True),
    "zip": _zip,
    "slice": _slice,
    SORTED_PAIRS: _sorted_pairs,
}
