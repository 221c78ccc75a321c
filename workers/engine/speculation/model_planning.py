"""
Plans for a draft model: which texts it drafts for, and how many tokens. Pure functions and values.

A drafted token is worth what a token costs without drafts. It costs its part of a decode of the draft model, and what
it adds to the decode of the model. Both are measured; before, the time of a decode of the draft model is assumed to
follow from the size of its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from workers.engine.speculation.costs import DecodeCosts
from workers.engine.speculation.drafting import MARGIN
from workers.engine.speculation.hit_rates import HitRates

#: The acceptance rate of an engine that has seen none, and the outcomes as which it counts.
_FIRST, _FIRST_WEIGHT = 0.6, 8.0
#: An outcome counts by this factor less with each later one of the text, of the engine, and with each plan without it.
_TEXT_DECAY, _ENGINE_DECAY, _IDLE_DECAY = 0.97, 0.998, 0.998
#: A measured cost is half forgotten after so many decodes of the model without one of the draft model.
_FORGOTTEN_AFTER = 1024
#: A further token is assumed to cost this part of the first.
_FURTHER = 0.5
#: Tokens that a text is expected to go on for when it begins; later, as long as it has been.
_FIRST_TOKENS = 16


class DraftRate:
    """How often a token of the draft model was the one that the model chose, in one text or in an engine."""

    __slots__ = ("_outcomes",)

    def __init__(self, prior: DraftRate | None = None) -> None:
        """`prior` is the rate of the engine, which gets each outcome too."""
        if prior is None:
            self._outcomes = HitRates((_FIRST,), _ENGINE_DECAY, weight=_FIRST_WEIGHT)
        else:
            self._outcomes = HitRates((_FIRST,), _TEXT_DECAY, prior._outcomes)

    def record(self, drafted: int, accepted: int) -> None:
        """Record a draft: what follows the first token that was not accepted was not judged."""
        for place in range(min(drafted, accepted + 1)):
            self._outcomes.record(0, place < accepted)

    def rest(self) -> None:
        """Forget a little, because nothing was drafted: a text may change."""
        self._outcomes.forget(_IDLE_DECAY)

    @property
    def value(self) -> float:
        """The probability that the next drafted token is accepted."""
        return self._outcomes.rate(0)


class DraftCosts:
    """The seconds of the decodes of a draft model, by the number of tokens in them."""

    def __init__(self, ratio: float) -> None:
        """`ratio` is the size of its weights to that of the model's."""
        self.ratio = ratio
        self._measured = DecodeCosts()
        self._unused = 0
        #: Seconds of a prompt token; 0 while it was not measured.
        self.prompt_token = 0.0

    def record(self, tokens: int, seconds: float) -> float:
        """
        Record a decode, by its seconds at the usual pace of the model's decodes.

        Returns the usual seconds if they are fewer: a single decode may have waited for a core.
        """
        self._measured.record(tokens, seconds, has_drafts=True)  # a pace of its own would hide lasting changes
        self._unused = 0
        return min(seconds, self._measured.latest(tokens))

    def rest(self) -> None:
        """Count a decode of the model without one of the draft model."""
        self._unused += 1

    def seconds(self, texts: int, tokens: int, base: float) -> float:
        """Return the seconds of a decode of `tokens` of `texts`; `base` are those of the model without drafts."""
        assumed = self.ratio * base * (1 + _FURTHER * (tokens - texts) / texts)
        if self._measured.known(texts) is None:
            return assumed
        cost = self._measured.latest(texts)
        if tokens > texts:
            cost += self._measured.more(texts, tokens - texts)
        return cost + min(0.0, assumed - cost) * self._unused / (self._unused + _FORGOTTEN_AFTER)


@dataclass(frozen=True, slots=True)
class Step:
    """What is known of the next decode of the model."""

    #: The texts in it, of which each gets a token, and its seconds without drafts.
    texts: int
    base: float
    #: Draft tokens that are still possible, and the seconds that so many more tokens add.
    room: int
    more: Callable[[int], float]
    #: Seconds of a prompt token of the model; 0 while it was not measured.
    prompt_token: float = 0.0

    @property
    def value(self) -> float:
        """The seconds that an accepted token saves."""
        return self.base / self.texts


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """The texts, by their place in the given ones, the tokens for each of them, and the expected seconds gained."""

    chosen: tuple[int, ...] = ()
    depth: int = 0
    gain: float = 0.0


def plan_model_drafts(rates: Sequence[float], missing: int, most: int, step: Step, costs: DraftCosts) -> DraftPlan:
    """
    Return the plan with the largest expected gain: the texts of the best rates, with the same number of tokens each.

    `rates` are the probabilities that a token is accepted, `missing` the tokens of all texts that the draft model has
    to compute before its first prediction.
    """
    order = sorted(range(len(rates)), key=lambda place: -rates[place])
    best = DraftPlan()
    for count in range(1, min(len(order), step.room) + 1):
        chosen = order[:count]
        again = costs.seconds(count, count, step.base)
        first = costs.seconds(count, max(count, round(missing * count / len(order))), step.base)
        reaches, expected = [1.0] * count, 0.0
        for depth in range(1, min(most, step.room // count) + 1):
            reaches = [reach * rates[place] for reach, place in zip(reaches, chosen, strict=True)]
            expected += sum(reaches)
            cost = first + (depth - 1) * again + step.more(count * depth)
            gain = expected * step.value - cost
            if expected * step.value > cost * MARGIN and gain > best.gain:
                best = DraftPlan(tuple(chosen), depth, gain)
    return best


def is_worth_computing(missing: int, written: int, left: int, gain: float, step: Step, prompt_token: float) -> bool:
    """
    Return whether a text will probably gain more than it costs to compute its `missing` tokens by the draft model.

    A text is expected to go on for as long as it has been, at most for the `left` tokens. `gain` are the expected
    seconds that a step with drafts gains for it.
    """
    expected = min(left, written + _FIRST_TOKENS)
    steps = expected * step.value / (step.value + gain) if gain > 0 else 0.0
    return steps * gain > missing * prompt_token * MARGIN
