"""
Decode costs: the seconds of a decode by the number of tokens in it, as measured while serving.

More tokens in a decode are almost free where reading the weights takes most of the time, and cost nearly as much as
decodes of their own on a slow CPU. So costs are measured for each number of tokens. Those that were not measured, or
long ago, are assumed to be those of prompt tokens: then they are tried, and known.
A cost is the median of the last measurements, because some are several times as long when another program has a core.
Other programs also slow all decodes for a while. So what is kept are the seconds at the usual pace: a measurement is
divided by how much longer than usual the last decodes without drafts took. Only ratios of costs decide.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Collection

#: Measurements that are kept of each number of tokens.
_KEPT = 9
#: Measurements before the cost of a decode without drafts is known.
_MIN_MEASURED = 4
#: A cost that was not measured for so many decodes is half forgotten.
_FORGOTTEN_AFTER = 1024
#: A cost is relied on after so many measurements; before, it is in part the assumed one.
_RELIABLE = 3
#: A further token is assumed to cost what one of a prompt does; before a prompt, this part of one of a small decode.
_ASSUMED = 0.5


class DecodeCosts:
    """The measured costs of one engine."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._measured: dict[int, deque[float]] = {}
        self._costs: dict[int, float] = {}
        self._last: dict[int, int] = {}
        self._decodes = 0
        #: How many times as long as usual the last decodes without drafts took.
        self._slowness: deque[float] = deque(maxlen=_KEPT)
        #: The median of these: divides seconds as measured.
        self.pace = 1.0
        #: Seconds of a prompt token in a large decode, at the usual pace; 0 while it is not known.
        self.prompt_token = 0.0

    def record(self, tokens: int, seconds: float, *, has_drafts: bool = False) -> None:
        """Record a decode of so many tokens, each of them with logits, and its seconds as measured."""
        self._decodes += 1
        measured = self._measured.get(tokens)
        if measured is None:
            insort(self._sizes, tokens)
            measured = self._measured[tokens] = deque(maxlen=_KEPT)
        elif not has_drafts and len(measured) >= _MIN_MEASURED:
            self._slowness.append(seconds / self._costs[tokens] if self._costs[tokens] else 1.0)
            self.pace = _median(self._slowness)
        measured.append(seconds / self.pace)
        self._costs[tokens] = _median(measured)
        self._last[tokens] = self._decodes

    def known(self, tokens: int) -> float | None:
        """The seconds of a decode of so many tokens, at the usual pace; None until it was measured often enough."""
        return self._costs[tokens] if len(self._measured.get(tokens, ())) >= _MIN_MEASURED else None

    def latest(self, tokens: int) -> float:
        """The seconds of a decode of so many tokens at the usual pace, which was measured at least once."""
        return self._costs[tokens]

    def more(self, tokens: int, added: int) -> float:
        """Return the seconds that `added` more tokens are expected to add to a decode of `tokens`, which is known."""
        base, size = self._costs[tokens], tokens + added
        token = base / tokens
        marginal = min(self.prompt_token or _ASSUMED * token, token)
        cost = self._costs.get(size)
        if cost is None:
            return max(0.0, self._nearby(size, tokens, marginal) - base)
        age = self._decodes - self._last[size]
        doubt = max(age / (age + _FORGOTTEN_AFTER), 1 - len(self._measured[size]) / _RELIABLE)
        return max(0.0, cost + min(0.0, base + added * marginal - cost) * doubt - base)

    def _nearby(self, size: int, base: int, marginal: float) -> float:
        """Interpolate between measured sizes above `base`; elsewhere more tokens are assumed to cost little."""
        at = bisect_left(self._sizes, size)
        before = self._sizes[at - 1]  # at least `base`, which was measured
        if at == len(self._sizes) or before <= base:
            return self._costs[before] + (size - before) * marginal
        after = self._sizes[at]
        part = (size - before) / (after - before)
        return self._costs[before] + (self._costs[after] - self._costs[before]) * part


def _median(values: Collection[float]) -> float:
    return sorted(values)[len(values) // 2]
