"""
CEL functions of strings: substrings, positions, and regular expressions (by RE2).

Positions count characters. A result that would be too long is rejected before it is created.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from string import ascii_lowercase, ascii_uppercase
from typing import Any

from app.kernel.security import regex
from app.workflows.expressions.cel import library
from app.workflows.expressions.cel.values import Budget, EvaluationError, charge_text, describe_type, no_overload


def _of_texts(name: str, function: Callable[..., Any], *more: type) -> Callable[..., Any]:
    """Wrap a method of a string whose arguments have the types `more`; its cost is the total length of the strings."""

    def called(budget: Budget, *given: Any) -> Any:
        if tuple(map(type, given)) != (str, *more):
            raise no_overload(name, *given)
        budget.spend(sum(len(value) for value in given if type(value) is str) >> 6)
        return function(*given)

    return called


def _checked_position(text: str, at: int, last: int) -> int:
    if not 0 <= at <= last:
        raise EvaluationError(f"the position {at} is outside of a string of {len(text)} characters")
    return at


def _char_at(text: str, at: int) -> str:
    return text[_checked_position(text, at, len(text)) :][:1]


def _substring(text: str, start: int, end: int) -> str:
    if _checked_position(text, start, len(text)) > _checked_position(text, end, len(text)):
        raise EvaluationError(f"a substring cannot start at {start} and end at {end}")
    return text[start:end]


_LOWER = str.maketrans(ascii_uppercase, ascii_lowercase)
_UPPER = str.maketrans(ascii_lowercase, ascii_uppercase)


def _substring_of(budget: Budget, text: Any, start: Any, end: Any = None) -> str:
    last = len(text) if end is None and type(text) is str else end
    found: str = _of_texts("substring", _substring, int, int)(budget, text, start, last)
    return found


def _replace(budget: Budget, text: Any, old: Any, new: Any, times: Any = -1) -> str:
    if tuple(map(type, (text, old, new, times))) != (str, str, str, int):
        raise no_overload("replace", text, old, new)
    count = text.count(old) if times < 0 else min(times, text.count(old))
    charge_text(budget, len(text) + count * max(len(new) - len(old), 0))
    return str(text.replace(old, new, times))


def _split(budget: Budget, text: Any, separator: Any, times: Any = -1) -> list[str]:
    if tuple(map(type, (text, separator, times))) != (str, str, int):
        raise no_overload("split", text, separator)
    if times == 0:
        return []
    budget.spend((len(text) >> 6) + (text.count(separator) if times < 0 else min(times, len(text))))
    if not text:
        return [""]
    if separator:
        return list(text.split(separator, times - 1 if times > 0 else -1))
    if times < 0:
        return list(text)
    return [*text[: times - 1], text[times - 1 :]] if len(text) >= times else list(text)


def _join(budget: Budget, texts: Any, separator: Any = "") -> str:
    if type(texts) is not list or type(separator) is not str:
        raise no_overload("join", texts, separator)
    budget.spend(len(texts))
    for text in texts:
        if type(text) is not str:
            raise EvaluationError(f"'join' does not accept a list that contains {describe_type(text)}")
    charge_text(budget, sum(map(len, texts)) + len(separator) * len(texts))
    return separator.join(texts)


def _matches(budget: Budget, text: Any, pattern: Any) -> bool:
    if type(text) is not str or type(pattern) is not str:
        raise no_overload("matches", text, pattern)
    # The time of RE2 is proportional to the length of the text times the size of the compiled program. Measured worst
    # case: 4 ns for each character and instruction; the compilation takes 50 ns for each instruction.
    if len(pattern) > regex.MAX_LENGTH:
        raise EvaluationError(f"a regular expression has more than {regex.MAX_LENGTH} characters")
    program = regex.size(pattern)
    budget.spend(10 + (program >> 4) + (len(text) * program >> 8))
    return bool(library.call(budget, "a.matches(b)", text, pattern))


#: The string functions by their CEL names.
FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "startsWith": _of_texts("startsWith", str.startswith, str),
    "endsWith": _of_texts("endsWith", str.endswith, str),
    "contains": _of_texts("contains", str.__contains__, str),
    "matches": _matches,
    "lowerAscii": _of_texts("lowerAscii", lambda text: text.translate(_LOWER)),
    "upperAscii": _of_texts("upperAscii", lambda text: text.translate(_UPPER)),
    "trim": _of_texts("trim", str.strip),
    "reverse": _of_texts("reverse", lambda text: text[::-1]),
    "charAt": _of_texts("charAt", _char_at, int),
    "indexOf": _of_texts("indexOf", str.find, str),
    "lastIndexOf": _of_texts("lastIndexOf", str.rfind, str),
    "substring": _substring_of,
    "replace": _replace,
    "split": _split,
    "join": _join,
}
