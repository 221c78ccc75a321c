"""
Acceptance rates: how often a predicted token was the one that the model chose, by the length of the match behind it.

Drafts are computed where the rates are high, some of them by chance, so they fail more often than the rates say. What
failed of earlier drafts beyond that, for each of their tokens, corrects it.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Final

from workers.engine.speculation.hit_rates import HitRates

#: Matches are counted in groups that begin at these lengths.
_LENGTHS: Final = (3, 4, 6, 9, 17, 33)
#: The rates of an engine that has seen nothing: low, as predictions are judged without being computed.
_FIRST: Final = (0.1, 0.15, 0.2, 0.4, 0.6, 0.7, 0.8)
#: An outcome counts by this factor less with each later one of its group.
_TEXT_DECAY, _ENGINE_DECAY = 0.97, 0.998
#: So many tokens count as drafted before any was, and the decay of earlier drafts with each later one.
_TRUSTED, _DRAFT_DECAY = 8.0, 0.95


class AcceptanceRates:
    """The acceptance rates of one text, or of an engine."""

    __slots__ = ("_computed", "_failures", "_outcomes", "_prior")

    def __init__(self, prior: AcceptanceRates | None = None) -> None:
        """`prior` are the rates of the engine, which get each outcome too."""
        self._prior = prior
        self._outcomes: HitRates = (
            HitRates(_FIRST, _ENGINE_DECAY) if prior is None else HitRates(_FIRST, _TEXT_DECAY, prior._outcomes)
        )
        #: Draft tokens up to the first that failed, and the failures beyond the expected ones.
        self._computed = self._failures = 0.0

    def record(self, length: int, is_hit: bool) -> None:
        """Record the outcome of a prediction behind a match of `length` tokens."""
        self._outcomes.record(bisect_right(_LENGTHS, length), is_hit)

    def rate(self, length: int) -> float:
        """The probability that the next token is the predicted one."""
        return self._outcomes.rate(bisect_right(_LENGTHS, length))

    def drafted(self, length: int, drafted: int, accepted: int) -> None:
        """Record a draft that was computed behind a match of `length` tokens, and how many of it were accepted."""
        computed = min(accepted + 1, drafted)
        expected = sum(1 - self.rate(length + place) for place in range(computed))
        self._drafted(computed, (accepted < drafted) - expected)

    def _drafted(self, computed: int, failures: float) -> None:
        self._computed = self._computed * _DRAFT_DECAY + computed
        self._failures = self._failures * _DRAFT_DECAY + failures
        if self._prior is not None:
            self._prior._drafted(computed, failures)

    @property
    def excess(self) -> float:
        """How much less likely a draft token is accepted than its rate says."""
        prior = 0.0 if self._prior is None else self._prior.excess
        return max(0.0, (self._failures + _TRUSTED * prior) / (self._computed + _TRUSTED))

    def forget_drafts(self) -> None:
        """Forget a part of the drafts, when there was none for long."""
        self._computed *= _DRAFT_DECAY
        self._failures *= _DRAFT_DECAY

    def reach(self, length: int, most: int, least: float) -> list[float]:
        """
        Return the probabilities that the first, the first two, … predicted tokens are accepted.

        Ends after `most` of them, or before the first that is below `least`.
        """
        found: list[float] = []
        probability, excess, known, rate = 1.0, self.excess, -1, 0.0
        for place in range(length, length + most):
            group = bisect_right(_LENGTHS, place)
            if group != known:
                known, rate = group, self._outcomes.rate(group) - excess
            probability *= rate
            if probability < least:
                break
            found.append(probability)
        return found
