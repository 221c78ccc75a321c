"""
Regular expressions of users, on RE2: the time of a match grows with the text, never exponentially.

The patterns are those of JSON Schema (ECMA-262) without look-around and back references, which RE2 cannot do in linear
time. A pattern that RE2 does not take, or that becomes too large, is refused.
Python's own `re` never sees what a user wrote.
"""

from __future__ import annotations

import re
from functools import lru_cache

import re2

#: Characters of a pattern.
MAX_LENGTH = 1_000
#: Instructions that a pattern may become, as `size` estimates them. Compiling takes some 0.2 µs for each.
MAX_SIZE = 20_000
#: Bytes of text times instructions of one match. At the worst, RE2 takes 4 ns for each product: a second.
MAX_WORK = 1 << 28
#: What messages say is accepted.
ACCEPTED = "a pattern for RE2: no look-around, no back references, at most 1000 repetitions"

#: Bytes of memory that one compiled pattern may take.
_MEMORY = 1 << 20
#: The least instructions that a match is charged for: tiny programs that build many states are slower.
_LEAST = 64


class PatternRefused(ValueError):
    """RE2 does not take the pattern, or it is too large; the message says why."""


class TextTooLong(ValueError):
    """Matching the text would take too long."""


class Pattern:
    """A compiled pattern."""

    def __init__(self, regexp: re2._re2.RE2) -> None:
        self._regexp = regexp
        self._weight = max(regexp.ProgramSize(), _LEAST)

    def found_in(self, text: str) -> bool:
        """Whether some part of the text matches. Raises TextTooLong."""
        # Half a character (a lone surrogate) becomes bytes that match nothing.
        raw = text.encode(errors="surrogatepass")
        if len(raw) * self._weight > MAX_WORK:
            raise TextTooLong(f"a text of {len(text)} characters is too long for this pattern")
        start, _ = self._regexp.Match(_UNANCHORED, raw, 0, len(raw))[0]
        return bool(start >= 0)


@lru_cache(maxsize=64)
def compiled(pattern: str) -> Pattern:
    """The compiled pattern. Raises PatternRefused."""
    if len(pattern) > MAX_LENGTH:
        raise PatternRefused(f"it is longer than {MAX_LENGTH} characters")
    if size(pattern) > MAX_SIZE:
        raise PatternRefused("its repetitions and classes make it too large")
    try:
        raw = _UNICODE.sub(_hexadecimal, pattern).encode()
    except UnicodeEncodeError:
        raise PatternRefused("it holds half a character (a lone surrogate)") from None
    regexp = re2._re2.RE2(raw, _options())
    if not regexp.ok():
        raise PatternRefused(regexp.error().decode(errors="replace"))
    return Pattern(regexp)


#: The parts of a regular expression that an estimate must know apart.
_PARTS = re.compile(r"\\[pP](?:\{\w*\}|\w)|\\.|\[\^?\]?(?:\[:\w*:\]|\\.|[^\]\\])*\]|\{(\d+)(?:,(\d*))?\}|.", re.DOTALL)


@lru_cache(maxsize=256)
def size(pattern: str) -> int:
    """How many instructions a pattern becomes at the most: a part that is repeated n times counts n times."""
    open_groups, last = [0], 0
    for part in _PARTS.finditer(pattern):
        text = part[0]
        if part[1]:
            # RE2 refuses more than a thousand.
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
    # Letters of both cases are two ranges where one was asked for.
    return sum(open_groups) * (2 if "(?" in pattern else 1) + 10


#: An escape: ECMA's of a character by its code, which RE2 writes in another way, or any other.
_UNICODE = re.compile(r"\\u([0-9A-Fa-f]{4})|\\.", re.DOTALL)
_UNANCHORED = re2._re2.RE2.Anchor.UNANCHORED


def _hexadecimal(found: re.Match[str]) -> str:
    return f"\\x{{{found[1]}}}" if found[1] else found[0]


def _options() -> re2.Options:
    options = re2.Options()
    options.max_mem = _MEMORY
    options.log_errors = False
    options.never_capture = True
    return options
