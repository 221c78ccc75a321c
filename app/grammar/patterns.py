"""
Patterns: a parser for a regular subset of ECMA-262.

Patterns must be anchored; literals, classes, groups, alternation and quantifiers are supported. Everything else is
rejected by name. Shorthand classes mean their ASCII characters, which both ECMA and Python match.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from app.grammar import characters
from app.grammar.characters import ANY, Ranges
from app.grammar.gbnf import MAX_REPEAT

#: What error messages say is accepted.
ACCEPTED = "an anchored pattern ^...$ of literals, classes, groups, alternation and quantifiers"

_DIGIT: Ranges = ((0x30, 0x39),)
_WORD: Ranges = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
_SPACE: Ranges = ((0x09, 0x0A), (0x0C, 0x0D), (0x20, 0x20))
_SPACES: Ranges = characters.union(
    (code, code)
    for codes in (range(0x09, 0x0E), range(0x1C, 0x21), (0x85, 0xA0, 0x1680), range(0x2000, 0x200B))
    for code in (*codes, 0x2028, 0x2029, 0x202F, 0x205F, 0x3000, 0xFEFF)
)
_ASCII: Ranges = ((0x09, 0x0A), (0x0D, 0x0D), (0x20, 0x7E))
_SHORTHANDS = {
    "d": _DIGIT,
    "w": _WORD,
    "s": _SPACE,
    "D": characters.difference(_ASCII, _DIGIT),
    "W": characters.difference(_ASCII, _WORD),
    "S": characters.difference(ANY, _SPACES),
}
_CONTROLS = {"t": 0x09, "n": 0x0A, "f": 0x0C, "r": 0x0D}
_DOT = characters.difference(ANY, ((0x0A, 0x0A), (0x0D, 0x0D), (0x85, 0x85), (0x2028, 0x2029)))


class PatternRejected(Exception):
    """The pattern is not supported; the message says why. `values` converts this to a problem."""


@dataclass(frozen=True, slots=True)
class CharacterSet:
    """One character of a set."""

    ranges: Ranges


@dataclass(frozen=True, slots=True)
class Concatenation:
    """A sequence of parts."""

    parts: tuple[PatternNode, ...]


@dataclass(frozen=True, slots=True)
class Alternation:
    """One of several parts."""

    parts: tuple[PatternNode, ...]


@dataclass(frozen=True, slots=True)
class Repetition:
    """The part, `least` to `most` times; unlimited when `most` is None."""

    part: PatternNode
    least: int
    most: int | None


PatternNode: TypeAlias = CharacterSet | Concatenation | Alternation | Repetition


def read(pattern: str) -> PatternNode:
    """Parses a pattern. Raises PatternRejected for anything outside of the subset."""
    return _Reader(pattern).read()


class _Reader:
    def __init__(self, pattern: str) -> None:
        self.pattern, self.at = pattern, 0

    def read(self) -> PatternNode:
        parts = [self._anchored()]
        while self._take("|"):
            parts.append(self._anchored())
        if self.at < len(self.pattern):
            raise PatternRejected(
                f"{self.pattern[self.at]!r} at character {self.at} does not close a group or end a branch"
            )
        return Alternation(tuple(parts)) if len(parts) > 1 else parts[0]

    def _anchored(self) -> PatternNode:
        if not self._take("^"):
            raise PatternRejected("the pattern is not anchored at its start")
        part = self._sequence()
        if not self._take("$"):
            raise PatternRejected("the pattern is not anchored at its end")
        return part

    def _branches(self) -> PatternNode:
        parts = [self._sequence()]
        while self._take("|"):
            parts.append(self._sequence())
        return Alternation(tuple(parts)) if len(parts) > 1 else parts[0]

    def _sequence(self) -> PatternNode:
        parts = []
        while self.at < len(self.pattern) and self._peek() not in "|)$":
            parts.append(self._quantified(self._atom()))
        return parts[0] if len(parts) == 1 else Concatenation(tuple(parts))

    def _atom(self) -> PatternNode:
        start, character = self.at, self._next()
        if character == "(":
            if self._take("?") and not self._take(":"):
                raise PatternRejected(f"the group '(?{self._peek()}' at character {start} is not supported")
            part = self._branches()
            if not self._take(")"):
                raise PatternRejected(f"the group at character {start} is not closed")
            return part
        if character == "[":
            return CharacterSet(self._class(start))
        if character == ".":
            return CharacterSet(_DOT)
        if character == "\\":
            return CharacterSet(self._escape())
        if character in "^*+?{}]":
            raise PatternRejected(f"{character!r} at character {start} is not supported here")
        return CharacterSet(self._single(ord(character)))

    def _quantified(self, part: PatternNode) -> PatternNode:
        start = self.at
        least, most = self._quantifier()
        if self.at == start:
            return part
        self._take("?")  # a lazy quantifier matches the same texts
        if self._peek() in tuple("*+?{"):
            raise PatternRejected(f"the quantifier at character {self.at} follows another quantifier")
        if most is not None and least > most:
            raise PatternRejected(f"the quantifier at character {start} has its bounds reversed")
        if max(least, most or 0) > MAX_REPEAT:
            raise PatternRejected(f"the quantifier at character {start} exceeds {MAX_REPEAT} repetitions")
        return Repetition(part, least, most)

    def _quantifier(self) -> tuple[int, int | None]:
        for mark, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._take(mark):
                return bounds
        start = self.at
        if not self._take("{"):
            return 1, 1
        end = self.pattern.find("}", self.at)
        least, comma, most = self.pattern[self.at : max(end, self.at)].partition(",")
        if end < 0 or not _number(least) or not (not most or _number(most)):
            raise PatternRejected(f"the quantifier at character {start} is not {{m}}, {{m,}} or {{m,n}}")
        self.at = end + 1
        return int(least), int(most) if most else None if comma else int(least)

    def _class(self, start: int) -> Ranges:
        negated = self._take("^")
        found: list[tuple[int, int]] = []
        narrow = False
        while self._peek() not in ("]", ""):
            low = self._class_item()
            if len(low) > 1 or low[0][0] != low[0][1] or not self._range_follows():
                narrow = narrow or (negated and low in _SHORTHANDS.values() and low != _SPACE)
                found += _SPACES if negated and low == _SPACE else low
                continue
            self._next()
            high = self._class_item()
            if len(high) > 1 or high[0][0] != high[0][1] or high[0][0] < low[0][0]:
                raise PatternRejected(f"the class at character {start} has a range in reverse order")
            found.append((low[0][0], high[0][0]))
        if not self._take("]") or not found:
            raise PatternRejected(f"the class at character {start} is empty or not closed")
        ranges = characters.union(found)
        if negated:
            ranges = characters.difference(_ASCII if narrow else ANY, ranges)
        ranges = characters.difference(ranges, ((0x00, 0x00), (0xD800, 0xDFFF)))
        if not ranges:
            raise PatternRejected(f"the class at character {start} has no characters")
        return ranges

    def _range_follows(self) -> bool:
        return self.pattern[self.at : self.at + 1] == "-" and self.pattern[self.at + 1 : self.at + 2] not in ("]", "")

    def _class_item(self) -> Ranges:
        character = self._next()
        if character == "\\":
            return self._escape()
        if character == "[":
            raise PatternRejected(f"'[' at character {self.at - 1} is not escaped")
        return self._single(ord(character))

    def _escape(self) -> Ranges:
        start, character = self.at - 1, self._next()
        if character in _SHORTHANDS:
            return _SHORTHANDS[character]
        if character in _CONTROLS:
            return self._single(_CONTROLS[character])
        if character in ("x", "u"):
            size = 2 if character == "x" else 4
            digits = self.pattern[self.at : self.at + size]
            if len(digits) == size and all(digit in "0123456789abcdefABCDEF" for digit in digits):
                self.at += size
                return self._single(int(digits, 16))
        if not character.isascii() or character.isalnum():
            raise PatternRejected(f"the escape '\\{character}' at character {start} is not supported")
        return self._single(ord(character))

    def _single(self, code: int) -> Ranges:
        if code == 0 or 0xD800 <= code <= 0xDFFF:
            raise PatternRejected(f"U+{code:04X} cannot be written")
        return ((code, code),)

    def _peek(self) -> str:
        return self.pattern[self.at : self.at + 1]

    def _take(self, mark: str) -> bool:
        found = self.pattern.startswith(mark, self.at)
        self.at += len(mark) if found else 0
        return found

    def _next(self) -> str:
        if self.at >= len(self.pattern):
            raise PatternRejected("the pattern ends too early")
        self.at += 1
        return self.pattern[self.at - 1]


def _number(text: str) -> bool:
    return text.isascii() and text.isdigit()
