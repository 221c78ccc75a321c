"""
Parsing of JSON documents with limits, and the line of each value.

Depth and number of values are checked before anything is built. Lines are computed only when an error needs one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from app.kernel.errors import InvalidDefinition, Problem

#: Maximum number of values in one document.
MAX_VALUES = 100_000
#: Maximum nesting depth.
MAX_DEPTH = 64
#: Maximum digits of a number; more are beyond the range of a double.
MAX_DIGITS = 308
#: Maximum characters of a path for which a line is kept.
MAX_PATH = 1_000

#: Matches a string, or an unterminated one: otherwise the search would restart at each quote in it.
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)
_OPENING = re.compile(r"[\[{](?!\s*[\]}])")
_BRACKET = re.compile(r"[\[\]{}]")
_DIGITS = re.compile(rf"\d{{{MAX_DIGITS + 1}}}")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_TOKEN = re.compile(r'"(?:[^"\\]*(?:\\.[^"\\]*)*)"|[\[\]{},:]|[^\s\[\]{},:"]+', re.DOTALL)


class NotJson(ValueError):
    """The text is not valid JSON; the message says why."""

    def __init__(self, message: str, line: int) -> None:
        self.line = line
        super().__init__(message)


class _DuplicateKey(Exception):
    """An object has a key twice."""


def looks_like_json(text: str) -> bool:
    """Return whether a text starts like a JSON object or array."""
    return text.lstrip()[:1] in ("{", "[")


def parse(text: str) -> Any:
    """
    Return the value of a JSON text.

    Raises NotJson when the syntax is wrong. Raises InvalidDefinition for a document that is too deep or too large, or
    that contains a duplicate key, a number beyond a double, or a lone surrogate.
    """
    _check_size(text)
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_reject_constant, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise NotJson(f"{error.msg} (character {error.colno})", error.lineno) from None
    except _DuplicateKey:
        raise _duplicate_key(text) from None
    except RecursionError:
        raise _too_deep() from None
    except OverflowError as error:
        raise InvalidDefinition([Problem("", str(error), "numbers in the range of a double")]) from None
    if _SURROGATE_ESCAPE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            message = "a string contains a lone surrogate, which UTF-8 cannot encode"
            raise InvalidDefinition([Problem("", message, "surrogates in pairs")]) from None
    return value


def _check_size(text: str) -> None:
    """Check the limits on depth, values and digits; the text need not be valid JSON. Raises InvalidDefinition."""
    bare = _STRING.sub("0", text)
    values = 1 + bare.count(",") + sum(1 for _ in _OPENING.finditer(bare))
    if values > MAX_VALUES:
        raise InvalidDefinition([Problem("", f"the document has more than {MAX_VALUES} values")])
    depth = 0
    for bracket in _BRACKET.finditer(bare):
        depth += 1 if bracket[0] in "[{" else -1
        if depth > MAX_DEPTH:
            raise _too_deep()
    if _DIGITS.search(bare):
        message = f"a number has more than {MAX_DIGITS} digits"
        raise InvalidDefinition([Problem("", message, "numbers in the range of a double")])


def _too_deep() -> InvalidDefinition:
    return InvalidDefinition([Problem("", f"the document is nested deeper than {MAX_DEPTH} levels")])


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise _DuplicateKey
    return made


def _reject_constant(name: str) -> float:
    raise OverflowError(f"JSON has no number {name}")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise OverflowError(f"the number {text[:40]} is beyond the range of a double")
    return value


class Lines(Mapping[str, int]):
    """The line of each value by path, computed at the first access."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._found: dict[str, int] | None = None

    def _lines(self) -> dict[str, int]:
        if self._found is None:
            self._found = {}
            for path, line in _paths(self._text):
                self._found.setdefault(path, line)
        return self._found

    def __getitem__(self, path: str) -> int:
        return self._lines()[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._lines())

    def __len__(self) -> int:
        return len(self._lines())


def _duplicate_key(text: str) -> InvalidDefinition:
    found: dict[str, int] = {}
    for path, line in _paths(text):
        if path in found:
            message = f"duplicate key, first in line {found[path]}"
            return InvalidDefinition([Problem(path, message, line=line)])
        found[path] = line
    return InvalidDefinition([Problem("", "a mapping has a duplicate key", "each key once")])


def _paths(text: str) -> Iterator[tuple[str, int]]:
    """Yield the path and the line of each value of a valid JSON text; the line of a field is that of its name."""
    line, last = 1, 0
    #: For each open container: its path, and the number of its items so far, or None for an object.
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
            # The name of a field; its value is the next token and has the same path.
            path, named = child_path(around, f".{json.loads(mark)}"), True
            if path is not None:
                yield path, line
            continue
        if items is not None:
            path = child_path(around, f"[{items}]")
            open_[-1] = (around, items + 1)
        if not named and path is not None:
            yield path, line
        named = False
        if mark in "[{":
            open_.append((path, 0 if mark == "[" else None))


def child_path(path: str | None, step: str) -> str | None:
    """Return the path of a child; None when it is longer than MAX_PATH."""
    if path is None or len(path) + len(step) > MAX_PATH:
        return None
    return (path + step).removeprefix(".")
