"""
Samples of signals, and what is kept of them: aggregates that can be added.

An aggregate of a minute is added to those of its hour and its day; nothing is lost but the order. Quantiles come from a
histogram of eight buckets for each doubling: they are at most 4.5 % off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from app.governance.signals.names import LABELS, QUANTILES, SIGNALS, SignalKind, Statistic

#: Buckets of a histogram for each doubling of the value.
BUCKETS_PER_DOUBLING = 8
#: The lowest and the highest bucket: values below 2^-16 (15 µs) and above 2^40 count as those.
LOWEST_BUCKET, HIGHEST_BUCKET = -16 * BUCKETS_PER_DOUBLING, 40 * BUCKETS_PER_DOUBLING
#: Most characters of a label.
MAX_LABEL = 200


@dataclass(frozen=True, slots=True)
class SignalLabels:
    """What an observation is about; an empty label says nothing about it."""

    model: str = ""
    pool: str = ""
    host: str = ""
    device: str = ""
    namespace: str = ""
    priority: str = ""

    def given(self) -> dict[str, str]:
        """Return the labels that are not empty."""
        return {name: value for name in LABELS if (value := getattr(self, name))}


@dataclass(frozen=True, slots=True)
class Sample:
    """
    An observation of a signal.

    `value` and `weight` are a part and its whole for gauges of devices and for ratios: (used bytes, bytes),
    (1 for a failure or 0, 1). The weight of other observations is 1.
    """

    signal: str
    value: float
    labels: SignalLabels = SignalLabels()
    weight: float = 1.0
    #: When it was observed, by the database's clock; None for the time at which it is written.
    at: datetime | None = None


@dataclass(slots=True)
class Aggregate:
    """Observations, added up."""

    observations: int = 0
    weight: float = 0.0
    total: float = 0.0
    #: The least and the greatest value by weight; None when no observation had a weight.
    least: float | None = None
    greatest: float | None = None
    #: Observations by bucket; empty unless the signal is a distribution.
    histogram: dict[int, int] = field(default_factory=dict)

    def observe(self, sample: Sample) -> None:
        """Add an observation. One that is not finite is left out."""
        if not (math.isfinite(sample.value) and math.isfinite(sample.weight)):
            return
        self.observations += 1
        self.weight += sample.weight
        self.total += sample.value
        if sample.weight <= 0:
            return
        value = sample.value / sample.weight
        self.least = value if self.least is None else min(self.least, value)
        self.greatest = value if self.greatest is None else max(self.greatest, value)
        if SIGNALS[sample.signal].kind is SignalKind.DISTRIBUTION:
            bucket = bucket_of(value)
            self.histogram[bucket] = self.histogram.get(bucket, 0) + 1

    def add(self, other: Aggregate) -> None:
        """Add all observations of another one."""
        self.observations += other.observations
        self.weight += other.weight
        self.total += other.total
        least = [value for value in (self.least, other.least) if value is not None]
        greatest = [value for value in (self.greatest, other.greatest) if value is not None]
        self.least, self.greatest = min(least, default=None), max(greatest, default=None)
        for bucket, count in other.histogram.items():
            self.histogram[bucket] = self.histogram.get(bucket, 0) + count


@dataclass(frozen=True, slots=True)
class WindowValue:
    """A signal in a window, for one value of a label or for all."""

    observations: int
    weight: float
    total: float
    least: float | None
    greatest: float | None
    #: The mean of the latest minute; None when it had no weight.
    last: float | None
    #: Seconds of the window.
    seconds: float
    histogram: Mapping[int, int] = field(default_factory=dict)

    @property
    def mean(self) -> float | None:
        """The sum of the values by the sum of the weights."""
        return self.total / self.weight if self.weight > 0 else None

    def statistic(self, wanted: Statistic) -> float | None:
        """Return a statistic; None when there are no observations for it."""
        if wanted in QUANTILES:
            return quantile(self.histogram, QUANTILES[wanted], self.least, self.greatest)
        match wanted:
            case Statistic.MEAN:
                return self.mean
            case Statistic.MIN:
                return self.least
            case Statistic.MAX:
                return self.greatest
            case Statistic.LAST:
                return self.last
            case Statistic.COUNT:
                return float(self.observations)
            case Statistic.PER_MINUTE:
                return self.total * 60 / self.seconds if self.observations else None
        return self.total if self.observations else None


def bucket_of(value: float) -> int:
    """Return the bucket of a value; those of zero and below are in the lowest one."""
    if value <= 0:
        return LOWEST_BUCKET
    return max(LOWEST_BUCKET, min(HIGHEST_BUCKET, math.floor(math.log2(value) * BUCKETS_PER_DOUBLING)))


def quantile(
    histogram: Mapping[int, int], wanted: float, least: float | None = None, greatest: float | None = None
) -> float | None:
    """Return a quantile: the middle of its bucket, within the least and the greatest value. None for an empty one."""
    count = sum(histogram.values())
    if not count:
        return None
    rank, seen, found = max(1, math.ceil(wanted * count)), 0, LOWEST_BUCKET
    for found in sorted(histogram):
        seen += histogram[found]
        if seen >= rank:
            break
    middle = 0.0 if found <= LOWEST_BUCKET else 2 ** ((found + 0.5) / BUCKETS_PER_DOUBLING)
    if least is not None:
        middle = max(middle, least)
    return middle if greatest is None else min(middle, greatest)
