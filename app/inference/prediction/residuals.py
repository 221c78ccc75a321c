"""
Residuals: by which factor earlier predictions were wrong, and the interval that follows from it.

This is weighted split conformal prediction: the interval of a new prediction lies between quantiles of past residuals,
of which older ones count less (Barber et al. 2023, "Conformal prediction beyond exchangeability"). How much is left out
at either end is corrected by what was missed (Gibbs and Candes 2021, "Adaptive conformal inference under distribution
shift"), so that the share of hits stays at 80 % while times drift.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

#: The share of truths that an interval is to hold.
COVERAGE = 0.8
#: Residuals that are kept, those that a group needs to be used, and what is left of a weight after each later one.
MOST, ENOUGH, _KEEP = 96, 15, 0.985
#: What is added to both times before they are compared, in seconds: below, differences are noise.
_FLOOR = 0.05
#: The share that is left out at either end, how fast it is corrected, and its bounds.
_TAIL, _RATE, _TAIL_BOUNDS = (1 - COVERAGE) / 2, 0.02, (0.02, 0.25)
#: Logarithm of the factor of an interval for which nothing is known.
UNKNOWN_SPREAD = math.log(4)


@dataclass(frozen=True, slots=True)
class Interval:
    """An expected time with its interval. Seconds."""

    seconds: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Residuals:
    """The last residuals of a group of predictions: logarithms of truth over prediction, the oldest first."""

    values: Sequence[float] = field(default=())
    #: The shares that are left out below and above.
    below: float = _TAIL
    above: float = _TAIL

    @property
    def is_enough(self) -> bool:
        """Whether an interval can be computed from them."""
        return len(self.values) >= ENOUGH

    def add(self, predicted: float, truth: float, given: Interval | None = None) -> Residuals:
        """
        Return the residuals with one more. `predicted` is the time before its correction by residuals.

        `given` is the interval that was given: what it missed corrects the shares.
        """
        value = math.log((truth + _FLOOR) / (predicted + _FLOOR))
        below, above = self.below, self.above
        if given is not None:
            below = _bounded(below + _RATE * (_TAIL - (truth < given.low)))
            above = _bounded(above + _RATE * (_TAIL - (truth > given.high)))
        return Residuals((*self.values[-MOST + 1 :], round(value, 4)), below, above)

    def around(self, predicted: float) -> Interval:
        """Return the corrected time, and its interval. With few residuals the interval is wide."""
        if not self.is_enough:
            factor = math.exp(UNKNOWN_SPREAD)
            return Interval(predicted, predicted / factor, predicted * factor)
        seconds, low, high = (
            max((predicted + _FLOOR) * math.exp(_quantile(self.values, share)) - _FLOOR, 0.0)
            for share in (0.5, self.below, 1 - self.above)
        )
        return Interval(min(max(seconds, low), high), low, high)

    def state(self) -> dict[str, Any]:
        """Return them as JSON."""
        return {"values": list(self.values), "below": round(self.below, 4), "above": round(self.above, 4)}

    @classmethod
    def of(cls, state: Mapping[str, Any] | None) -> Residuals:
        """Return the residuals of a state."""
        return cls() if not state else cls(tuple(state["values"]), state["below"], state["above"])


#: Nothing was predicted.
NO_RESIDUALS = Residuals()


def _quantile(values: Sequence[float], share: float) -> float:
    """
    Return a weighted quantile. Its place among n equal weights is share * (n + 1), as a new value takes part.

    Beyond the outermost values it is the outermost one.
    """
    last = len(values) - 1
    ordered = sorted((value, _KEEP ** (last - index)) for index, value in enumerate(values))
    target = share * (sum(weight for _, weight in ordered) + 1.0)
    passed, before = 0.0, ordered[0][0]
    for value, weight in ordered:
        if passed + weight >= target:
            part = (target - passed) / weight if passed else 1.0
            return before + (value - before) * part
        passed, before = passed + weight, value
    return before


def _bounded(share: float) -> float:
    return min(max(share, _TAIL_BOUNDS[0]), _TAIL_BOUNDS[1])
