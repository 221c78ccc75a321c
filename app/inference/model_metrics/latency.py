"""
Latencies of operations, counted in buckets: their number, sum, least, greatest, and quantiles between them.

Two histograms can be added: the quantiles of a day come from those of its intervals. Within a bucket, values are taken
to be evenly spread, so a quantile is off by the width of its bucket at most: a third of the value.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

#: Upper bounds of the buckets, in seconds: from a millisecond to almost an hour. One more bucket has what is above.
BOUNDS: tuple[float, ...] = tuple(
    round(step * 10.0**power, 9) for power in range(-3, 4) for step in (1, 1.5, 2, 3, 5, 7) if step * 10**power <= 3000
)
#: The bounds that Prometheus sees: fewer series, each the exact sum of some buckets.
EXPORTED_BOUNDS: tuple[float, ...] = tuple(
    bound for bound in BOUNDS if bound in {step * 10.0**power for power in range(-3, 3) for step in (1, 2, 5)}
)


@dataclass(slots=True)
class Latencies:
    """Latencies in seconds."""

    count: int = 0
    total: float = 0.0
    #: None without a latency.
    least: float | None = None
    greatest: float | None = None
    #: How many are in each bucket; one more than there are bounds.
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))

    def add(self, seconds: float) -> None:
        """Count a latency."""
        self.count += 1
        self.total += seconds
        self.least = seconds if self.least is None else min(self.least, seconds)
        self.greatest = seconds if self.greatest is None else max(self.greatest, seconds)
        self.buckets[bisect_left(BOUNDS, seconds)] += 1

    def merge(self, other: Latencies) -> None:
        """Add all latencies of another histogram."""
        self.count += other.count
        self.total += other.total
        for mine, name in ((min, "least"), (max, "greatest")):
            known = [value for value in (getattr(self, name), getattr(other, name)) if value is not None]
            setattr(self, name, mine(known) if known else None)
        self.buckets = [mine + its for mine, its in zip(self.buckets, other.buckets, strict=True)]

    @property
    def mean(self) -> float | None:
        """The mean; None without a latency."""
        return self.total / self.count if self.count else None

    def quantile(self, part: float) -> float | None:
        """Return the value below which this part of the latencies lies, 0 to 1; None without a latency."""
        if not self.count or self.least is None or self.greatest is None:
            return None
        rank, before = part * self.count, 0
        for place, count in enumerate(self.buckets):
            if count and before + count >= rank:
                low = BOUNDS[place - 1] if place else 0.0
                high = BOUNDS[place] if place < len(BOUNDS) else self.greatest
                low, high = max(low, self.least), min(high, self.greatest)
                return low + (high - low) * max(0.0, rank - before) / count
            before += count
        return self.greatest

    def exported(self) -> Iterator[tuple[str, float]]:
        """Yield the cumulative buckets of Prometheus: the upper bound as a text, and how many are at or below it."""
        place, below = 0, 0
        for bound in EXPORTED_BOUNDS:
            while place < len(BOUNDS) and BOUNDS[place] <= bound:
                below += self.buckets[place]
                place += 1
            yield f"{bound:g}", below
        yield "+Inf", self.count


def of_buckets(
    buckets: Sequence[int], count: int, total: float, least: float | None, greatest: float | None
) -> Latencies:
    """Return stored latencies; buckets of another version, with other bounds, are left out."""
    known = list(buckets) if len(buckets) == len(BOUNDS) + 1 else [0] * (len(BOUNDS) + 1)
    return Latencies(count, total, least, greatest, known)
