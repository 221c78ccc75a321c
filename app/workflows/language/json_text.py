"""
JSON texts: read by a JSON parser; their lines are found only when something is wrong with a value.

Depth and number of values are counted before anything is built.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from app.kernel.errors import InvalidDefinition, Problem

#: Values in one document.
MAX_VALUES = 100_000
#: Depth of nesting.
MAX_DEPTH = 64
#: Digits of a number: more are beyond a double.
MAX_DIGITS = 308
#: Characters of a path for which a line is kept.
MAX_PATH = 1_000

#: A string, also one that does not end: or a search would begin anew at each quote within it.
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)
_OPENING = re.compile(r"[\[{](?!\s*[\]}])")
_BRACKET = re.compile(r"[\[\]{}]")
_DIGITS = re.compile(rf"\d{{{MAX_DIGITS + 1}}}")
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_TOKEN = re.compile(r'"(?:[^"\\]*(?:\\.[^"\\]*)*)"|[\[\]{},:]|[^\s\[\]{},:"]+', re.DOTALL)


class NotJson(ValueError):
    """The text is no JSON; the message says why."""

    def __init__(self, message: str, line: int) -> None:
        self.line = line
        super().__init__(message)


class _Twice(Exception):
    """A key stands twice in an object."""


def begins(text: str) -> bool:
    """Whether a text may be an object or an array of JSON."""
    return text.lstrip()[:1] in ("{", "[")


def value_of(text: str) -> Any:
    """
    The value of a JSON text.

    Raises NotJson; InvalidDefinition for a document that is too deep or too large, or holds what cannot be kept: a key
    twice, a number beyond a double, half a character.
    """
    _measure(text)
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_endless, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise NotJson(f"{error.msg} (character {error.colno})", error.lineno) from None
    except _Twice:
        raise _twice(text) from None
    except RecursionError:
        raise _too_deep() from None
    except OverflowError as error:
        raise InvalidDefinition([Problem("", str(error), "numbers that a double holds")]) from None
    if _HALF.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            message = "a text holds half a character (a lone surrogate), which UTF-8 cannot"
            raise InvalidDefinition([Problem("", message, "surrogates in pairs")]) from None
    return value


def _measure(text: str) -> None:
    """See that the document is neither too deep nor too large, whether it is JSON or not."""
    bare = _STRING.sub("0", text)
    values = 1 + bare.count(",") + sum(1 for _ in _OPENING.finditer(bare))
    if values > MAX_VALUES:
        raise InvalidDefinition([Problem("", f"the document holds more than {MAX_VALUES} values")])
    depth = 0
    for bracket in _BRACKET.finditer(bare):
        depth += 1 if bracket[0] in "[{" else -1
        if depth > MAX_DEPTH:
            raise _too_deep()
    if _DIGITS.search(bare):
        message = f"a number has more than {MAX_DIGITS} digits"
        raise InvalidDefinition([Problem("", message, "numbers that a double holds")])


def _too_deep() -> InvalidDefinition:
    return InvalidDefinition([Problem("", f"the document is nested deeper than {MAX_DEPTH} levels")])


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise _Twice
    return made


def _endless(name: str) -> float:
    raise OverflowError(f"the number {name} is none that JSON knows")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise OverflowError(f"the number {text[:40]} is beyond what a double holds")
    return value


class Lines(Mapping[str, int]):
    """The line of each value by path, found when the first one is asked for."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._found: dict[str, int] | None = None

    def _lines(self) -> dict[str, int]:
        if self._found is None:
            self._found = {}
            for path, line in _places(self._text):
                self._found.setdefault(path, line)
        return self._found

    def __getitem__(self, path: str) -> int:
        return self._lines()[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._lines())

    def __len__(self) -> int:
        return len(self._lines())


def _twice(text: str) -> InvalidDefinition:
    found: dict[str, int] = {}
    for path, line in _places(text):
        if path in found:
            message = f"the key stands twice, first in line {found[path]}"
            return InvalidDefinition([Problem(path, message, line=line)])
        found[path] = line
    return InvalidDefinition([Problem("", "a key stands twice in a mapping", "each key once")])


def _places(text: str) -> Iterator[tuple[str, int]]:
    """The path of each value of a text that is JSON, with its line; that of a field is the line of its name."""
    line, last = 1, 0
    #: Of each container that is open: its path, and the number of its items, or None for an object.
    open_: list[tuple[str | None, int | None]] = []
    path: str | None = ""
    named = False
    for token in _TOKEN.finditer(text):
        line += text.count("\n", last, token.start())
        last, mark = token.start(), token[0]
        if mark in ",:":
            continue
        if mark in "]}":
            open_.pop()
            continue
        around, items = open_[-1] if open_ else ("", None)
        if open_ and items is None and not named:
            # A name; its value comes next, in the same place.
            path, named = below(around, f".{json.loads(mark)}"), True
            if path is not None:
                yield path, line
            continue
        if items is not None:
            path = below(around, f"[{items}]")
            open_[-1] = (around, items + 1)
        if not named and path is not None:
            yield path, line
        named = False
        if mark in "[{":
            open_.append((path, 0 if mark == "[" else None))


def below(path: str | None, step: str) -> str | None:
    """The path one step further in; None where it grows too long to be kept."""
    if path is None or len(path) + len(step) > MAX_PATH:
        return None
    return (path + step).removeprefix(".")
