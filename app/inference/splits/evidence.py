"""
Evidence: what the outcomes of two variants say about their difference, at any time and however often one looks.

The interval of a difference is a confidence sequence: with probability 1 - alpha it covers the true difference at all
looks together. It is that of a mixture of sequential probability ratio tests (Johari et al., Always Valid Inference,
2022), for effects of several sizes: a large one is found early, a small one is found at last.

The unit of a sample is who was assigned, such as a user, because outcomes of one user resemble each other. A mean is
then a ratio of sums over units, and its variance that of the linearised ratio.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from statistics import NormalDist

#: The sizes of effects that the mixture expects, as multiples of the smallest one that matters. Each weighs the same.
_SCALES = (1.0, 4.0, 16.0)
#: A variant with fewer units decides nothing: the variance of so few is not known.
LEAST_UNITS = 20
#: Most units that are planned for; beyond that the answer is that it takes too many.
MOST_UNITS = 10**9


class SplitVerdict(StrEnum):
    """What is known of a candidate, beside the control."""

    BETTER = "better"
    WORSE = "worse"
    #: The difference is smaller than the smallest that matters.
    EQUAL = "equal"
    UNDECIDED = "undecided"


@dataclass(frozen=True, slots=True)
class VariantSample:
    """The outcomes of one variant in one metric, as sums over units: of n observations with the sum x of one unit."""

    units: int = 0
    #: Sums of n, x, x², n² and x·n.
    observations: float = 0
    total: float = 0
    squares: float = 0
    squared_observations: float = 0
    products: float = 0
    #: The observations are 0 or 1.
    is_rate: bool = False

    @staticmethod
    def of_values(values: list[float], *, is_rate: bool = False) -> VariantSample:
        """The sample of units with one observation each."""
        count, total = len(values), math.fsum(values)
        return VariantSample(count, count, total, math.fsum(one * one for one in values), count, total, is_rate)

    @property
    def mean(self) -> float | None:
        """The mean of the observations; None without any."""
        return self.total / self.observations if self.observations else None

    @property
    def variance(self) -> float:
        """
        The variance of the mean.

        That of a rate is at least what it would be with one more event of each kind: a rate of which no event was seen
        is not known to be 0.
        """
        if self.units < 2 or not self.observations:
            return math.inf
        mean = self.total / self.observations
        spread = self.squares - 2 * mean * self.products + mean * mean * self.squared_observations
        found = max(spread, 0.0) / self.observations**2 * self.units / (self.units - 1)
        if self.is_rate:
            expected = (self.total + 1) / (self.observations + 2)
            found = max(found, expected * (1 - expected) / self.observations)
        return found


@dataclass(frozen=True, slots=True)
class Comparison:
    """A candidate beside the control."""

    #: The mean of the candidate less that of the control; None while one of them has no observations.
    difference: float | None
    #: The interval that covers the true difference.
    low: float
    high: float
    #: Both have enough units.
    is_founded: bool

    def verdict(self, effect: float, *, higher_is_better: bool) -> SplitVerdict:
        """What is known; `effect` is the smallest difference that matters."""
        if not self.is_founded:
            return SplitVerdict.UNDECIDED
        if self.low > 0 or self.high < 0:
            return SplitVerdict.BETTER if (self.low > 0) is higher_is_better else SplitVerdict.WORSE
        return SplitVerdict.EQUAL if -effect < self.low and self.high < effect else SplitVerdict.UNDECIDED


def compare(control: VariantSample, candidate: VariantSample, effect: float, alpha: float) -> Comparison:
    """Compare two samples; `effect` is the smallest difference that matters, in the unit of the means."""
    before, after = control.mean, candidate.mean
    variance = control.variance + candidate.variance
    if before is None or after is None or math.isinf(variance):
        return Comparison(None if before is None or after is None else after - before, -math.inf, math.inf, False)
    difference = after - before
    reach = half_width(variance, effect, alpha)
    is_founded = min(control.units, candidate.units) >= LEAST_UNITS
    return Comparison(difference, difference - reach, difference + reach, is_founded)


def of_mean(sample: VariantSample, effect: float, alpha: float) -> Comparison:
    """Compare the mean of a sample with 0: that of differences within pairs."""
    mean, variance = sample.mean, sample.variance
    if mean is None or math.isinf(variance):
        return Comparison(mean, -math.inf, math.inf, False)
    reach = half_width(variance, effect, alpha)
    return Comparison(mean, mean - reach, mean + reach, sample.units >= LEAST_UNITS)


def half_width(variance: float, effect: float, alpha: float) -> float:
    """Return half the width of the confidence sequence of a mean with this variance."""
    if variance <= 0:
        return 0.0
    deviation = math.sqrt(variance)
    high = deviation
    while _log_evidence(high, variance, effect) < -math.log(alpha):
        high *= 2
    return _smallest(lambda reach: _log_evidence(reach, variance, effect) >= -math.log(alpha), 0.0, high)


def units_needed(deviation: float, effect: float, alpha: float, power: float, share: float = 0.5) -> int | None:
    """
    Return how many units in all find a difference of `effect` with probability `power`. `deviation` is the standard
    deviation of one unit, `share` the part of the candidate. None: more than `MOST_UNITS`.

    It is an upper bound: a larger difference is found sooner, and one looks as often as one likes.
    """
    per_unit = deviation**2 * (1 / share + 1 / (1 - share))
    beyond = NormalDist().inv_cdf(power)

    def is_enough(units: float) -> bool:
        variance = per_unit / units
        return half_width(variance, effect, alpha) + beyond * math.sqrt(variance) <= effect

    low, high = 2.0, 4.0
    while not is_enough(high):
        if high > MOST_UNITS:
            return None
        low, high = high, 2 * high
    found = _smallest(is_enough, low, high)
    return max(math.ceil(found), math.ceil(LEAST_UNITS / min(share, 1 - share)))


def _log_evidence(difference: float, variance: float, effect: float) -> float:
    """The logarithm of the mixture of likelihood ratios against no difference."""
    parts = []
    for scale in _SCALES:
        prior = (effect * scale) ** 2
        parts.append(
            0.5 * math.log(variance / (variance + prior))
            + difference**2 * prior / (2 * variance * (variance + prior))
            - math.log(len(_SCALES))
        )
    most = max(parts)
    return most + math.log(math.fsum(math.exp(part - most) for part in parts))


def _smallest(holds: Callable[[float], bool], low: float, high: float) -> float:
    """The smallest value between two from which on something holds, to a hundred-thousandth of the upper one."""
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
