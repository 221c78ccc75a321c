"""
The draft of one text: what its next tokens are predicted to be, and how well that went.

Tokens that a grammar forces come first. Behind them stands what the lookup predicts, where it agrees with them.
"""

from __future__ import annotations

from collections.abc import Sequence

from workers.engine.sampling.sampler import TokenSampler
from workers.engine.speculation.acceptance import AcceptanceRates
from workers.engine.speculation.forced import JumpAhead
from workers.engine.speculation.lookup import PromptLookup

#: Draft tokens that are accepted with a smaller probability are never computed.
_LEAST = 0.1


class DraftState:
    """The predictions of one text."""

    __slots__ = ("_forced", "_jump", "_length", "_lookup", "_rates", "accepted", "drafted")

    def __init__(
        self, tokens: Sequence[int], prompt: int, engine: AcceptanceRates, jump: JumpAhead | None = None
    ) -> None:
        """`tokens` as for `PromptLookup`; `engine` are the rates of all texts, `jump` the forced tokens of this one."""
        self._lookup, self._rates, self._jump = PromptLookup(tokens, prompt), AcceptanceRates(engine), jump
        #: Draft tokens that were computed, and accepted.
        self.drafted = self.accepted = 0
        #: Of the last draft: its tokens that are forced, and the length of the match of the lookup behind the others.
        self._forced = self._length = 0

    def follow(self, sampler: TokenSampler | None) -> None:
        """Add the tokens that were written since the last call. `sampler` is that of the text."""
        self._lookup.follow(self._rates.record)
        if self._jump is not None and sampler is not None:
            self._jump.follow(sampler)

    def reach(self, most: int) -> list[float]:
        """Return the probabilities that the next one, two, … tokens are accepted; empty without a prediction."""
        forced = [] if self._jump is None else self._jump.reach(most)
        self._forced = len(forced)
        self._length = length = self._lookup.length
        if not length or (forced and not self._agrees()):
            return forced
        least = _LEAST / forced[-1] if forced else _LEAST
        looked = self._rates.reach(length + len(forced), most - len(forced), least)
        return forced + [probability * forced[-1] for probability in looked] if forced else looked

    def _agrees(self) -> bool:
        """Whether the lookup predicts the forced tokens, too."""
        return self._jump is not None and self._lookup.predict(self._forced) == self._jump.predict(self._forced)

    def take(self, count: int) -> list[int]:
        """Return `count` predicted tokens, which will be computed; at most as many as `reach` returned last."""
        if self._jump is not None and count <= self._forced:
            return self._jump.predict(count)
        return self._lookup.predict(count)

    def verified(self, drafted: int, accepted: int) -> None:
        """Record how many of the taken tokens were accepted."""
        if drafted > self._forced <= accepted:
            self._rates.drafted(self._length + self._forced, drafted - self._forced, accepted - self._forced)
