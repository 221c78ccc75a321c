"""Places of patterns in long texts, window by window, until a time limit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from app.kernel.security import regex

#: Characters of a window, and of what is read beyond it for matches that begin in it.
_WINDOW, _OVERLAP = 65_536, 8_192


class HookLate(Exception):
    """The time limit of a hook has passed."""


@dataclass(frozen=True, slots=True)
class TimeLimit:
    """A time limit, in seconds of a monotonic limit."""

    now: Callable[[], float]
    until: float

    def check(self) -> None:
        """Raises HookLate."""
        if self.now() > self.until:
            raise HookLate


def places(pattern: str, text: str, limit: TimeLimit) -> Iterator[tuple[int, int]]:
    """Yield the places of a pattern, which do not overlap, in characters. Raises HookLate."""
    found, last = regex.compiled(pattern), 0
    for start in range(0, max(len(text), 1), _WINDOW):
        limit.check()
        for count, (first, end) in enumerate(found.places_in(text[start : start + _WINDOW + _OVERLAP])):
            if not count % 256:
                limit.check()
            if first >= _WINDOW:
                break
            if start + first >= last:
                last = start + end
                yield start + first, last


def replaced(text: str, spans: Sequence[tuple[int, int, str]]) -> str:
    """The text with each place replaced; places are in order and do not overlap."""
    parts, at = [], 0
    for start, end, new in spans:
        parts += [text[at:start], new]
        at = end
    return "".join([*parts, text[at:]])


class Taken:
    """Places that are taken: the first that claims one has it."""

    def __init__(self) -> None:
        """Nothing is taken."""
        self._spans: list[tuple[int, int]] = []

    def merge(self, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Take places, in order, that overlap nothing taken; returns those that were free."""
        free: list[tuple[int, int]] = []
        at = 0
        for start, end in spans:
            while at < len(self._spans) and self._spans[at][1] <= start:
                at += 1
            if at == len(self._spans) or self._spans[at][0] >= end:
                free.append((start, end))
        self._spans = sorted([*self._spans, *free])
        return free
