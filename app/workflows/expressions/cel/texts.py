"""
Functions of texts: parts and places of them, and regular expressions, which RE2 works out.

Places count characters. What would make a text longer than it may be is refused before it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from string import ascii_lowercase, ascii_uppercase
from typing import Any

from app.kernel.security import regex
from app.workflows.expressions.cel import library
from app.workflows.expressions.cel.values import Budget, NoValue, named, refused, require_room


def _of_texts(name: str, function: Callable[..., Any], *more: type) -> Callable[..., Any]:
    """A method of a text whose arguments have the types `more`; its work is the length of all."""

    def called(work: Budget, *given: Any) -> Any:
        if tuple(map(type, given)) != (str, *more):
            raise refused(name, *given)
        work.spend(sum(len(value) for value in given if type(value) is str) >> 6)
        return function(*given)

    return called


def _place(text: str, at: int, last: int) -> int:
    if not 0 <= at <= last:
        raise NoValue(f"{at} is no place in a text of {len(text)} characters")
    return at


def _char_at(text: str, at: int) -> str:
    return text[_place(text, at, len(text)) :][:1]


def _substring(text: str, start: int, end: int) -> str:
    if _place(text, start, len(text)) > _place(text, end, len(text)):
        raise NoValue(f"a part of a text from {start} to {end}")
    return text[start:end]


_LOWER = str.maketrans(ascii_uppercase, ascii_lowercase)
_UPPER = str.maketrans(ascii_lowercase, ascii_uppercase)


def _substring_of(work: Budget, text: Any, start: Any, end: Any = None) -> str:
    last = len(text) if end is None and type(text) is str else end
    found: str = _of_texts("substring", _substring, int, int)(work, text, start, last)
    return found


def _replace(work: Budget, text: Any, old: Any, new: Any, times: Any = -1) -> str:
    if tuple(map(type, (text, old, new, times))) != (str, str, str, int):
        raise refused("replace", text, old, new)
    count = text.count(old) if times < 0 else min(times, text.count(old))
    require_room(work, len(text) + count * max(len(new) - len(old), 0))
    return str(text.replace(old, new, times))


def _split(work: Budget, text: Any, separator: Any, times: Any = -1) -> list[str]:
    if tuple(map(type, (text, separator, times))) != (str, str, int):
        raise refused("split", text, separator)
    if times == 0:
        return []
    work.spend((len(text) >> 6) + (text.count(separator) if times < 0 else min(times, len(text))))
    if not text:
        return [""]
    if separator:
        return list(text.split(separator, times - 1 if times > 0 else -1))
    if times < 0:
        return list(text)
    return [*text[: times - 1], text[times - 1 :]] if len(text) >= times else list(text)


def _join(work: Budget, texts: Any, separator: Any = "") -> str:
    if type(texts) is not list or type(separator) is not str:
        raise refused("join", texts, separator)
    work.spend(len(texts))
    for text in texts:
        if type(text) is not str:
            raise NoValue(f"'join' does not take a list in which stands {named(text)}")
    require_room(work, sum(map(len, texts)) + len(separator) * len(texts))
    return separator.join(texts)


def _matches(work: Budget, text: Any, pattern: Any) -> bool:
    if type(text) is not str or type(pattern) is not str:
        raise refused("matches", text, pattern)
    # RE2 takes time in proportion to the text and to the program that the pattern becomes. Measured at the worst: 4 ns
    # for each product of both; and its making takes 50 ns for each instruction.
    if len(pattern) > regex.MAX_LENGTH:
        raise NoValue(f"a regular expression of more than {regex.MAX_LENGTH} characters")
    program = regex.size(pattern)
    work.spend(10 + (program >> 4) + (len(text) * program >> 8))
    return bool(library.call(work, "a.matches(b)", text, pattern))


#: What an expression may call of these.
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
