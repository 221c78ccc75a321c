"""
Hit rates: how often predictions of several kinds were right.

The rates of a text begin at those of its engine, and are its own after a few predictions. Old outcomes count less.
"""

from __future__ import annotations

from collections.abc import Sequence


class HitRates:
    """The hit rates of one text, or of an engine. A kind is an index."""

    __slots__ = ("_decay", "_first", "_hits", "_prior", "_trials", "_weight")

    def __init__(
        self, first: Sequence[float], decay: float, prior: HitRates | None = None, *, weight: float = 4.0
    ) -> None:
        """
        `first` are the rates by kind with which an engine begins; a text begins with those of `prior`, which gets its
        outcomes too. They count as `weight` outcomes. An outcome counts by `decay` less with each later one.
        """
        self._first, self._decay, self._prior, self._weight = first, decay, prior, weight
        self._hits, self._trials = [0.0] * len(first), [0.0] * len(first)

    def record(self, kind: int, is_hit: bool) -> None:
        """Record the outcome of a prediction."""
        self._hits[kind] = self._hits[kind] * self._decay + is_hit
        self._trials[kind] = self._trials[kind] * self._decay + 1
        if self._prior is not None:
            self._prior.record(kind, is_hit)

    def rate(self, kind: int) -> float:
        """The probability that the next prediction is right."""
        prior = self._first[kind] if self._prior is None else self._prior.rate(kind)
        return (self._hits[kind] + self._weight * prior) / (self._trials[kind] + self._weight)

    def forget(self, factor: float) -> None:
        """Let all own outcomes count by this factor less."""
        self._hits = [hits * factor for hits in self._hits]
        self._trials = [trials * factor for trials in self._trials]
