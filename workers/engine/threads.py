"""
CPU threads: how many of them compute a decode, by measurement. Pure values; time is passed in.

More threads are faster while each has a core of its own. The threads of a decode wait for one another after each
operation, so one that shares its core with another program delays all: then fewer are faster, up to twenty times.
What is best depends on the size of a decode too, so those of one token, of several, and of a prompt are judged apart.

A trial alternates decodes of equal size with the chosen and another number of threads, and compares them pair by pair.
Fewer threads are chosen when they are as fast, more when they are at least 5 % faster. Trials are repeated after a time
that bounds what they cost, and at once when decodes take longer than before.
"""

from __future__ import annotations

from bisect import bisect_left
from statistics import median

#: Decodes of fewer tokens than this are of texts, others mostly of prompts.
PROMPT_TOKENS = 32
#: Pairs of a trial. A trial ends when one decode is this many times as slow as the other of its pair.
_PAIRS, _HOPELESS = 5, 1.8
#: More threads are chosen when they need at most this part of the time of fewer, and fewer at most this of more.
_FASTER, _EQUAL = 0.95, 1.02
#: The part of the time that trials may cost: after the first that failed, and how often it is halved when more of them
#: fail in a row; the least seconds of decodes between two trials.
_LOSS, _HALVINGS, _REST = 0.04, 3, 1.0
#: So many decodes in a row, each so many times as long as usual, begin a trial; the least seconds between two such.
_SLOW_DECODES, _SLOW, _SLOW_REST = 3, 1.4, 2.0
#: The weight of a new decode in what is usual.
_BLEND = 1 / 16
#: Decodes of prompts are compared when their sizes differ by at most this part.
_SIMILAR = 0.1


def candidates(most: int) -> list[int]:
    """Return the numbers of threads that are tried, ascending: 1, 2, 3, 4, 6, 8, 12, … below `most`, and `most`."""
    found, power = {1, most}, 2
    while power < most:
        found |= {power, min(power + power // 2, most)}
        power *= 2
    return sorted(found)


class ThreadChoice:
    """The number of threads for decodes of one kind."""

    def __init__(self, most: int) -> None:
        """`most` is the largest number that may be chosen, at least 1. It is chosen first."""
        self._numbers = candidates(most)
        self._at = len(self._numbers) - 1
        self.limit(most)

    @property
    def chosen(self) -> int:
        """The number of threads that is best, as far as is known."""
        return self._numbers[self._at]

    @property
    def is_settled(self) -> bool:
        """Whether no trial runs, or is due."""
        return self._trial is None and self._busy < self._next_at

    def limit(self, most: int) -> None:
        """Change the largest number. It is chosen if the largest was chosen before, or a larger one than it."""
        chosen, was_most = self.chosen, self._at == len(self._numbers) - 1
        self._numbers = candidates(most)
        self._at = len(self._numbers) - 1 if was_most or chosen >= most else bisect_left(self._numbers, chosen)
        #: Seconds of all decodes so far; trials are due by this clock.
        self._busy = self._next_at = self._slow_at = 0.0
        self._down = True
        self._failures = {True: 0, False: 0}
        self._forget()

    def _forget(self) -> None:
        #: The place of the number that is tried, the first half of a pair, the ratios of the pairs, seconds lost.
        self._trial: int | None = None
        self._first: tuple[int, float] | None = None
        self._ratios: list[float] = []
        self._lost = 0.0
        #: Seconds of a token with the chosen number, by tokens; decodes in a row that were slower.
        self._usual: dict[int, float] = {}
        self._slow = 0

    def count(self, tokens: int) -> int:
        """Return the number of threads for the next decode, of so many tokens."""
        if self._trial is None and self._busy >= self._next_at:
            self._begin()
        if self._trial is None or self._first is None or not _is_similar(tokens, self._first[0]):
            return self.chosen
        return self._numbers[self._trial]

    def _begin(self) -> None:
        """Begin a trial of the next smaller or larger number, in turn."""
        if len(self._numbers) == 1:
            self._next_at = float("inf")
            return
        if not 0 <= self._at + (-1 if self._down else 1) < len(self._numbers):
            self._down = not self._down
        self._trial = self._at + (-1 if self._down else 1)
        self._first, self._ratios, self._lost = None, [], 0.0

    def record(self, tokens: int, count: int, seconds: float) -> None:
        """Record a decode of `tokens` with `count` threads."""
        self._busy += seconds
        if count == self.chosen:
            self._first = (tokens, seconds)
            self._watch(tokens, seconds)
            return
        first = self._first
        self._first = None
        if self._trial is None or count != self._numbers[self._trial] or first is None or first[1] <= 0:
            return
        usual = first[1] * tokens / first[0]
        self._ratios.append(seconds / usual)
        self._lost += max(0.0, seconds - usual)
        if seconds > usual * _HOPELESS or len(self._ratios) == _PAIRS:
            self._end()

    def _end(self) -> None:
        ratio = max(self._ratios) if len(self._ratios) < _PAIRS else median(self._ratios)
        down, trial, lost = self._down, self._trial, self._lost
        assert trial is not None, "only a trial ends"
        if ratio <= (_EQUAL if down else _FASTER):
            self._at = trial
            self._failures = {True: 0, False: 0}
            self._forget()
            self._next_at = self._busy  # perhaps the next number is better still
            return
        loss = _LOSS / 2 ** self._failures[down]
        self._failures[down] = min(self._failures[down] + 1, _HALVINGS)
        self._trial, self._slow = None, 0
        self._down = not down
        self._next_at = self._busy + max(_REST, lost / loss)

    def _watch(self, tokens: int, seconds: float) -> None:
        """Begin a trial of fewer threads when decodes take longer than usual."""
        kind = tokens if tokens < PROMPT_TOKENS else PROMPT_TOKENS
        each = seconds / tokens
        usual = self._usual.get(kind)
        self._slow = self._slow + 1 if usual is not None and each > usual * _SLOW else 0
        if self._slow >= _SLOW_DECODES and self._trial is None and self._busy >= self._slow_at:
            self._slow, self._down = 0, True
            self._next_at, self._slow_at = self._busy, self._busy + _SLOW_REST
            del self._usual[kind]
            return
        if not self._slow:
            self._usual[kind] = each if usual is None else usual + (each - usual) * _BLEND


class DecodeThreads:
    """The threads of all decodes of one context."""

    def __init__(self, most: int, *, texts: int | None, prompts: int | None, is_measured: bool) -> None:
        """
        At most `most` threads are used. `texts` and `prompts` are numbers that never change; None leaves the choice.

        Unless `is_measured`, that is `most`.
        """
        self._most, self._given = most, (texts, texts, prompts)
        self._choices = [ThreadChoice(most) if is_measured and number is None else None for number in self._given]

    def count(self, tokens: int) -> int:
        """Return the number of threads for the next decode, of so many tokens."""
        kind = _kind(tokens)
        choice = self._choices[kind]
        return (self._given[kind] or self._most) if choice is None else choice.count(tokens)

    def record(self, tokens: int, count: int, seconds: float) -> None:
        """Record a successful decode of `tokens` with `count` threads."""
        if (choice := self._choices[_kind(tokens)]) is not None:
            choice.record(tokens, count, seconds)

    def limit(self, most: int) -> None:
        """Change the largest number of threads."""
        self._most = most
        for choice in self._choices:
            if choice is not None:
                choice.limit(most)

    def is_settled(self, tokens: int) -> bool:
        """Whether no trial runs, or is due, for decodes of so many tokens."""
        choice = self._choices[_kind(tokens)]
        return choice is None or choice.is_settled

    def chosen(self, tokens: int) -> int:
        """Return the number that is best for decodes of so many tokens, as far as is known."""
        choice = self._choices[_kind(tokens)]
        return self.count(tokens) if choice is None else choice.chosen


def _kind(tokens: int) -> int:
    """Return 0 for a decode of one token, 1 for one of some, and 2 for one of a prompt."""
    return 0 if tokens == 1 else 1 if tokens < PROMPT_TOKENS else 2


def _is_similar(tokens: int, other: int) -> bool:
    return tokens == other or (
        min(tokens, other) >= PROMPT_TOKENS and abs(tokens - other) <= _SIMILAR * max(tokens, other)
    )
