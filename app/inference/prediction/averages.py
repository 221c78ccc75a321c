"""
Averages in which older values count less: a mean, and a line through points.

Each is a few numbers, whatever it has seen. Nothing here reads a clock: a value ages by the values after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: What is left of the weight of a value after each later one: about the last 25 values decide.
KEEP = 0.96
#: The least share of the variance that a line must explain before it is used instead of the mean.
_EXPLAINED = 0.25
#: The least weight of the points of a line, and how far from the mean it is trusted, as a factor.
_POINTS, _REACH = 4.0, 4.0


@dataclass(frozen=True, slots=True)
class DecayedMean:
    """A mean of values."""

    weight: float = 0.0
    mean: float = 0.0

    def add(self, value: float) -> DecayedMean:
        """Return the mean with one more value."""
        weight = self.weight * KEEP + 1.0
        return DecayedMean(weight, self.mean + (value - self.mean) / weight)

    def state(self) -> list[float]:
        """Return it as JSON."""
        return _rounded((self.weight, self.mean))

    @classmethod
    def of(cls, state: Sequence[float] | None) -> DecayedMean:
        """Return the mean of a state."""
        return cls(*state) if state else cls()


@dataclass(frozen=True, slots=True)
class DecayedLine:
    """A line through points (x, y), or the mean of y where x says little about y."""

    weight: float = 0.0
    mean_x: float = 0.0
    mean_y: float = 0.0
    #: Weighted sums of squares and of products of distances from the means.
    xx: float = 0.0
    xy: float = 0.0
    yy: float = 0.0

    def add(self, x: float, y: float) -> DecayedLine:
        """Return the line with one more point."""
        weight = self.weight * KEEP + 1.0
        from_x, from_y = x - self.mean_x, y - self.mean_y
        mean_x, mean_y = self.mean_x + from_x / weight, self.mean_y + from_y / weight
        return DecayedLine(
            weight,
            mean_x,
            mean_y,
            self.xx * KEEP + from_x * (x - mean_x),
            self.xy * KEEP + from_x * (y - mean_y),
            self.yy * KEEP + from_y * (y - mean_y),
        )

    def at(self, x: float) -> float:
        """Return the expected y, which is never negative and never far from the mean."""
        if self.weight < _POINTS or self.xx <= 0 or self.yy <= 0:
            return self.mean_y
        explained = self.xy * self.xy / (self.xx * self.yy)
        if explained < _EXPLAINED:
            return self.mean_y
        value = self.mean_y + self.xy / self.xx * (x - self.mean_x)
        return min(max(value, self.mean_y / _REACH), self.mean_y * _REACH)

    def state(self) -> list[float]:
        """Return it as JSON."""
        return _rounded((self.weight, self.mean_x, self.mean_y, self.xx, self.xy, self.yy))

    @classmethod
    def of(cls, state: Sequence[float] | None) -> DecayedLine:
        """Return the line of a state."""
        return cls(*state) if state else cls()


#: Nothing was seen.
NO_MEAN, NO_LINE = DecayedMean(), DecayedLine()


def _rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.6g}") for value in values]
