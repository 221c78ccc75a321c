"""
The arrival pattern of a model: when it was last requested, and the gaps between its last arrivals.

Requests that follow each other within `BURST` are one arrival. A few gaps are kept: a pattern costs the same however
old it is, and follows a model whose use changes.
The next arrival is predicted as serverless platforms predict the next call of a function (Shahrad et al., "Serverless
in the Wild", ATC 2020). Nothing is predicted for a model that is requested all the time, or without regularity.

Values only. Nothing here reads a clock: the caller passes `now`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from statistics import median

from app.kernel.priority import Priority

#: Requests that follow each other within that time are one arrival.
BURST = timedelta(seconds=30)
#: Gaps that are kept, and the fewest from which anything is predicted.
KEPT_GAPS, LEAST_GAPS = 16, 4


@dataclass(frozen=True, slots=True)
class ArrivalPattern:
    """When a model was last requested, and the gaps between its last arrivals."""

    last: datetime
    #: Class of the last request.
    priority: Priority
    #: Seconds, the newest last.
    gaps: tuple[float, ...] = ()

    def after(self, at: datetime, priority: Priority) -> ArrivalPattern:
        """The pattern after another request. One that is not newer than the last changes nothing."""
        if at <= self.last:
            return self
        gap = at - self.last
        gaps = self.gaps if gap < BURST else (*self.gaps, gap.total_seconds())[-KEPT_GAPS:]
        return ArrivalPattern(at, priority, gaps)

    def is_regular(self, spread: float) -> bool:
        """Whether half of the gaps differ by no more than so many seconds, and the gaps are long beside that."""
        if len(self.gaps) < LEAST_GAPS or median(self.gaps) < 2 * spread:
            return False
        gaps = sorted(self.gaps)
        half = -(-len(gaps) // 2)
        return any(last - first <= spread for first, last in zip(gaps, gaps[half - 1 :], strict=False))

    def share(self, now: datetime, within: float) -> float:
        """The part of all gaps that would end within so many seconds from now."""
        return len(self._ending(now, within)) / len(self.gaps) if self.gaps else 0.0

    def probability(self, now: datetime, within: float) -> float:
        """
        The probability of a request within so many seconds, given that there was none since the last.

        One more gap is counted that ends later, so that the longest of a few gaps is not taken for certain.
        """
        idle = (now - self.last).total_seconds()
        return len(self._ending(now, within)) / (1 + sum(gap > idle for gap in self.gaps))

    def _ending(self, now: datetime, within: float) -> Sequence[float]:
        idle = (now - self.last).total_seconds()
        return [gap for gap in self.gaps if idle < gap <= idle + within]
