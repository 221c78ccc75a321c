"""
Drafting: how many predicted tokens of each text are computed in the next decode. Pure functions and values.

A draft token is worth what a token costs without drafts: the seconds of a decode divided by its texts. Draft tokens are
computed if that, times the probabilities that they are accepted, is more than they add to the decode by the measured
costs. So drafts stop by themselves where texts are not predictable, and where many texts use the machine fully.
The seconds that drafts lost are bounded: when they are more than `MAX_LOSS` of the recent time, drafts pause.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

#: Numbers of tokens in a decode that are tried; few, so that the cost of each gets known.
SIZES = (2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 144)
#: Expected gains must be so many times the expected costs.
MARGIN = 1.25
#: The part of the recent time that drafts may lose, the lost decodes that are forgiven, and how fast time is forgotten.
MAX_LOSS, _FORGIVEN, _DECAY = 0.01, 4.0, 0.999


def can_gain(tokens: int, value: float, more: Callable[[int], float], room: int) -> bool:
    """Return whether some number of draft tokens would gain if all were accepted; arguments as for `plan_drafts`."""
    sizes = {room, *(size - tokens for size in SIZES if 0 < size - tokens < room)}
    return any(added * value > more(added) * MARGIN for added in sizes)


def plan_drafts(
    reaches: Sequence[Sequence[float]], tokens: int, value: float, more: Callable[[int], float], room: int
) -> list[int]:
    """
    Return the number of draft tokens of each text.

    `reaches` has for each text the probability that its first, its first two, … draft tokens are accepted. `tokens` is
    the number of tokens in the decode without drafts, `value` the seconds that an accepted one saves, `more(added)` the
    seconds that more tokens add. At most `room` are added.
    """
    ranked = sorted(((p, text) for text, reach in enumerate(reaches) for p in reach), reverse=True)[:room]
    best, gain, expected = 0, 0.0, 0.0
    for added, (probability, _) in enumerate(ranked, 1):
        expected += probability
        if tokens + added not in SIZES and added < len(ranked):
            continue
        cost = more(added)
        if expected * value > cost * MARGIN and expected * value - cost > gain:
            best, gain = added, expected * value - cost
    counts = [0] * len(reaches)
    for _, text in ranked[:best]:
        counts[text] += 1
    return counts


class Balance:
    """The seconds that drafts won and lost."""

    def __init__(self) -> None:
        self._gained = self._time = 0.0

    def decoded(self, seconds: float) -> None:
        """Count the time of a decode."""
        self._time = self._time * _DECAY + seconds
        self._gained *= _DECAY

    def drafted(self, accepted: int, value: float, cost: float) -> None:
        """Count a decode with drafts: the accepted tokens, what each was worth, and the seconds that drafts added."""
        # A text that gains does not pay for one that loses.
        self._gained = min(self._gained + accepted * value - cost, MAX_LOSS * self._time)

    def may_draft(self, decode: float) -> bool:
        """Whether the losses are within their bound; `decode` are the seconds of a decode."""
        return self._gained > -MAX_LOSS * self._time - _FORGIVEN * decode
