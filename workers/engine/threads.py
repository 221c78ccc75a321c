"""
CPU threads: how many of them compute a decode, by measurement. Pure values; time is passed in.

More threads are faster while each has a core of its own. The threads of a decode wait for one another after each
operation, so one that shares its core with another program delays all: then fewer are faster, up to twenty times.
What is best depends on the size of a decode too, so those of one token, of several, and of a prompt are judged apart.

A trial alternates two decodes with the chosen number of threads and two with another one, all of equal size, and
compares the second ones pair by pair: the first ones pay for the change, as threads end and begin.
Another number is chosen when it is at least 5 % faster, or as fast with fewer threads. Prompts, whose decodes are long
and few, keep theirs then, and steps have fewer of their tokens while fewer threads are tried. Trials begin after some
decodes, are repeated after a time that bounds what they cost, and at once when decodes take longer than before.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from enum import IntEnum
from statistics import median

#: A decode in which one sequence has so many tokens is of a prompt, others are of texts: drafts are fewer.
PROMPT_TOKENS = 32
#: Pairs of a trial. It ends before when one decode is so many times as slow as that beside it, or two as slow or fast.
_PAIRS, _HOPELESS, _POOR = 5, 1.8, 1.25
#: So much slower even the first decode of a trial ends it.
_DREADFUL = 3.0
#: The first trial begins after the time of so many decodes.
_FIRST_AFTER = 200
#: Another number is chosen when it needs at most this part of the time; fewer threads for texts, when as fast.
_FASTER, _EQUAL = 0.95, 1.02
#: The part of the time that trials of fewer and of more threads may cost after the first that failed, and how often it
#: is halved when more of them fail in a row; the least seconds of decodes between two trials.
_LOSS_DOWN, _LOSS_UP, _HALVINGS, _REST = 0.01, 0.1, 2, 1.0
#: So many decodes in a row, each so many times as long as usual, begin a trial; the least seconds between two such.
_SLOW_DECODES, _SLOW, _SLOW_REST = 3, 1.4, 2.0
#: The weight of a new decode in what is usual.
_BLEND = 1 / 16
#: Decodes of so many tokens are compared when their sizes differ by at most this part; smaller ones must be equal.
_LARGE, _SIMILAR = 32, 0.1


class DecodeKind(IntEnum):
    """Decodes of one text, of several, and of prompts. Each has its own number of threads."""

    ONE_TEXT = 0
    TEXTS = 1
    PROMPTS = 2


def candidates(most: int) -> list[int]:
    """Return the numbers of threads that are tried, ascending: 1, 2, 3, 4, 6, 8, 12, … below `most`, and `most`."""
    found, power = {1, most}, 2
    while power < most:
        found |= {power, min(power + power // 2, most)}
        power *= 2
    return sorted(found)


class ThreadChoice:
    """The number of threads for decodes of one kind."""

    def __init__(self, most: int, *, takes_ties: bool = True) -> None:
        """
        `most` is the largest number that may be chosen, at least 1. It is chosen first.

        With `takes_ties`, fewer threads are chosen when they are as fast.
        """
        self._takes_ties = takes_ties
        self._numbers = candidates(most)
        #: The number of threads that is best, as far as is known. May be read from any thread.
        self.chosen = most
        self.limit(most)

    @property
    def is_settled(self) -> bool:
        """Whether no trial runs, or is due."""
        return self._trial is None and self._busy < self._next_at

    @property
    def part(self) -> float:
        """The part of the usual tokens that a decode should have while fewer threads are tried; 1 otherwise."""
        return 1.0 if self._trial is None else min(1.0, self._trial / self.chosen)

    def limit(self, most: int) -> None:
        """Change the largest number. It is chosen if the largest was chosen before, or a larger one than it."""
        keeps = self.chosen != self._numbers[-1] and self.chosen < most
        self._numbers = candidates(most)
        self.chosen = self._numbers[bisect_left(self._numbers, self.chosen)] if keeps else most
        #: Seconds of all decodes so far; trials are due by this clock.
        self._busy = self._slow_at = 0.0
        self._next_at = math.inf
        self._down = True
        self._failures = {True: 0, False: 0}
        self._was_tried = False
        self._forget()

    def try_now(self) -> None:
        """Begin a trial with the next decode, if there is another number."""
        if len(self._numbers) > 1:
            self._next_at = self._busy

    def suggest(self, number: int) -> None:
        """Begin with this number, which is best for decodes of another kind, unless another one was tried before."""
        if not self._was_tried and number in self._numbers and number != self.chosen:
            self.chosen = number
            self._forget()
            self._next_at = self._busy

    def _forget(self) -> None:
        #: The number that is tried, the first half of a pair, the ratios of the pairs, seconds lost.
        self._trial: int | None = None
        self._first: tuple[int, float] | None = None
        #: The number of the last decode of a trial: the first decode after a change pays for it, and does not count.
        self._last = 0
        self._ratios: list[float] = []
        self._lost = 0.0
        #: Seconds of a token with the chosen number, by size of the decode; decodes in a row that were slower.
        self._usual: dict[int, float] = {}
        self._slow = 0

    def count(self, tokens: int) -> int:
        """Return the number of threads for the next decode, of so many tokens."""
        if self._trial is None and self._busy >= self._next_at:
            self._begin()
        if self._trial is None or self._first is None or not _is_similar(tokens, self._first[0]):
            return self.chosen
        return self._trial

    def _begin(self) -> None:
        """Begin a trial of the next smaller or larger number, in turn."""
        if len(self._numbers) == 1:
            self._next_at = math.inf
            return
        at = self._numbers.index(self.chosen)
        if at == (0 if self._down else len(self._numbers) - 1):
            self._down = not self._down
        self._trial = self._numbers[at - 1 if self._down else at + 1]
        self._first, self._ratios, self._lost = None, [], 0.0

    def record(self, tokens: int, count: int, seconds: float) -> None:
        """Record a decode of `tokens` with `count` threads."""
        self._busy += seconds
        if not self._was_tried:
            self._next_at = min(self._next_at, self._busy + _FIRST_AFTER * seconds)
        pays, self._last = count != self._last and self._trial is not None, count
        if count == self.chosen:
            if not pays:
                self._first = (tokens, seconds)
                self._watch(tokens, seconds)
            return
        first = self._first
        if count != self._trial or first is None or first[1] <= 0:
            self._first = None
            return
        usual = first[1] * tokens / first[0]
        self._lost += max(0.0, seconds - usual)
        if pays and seconds <= usual * _DREADFUL:
            return
        self._first = None
        self._ratios.append(seconds / usual)
        last = self._ratios[-2:]
        is_clear = last[-1] > _HOPELESS or (len(last) > 1 and (min(last) > _POOR or max(last) < 1 / _POOR))
        if is_clear or len(self._ratios) == _PAIRS:
            self._end()

    def _end(self) -> None:
        ratio = self._ratios[-1] if len(self._ratios) < _PAIRS else median(self._ratios)
        down, trial, lost = self._down, self._trial, self._lost
        assert trial is not None, "only a trial ends"
        self._was_tried = True
        if ratio <= (_EQUAL if down and self._takes_ties else _FASTER):
            self.chosen = trial
            self._failures = {True: 0, False: 0}
            self._forget()
            self._next_at = self._busy  # perhaps the next number is better still
            return
        loss = (_LOSS_DOWN if down else _LOSS_UP) / 2 ** self._failures[down]
        self._failures[down] = min(self._failures[down] + 1, _HALVINGS)
        self._trial, self._slow = None, 0
        self._down = not down
        self._next_at = self._busy + max(_REST, lost / loss)
        if down:
            self._slow_at = max(self._slow_at, self._busy + lost / _LOSS_DOWN)

    def _watch(self, tokens: int, seconds: float) -> None:
        """Begin a trial of fewer threads when decodes take longer than usual."""
        size = tokens if tokens < _LARGE else _LARGE * tokens.bit_length()
        each = seconds / tokens
        usual = self._usual.get(size)
        self._slow = self._slow + 1 if usual is not None and each > usual * _SLOW else 0
        if self._slow >= _SLOW_DECODES and self._trial is None and self._busy >= self._slow_at:
            self._slow, self._down = 0, True
            self._next_at, self._slow_at = self._busy, self._busy + _SLOW_REST
            del self._usual[size]
            return
        if not self._slow:
            self._usual[size] = each if usual is None else usual + (each - usual) * _BLEND


class DecodeThreads:
    """The threads of all decodes of one context."""

    def __init__(self, most: int, *, texts: int | None, prompts: int | None, is_measured: bool) -> None:
        """
        At most `most` threads are used. `texts` and `prompts` are numbers that never change; None leaves the choice.

        Unless `is_measured`, that is `most`.
        """
        self._most, self._given = most, (texts, texts, prompts)
        self._choices = [
            ThreadChoice(most, takes_ties=kind is not DecodeKind.PROMPTS)
            if is_measured and self._given[kind] is None
            else None
            for kind in DecodeKind
        ]

    def count(self, kind: DecodeKind, tokens: int) -> int:
        """Return the number of threads for the next decode, of so many tokens."""
        choice = self._choices[kind]
        return (self._given[kind] or self._most) if choice is None else choice.count(tokens)

    def record(self, kind: DecodeKind, tokens: int, count: int, seconds: float) -> None:
        """Record a successful decode of `tokens` with `count` threads."""
        if (choice := self._choices[kind]) is None:
            return
        before = choice.chosen
        choice.record(tokens, count, seconds)
        if choice.chosen != before and kind is not DecodeKind.PROMPTS:
            for other in self._choices[: DecodeKind.PROMPTS]:
                if other is not None:
                    other.suggest(choice.chosen)

    def limit(self, most: int) -> None:
        """Change the largest number of threads."""
        self._most = most
        for choice in self._choices:
            if choice is not None:
                choice.limit(most)

    def try_now(self, kind: DecodeKind) -> None:
        """Begin a trial with the next decode of the kind, if its number is measured and there is another one."""
        if (choice := self._choices[kind]) is not None:
            choice.try_now()

    def is_settled(self, kind: DecodeKind) -> bool:
        """Whether no trial runs, or is due, for decodes of the kind."""
        choice = self._choices[kind]
        return choice is None or choice.is_settled

    @property
    def prompt_part(self) -> float:
        """
        The part of the usual prompt tokens that a step should have beside texts.

        It is below 1 while fewer threads are tried for prompts: with half as many, a step would take twice as long.
        """
        choice = self._choices[DecodeKind.PROMPTS]
        return 1.0 if choice is None else choice.part

    def chosen(self, kind: DecodeKind) -> int:
        """Return the number that is best for decodes of the kind, as far as is known. Safe from any thread."""
        choice = self._choices[kind]
        return (self._given[kind] or self._most) if choice is None else choice.chosen


def kind_of(tokens: int, longest: int) -> DecodeKind:
    """Return the kind of a decode of so many tokens, of which one sequence has `longest`."""
    if longest >= PROMPT_TOKENS:
        return DecodeKind.PROMPTS
    return DecodeKind.ONE_TEXT if tokens == 1 else DecodeKind.TEXTS


def _is_similar(tokens: int, other: int) -> bool:
    return tokens == other or (min(tokens, other) >= _LARGE and abs(tokens - other) <= _SIMILAR * max(tokens, other))
