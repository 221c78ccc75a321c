"""The draft of one text: what its next tokens are predicted to be, and how well that went."""

from __future__ import annotations

from collections.abc import Sequence

from workers.engine.speculation.acceptance import AcceptanceRates
from workers.engine.speculation.lookup import PromptLookup

#: Draft tokens that are accepted with a smaller probability are never computed.
_LEAST = 0.1


class DraftState:
    """The predictions of one text."""

    __slots__ = ("_expected", "_lookup", "_rates", "accepted", "drafted")

    def __init__(self, tokens: Sequence[int], prompt: int, engine: AcceptanceRates) -> None:
        """`tokens` as for `PromptLookup`; `engine` are the rates of all texts."""
        self._lookup, self._rates = PromptLookup(tokens, prompt), AcceptanceRates(engine)
        #: Draft tokens that were computed, and accepted.
        self.drafted = self.accepted = 0
        self._expected = 0.0

    def follow(self) -> None:
        """Add the tokens that were written since the last call."""
        self._lookup.follow(self._rates.record)

    def reach(self, most: int) -> list[float]:
        """Return the probabilities that the next one, two, … tokens are accepted; empty without a prediction."""
        length = self._lookup.length
        return self._rates.reach(length, most, _LEAST) if length else []

    def take(self, count: int, reach: Sequence[float]) -> list[int]:
        """Return `count` predicted tokens, which will be computed; `reach` as it was returned."""
        self._expected = sum(reach[:count])
        return self._lookup.predict(count)

    def verified(self, drafted: int, accepted: int) -> None:
        """Record how many of the taken tokens were accepted."""
        self.drafted += drafted
        self.accepted += accepted
        self._rates.drafted(self._expected, accepted)
