"""
The ranking of what was found by words and by meaning.

Both scores are brought to 0…1 and added: that ranks better than reciprocal ranks, which lose to the better of the two
when the other one is weak. Passages beside a good one gain from it: an answer stands beside its question. With a
half-life, older passages lose.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

#: Weight of the score by meaning, and of the better neighbour.
DENSE_WEIGHT, NEIGHBOUR_WEIGHT = 1.0, 0.2
#: Weight of the names in the best passages, which lead from one fact to the next.
BRIDGE_WEIGHT = 0.8


@dataclass(frozen=True, slots=True)
class RankedPassage:
    """A passage with its rank's score, the part of it that its neighbours gave, and the factor of its age."""

    id: int
    score: float
    neighbours: float
    decay: float


def combined(
    lexical: Mapping[int, float], dense: Sequence[Mapping[int, float]], dense_weight: float = DENSE_WEIGHT
) -> dict[int, float]:
    """
    Return the sum of both scores by passage.

    `dense` has the cosines of each embedding model, the preferred one first: those of different models cannot be
    compared, so each is scaled by itself, and a passage has that of the first model that has one.
    """
    top = max(lexical.values(), default=0.0)
    found = {id_: score / top for id_, score in lexical.items()} if top > 0 else {}
    meanings: dict[int, float] = {}
    for cosines in dense:
        for id_, value in _scaled(cosines).items():
            meanings.setdefault(id_, value)
    for id_, value in meanings.items():
        found[id_] = found.get(id_, 0.0) + dense_weight * value
    return found


def bridged(
    scores: Mapping[int, float], by_names: Mapping[int, float], weight: float = BRIDGE_WEIGHT
) -> dict[int, float]:
    """
    Return scores to which those by names in the best passages are added.

    They count for less the more a passage has by itself, and lift none above the best one: in a talk that comes back to
    the same names, the passage that answers is not lost among those that share names with it.
    """
    top, best = max(by_names.values(), default=0.0), max(scores.values(), default=0.0)
    if top <= 0 or best <= 0:
        return dict(scores)
    return {id_: score + weight * by_names.get(id_, 0.0) / top * (1 - score / best) for id_, score in scores.items()}


def ranked(
    scores: Mapping[int, float],
    neighbours: Iterable[tuple[int, int]],
    times: Mapping[int, datetime],
    now: datetime,
    half_life: timedelta | None,
    weight: float = NEIGHBOUR_WEIGHT,
) -> list[RankedPassage]:
    """Return passages, the best first. `neighbours` has pairs of passages that are beside each other."""
    lent: dict[int, float] = {}
    for one, other in neighbours:
        lent[one] = max(lent.get(one, 0.0), weight * scores.get(other, 0.0))
        lent[other] = max(lent.get(other, 0.0), weight * scores.get(one, 0.0))
    found = []
    for id_ in {**scores, **lent}:
        decay = 1.0
        if half_life is not None and id_ in times:
            age = max(timedelta(0), now - times[id_])
            decay = 0.5 ** min(age / half_life, 1_000.0)
        gain = lent.get(id_, 0.0)
        found.append(RankedPassage(id_, (scores.get(id_, 0.0) + gain) * decay, gain, decay))
    return sorted(found, key=lambda one: (-one.score, -one.id))


def _scaled(cosines: Mapping[int, float]) -> dict[int, float]:
    low, high = min(cosines.values(), default=0.0), max(cosines.values(), default=0.0)
    if high <= low:
        return dict.fromkeys(cosines, 1.0)
    return {id_: (value - low) / (high - low) for id_, value in cosines.items()}
