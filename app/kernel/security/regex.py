"""
Regular expressions of users, matched by RE2 in linear time.

The syntax is that of JSON Schema (ECMA-262) without look-around and back references, which RE2 does not support. A
pattern that RE2 rejects, or whose compiled size is too large, is refused.
Python's own `re` never executes a pattern of a user.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

import re2

#: Most characters of a pattern.
MAX_LENGTH = 1_000
#: Most instructions of a compiled pattern, as estimated by `size`. Compiling takes about 0.2 µs per instruction.
MAX_SIZE = 20_000
#: Most bytes of text times instructions for one match. In the worst case, RE2 needs 4 ns per unit: a second in all.
MAX_WORK = 1 << 28
#: The accepted patterns, for error messages.
ACCEPTED = "a pattern for RE2: no look-around, no back references, at most 1000 repetitions"

#: Most bytes of memory for one compiled pattern.
_MEMORY = 1 << 20
#: Fewest instructions that are counted for a match: tiny programs that build many states are slower.
_MIN_INSTRUCTIONS = 64


class PatternRefused(ValueError):
    """RE2 rejects the pattern, or it is too large; the message has the reason."""


class TextTooLong(ValueError):
    """Matching the text would take too long."""


class Pattern:
    """A compiled pattern."""

    def __init__(self, regexp: re2._re2.RE2) -> None:
        self._regexp = regexp
        self._instructions = max(regexp.ProgramSize(), _MIN_INSTRUCTIONS)

    def found_in(self, text: str) -> bool:
        """Whether the pattern matches some part of the text. Raises TextTooLong."""
        # A lone surrogate becomes bytes that match nothing.
        raw = text.encode(errors="surrogatepass")
        if len(raw) * self._instructions > MAX_WORK:
            raise TextTooLong(f"a text of {len(text)} characters is too long for this pattern")
        start, _ = self._regexp.Match(_UNANCHORED, raw, 0, len(raw))[0]
        return bool(start >= 0)

    def places_in(self, text: str) -> Iterator[tuple[int, int]]:
        """
        Yield the places of all matches that are not empty, from left to right, in characters. Raises TextTooLong.

        Each match may look at the whole rest of the text: the caller limits the length, or the number of matches.
        """
        raw = text.encode(errors="surrogatepass")
        if len(raw) * self._instructions > MAX_WORK:
            raise TextTooLong(f"a text of {len(text)} characters is too long for this pattern")
        counted = seen = at = 0
        while at <= len(raw):
            start, end = self._regexp.Match(_UNANCHORED, raw, at, len(raw))[0]
            if start < 0:
                return
            if end > start:
                first = counted + _characters(raw[seen:start])
                counted, seen = first + _characters(raw[start:end]), end
                yield first, counted
            at = end if end > start else end + 1
            while at < len(raw) and raw[at] & 0xC0 == 0x80:  # within a character
                at += 1


@lru_cache(maxsize=64)
def compiled(pattern: str) -> Pattern:
    """Return the compiled pattern. Raises PatternRefused."""
    if len(pattern) > MAX_LENGTH:
        raise PatternRefused(f"it is longer than {MAX_LENGTH} characters")
    if size(pattern) > MAX_SIZE:
        raise PatternRefused("its repetitions and classes make it too large")
    try:
        raw = _UNICODE.sub(_hexadecimal, pattern).encode()
    except UnicodeEncodeError:
        raise PatternRefused("it contains half a character (a lone surrogate)") from None
    regexp = re2._re2.RE2(raw, _options())
    if not regexp.ok():
        raise PatternRefused(regexp.error().decode(errors="replace"))
    return Pattern(regexp)


#: The parts of a regular expression that the estimate distinguishes.
_PARTS = re.compile(r"\\[pP](?:\{\w*\}|\w)|\\.|\[\^?\]?(?:\[:\w*:\]|\\.|[^\]\\])*\]|\{(\d+)(?:,(\d*))?\}|.", re.DOTALL)


@lru_cache(maxsize=256)
def size(pattern: str) -> int:
    """Return an upper bound for the instructions of a compiled pattern: a part repeated n times counts n times."""
    open_groups, last = [0], 0
    for part in _PARTS.finditer(pattern):
        text = part[0]
        if part[1]:
            # RE2 refuses more than 1000 repetitions.
            more = last * min(max(int(part[1][:5]), int(part[2][:5] if part[2] else 0), 1) - 1, 1000)
            open_groups[-1] += more
            last += more
            continue
        if text == "(":
            open_groups.append(0)
            continue
        if text == ")" and len(open_groups) > 1:
            last = open_groups.pop() + 2
        else:
            last = 500 * len(re.findall(r"\\[pP]", text)) or (1 if text.isascii() and text.isalnum() else 12)
        open_groups[-1] += last
    # Ignoring case makes two ranges of one.
    return sum(open_groups) * (2 if "(?" in pattern else 1) + 10


#: An escape: ECMA's escape of a character by its code, for which RE2 has another syntax, or any other escape.
_UNICODE = re.compile(r"\\u([0-9A-Fa-f]{4})|\\.", re.DOTALL)
_UNANCHORED = re2._re2.RE2.Anchor.UNANCHORED


def _characters(raw: bytes) -> int:
    """Return the number of characters of UTF-8."""
    return sum(byte & 0xC0 != 0x80 for byte in raw)


def _hexadecimal(found: re.Match[str]) -> str:
    return f"\\x{{{found[1]}}}" if found[1] else found[0]


def _options() -> re2.Options:
    options = re2.Options()
    options.max_mem = _MEMORY
    options.log_errors = False
    options.never_capture = True
    return options
