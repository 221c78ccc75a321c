"""
The ranking of models for a selector: which suit, how each scores, and why.

A score is the weighted sum of three figures from 0 to 1: quality, speed, and readiness, which falls with the expected
wait and with the bytes that other pools would have to free. The preference of the selector sets the weights. Of models
with the same score the first in the catalogue wins. The same values give the same ranking.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from app.catalog.model import Model
from app.catalog.serving.selector import Preference, Selector
from app.inference.routing.availability import Availability, FleetAvailability, ModelState, expected_wait

#: Weights of quality, speed and readiness.
_WEIGHTS: Mapping[Preference, tuple[float, float, float]] = {
    Preference.BALANCED: (0.4, 0.25, 0.35),
    Preference.SPEED: (0.0, 0.75, 0.25),
    Preference.QUALITY: (0.8, 0.1, 0.1),
    Preference.RESIDENT: (0.15, 0.15, 0.7),
}
#: The expected wait, in seconds, that halves the readiness; and the most that freeing bytes takes from it.
_HALF_WAIT, _FREEING = 5.0, 0.3
#: Sizes of files, in bytes, whose quality counts as 0 and as 1 where the entry has no rating.
_SMALLEST, _LARGEST = 50e6, 100e9
#: Quality and speed where neither the entry nor a size says more.
_UNKNOWN = 0.5
#: Tokens a second that count as speed 0 and 1.
_SLOWEST, _FASTEST = 1.0, 1000.0
#: Bytes of weights that are read in a second, while nothing was measured.
_BANDWIDTH = 10e9


@dataclass(frozen=True, slots=True)
class RankedModel:
    """A model that suits, with its figures from 0 to 1."""

    model: Model
    score: float
    quality: float
    speed: float
    readiness: float
    state: ModelState
    #: Seconds until a request gets a slot.
    wait: float
    #: Bytes that other pools would have to free.
    to_free: int
    shares_file: bool

    @property
    def reason(self) -> str:
        """A sentence that explains the score."""
        parts = [f"score {self.score:.2f}: quality {self.quality:.2f}, speed {self.speed:.2f}"]
        parts.append(f"{self.state}, expected wait {self.wait:.1f} s")
        if self.to_free:
            parts.append(f"{self.to_free / 2**20:,.0f} MiB to be freed")
        if self.shares_file:
            parts.append("its file is loaded already")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Ranking:
    """The models that suit, the best first, and why the others do not."""

    ranked: Sequence[RankedModel]
    excluded: Mapping[str, str]


def rank(selector: Selector, models: Iterable[Model], fleet: FleetAvailability, context: int = 0) -> Ranking:
    """Rank models for a selector. `context` are the tokens that the request needs in addition to its conditions."""
    found: list[RankedModel] = []
    excluded: dict[str, str] = {}
    models = tuple(models)
    bandwidth = _bandwidth(models, fleet)
    for model in models:
        of = fleet.of(model.name)
        wait = expected_wait(of)
        reason = selector.suitable(model, context)
        if reason is None and wait is None:
            reason = f"unavailable: {of.problem}"
        if reason is not None or wait is None:
            excluded[model.name] = reason or ""
            continue
        found.append(_scored(selector, model, of, wait, bandwidth))
    return Ranking(sorted(found, key=lambda one: -round(one.score, 6)), excluded)


def _scored(selector: Selector, model: Model, of: Availability, wait: float, bandwidth: float) -> RankedModel:
    quality, speed = quality_of(model, of), speed_of(model, of, bandwidth)
    freeing = _FREEING * min(of.to_free / of.bytes, 1.0) if of.bytes else 0.0
    readiness = max(_HALF_WAIT / (_HALF_WAIT + wait) - freeing, 0.0)
    weights = _WEIGHTS[selector.prefer]
    score = sum(weight * figure for weight, figure in zip(weights, (quality, speed, readiness), strict=True))
    return RankedModel(model, score, quality, speed, readiness, of.state, wait, of.to_free, of.shares_file)


def quality_of(model: Model, of: Availability) -> float:
    """Return the quality: the rating of the entry, or else from the size of the file."""
    if model.rating.quality is not None:
        return float(model.rating.quality)
    return _between(_size(model, of), _SMALLEST, _LARGEST) if _size(model, of) else _UNKNOWN


def _bandwidth(models: Iterable[Model], fleet: FleetAvailability) -> float:
    """Return the bytes of weights that are read in a second: each token reads all. The best that was measured."""
    paces = ((fleet.of(model.name).pace or 0.0) * _size(model, fleet.of(model.name)) for model in models)
    return max(paces, default=0.0) or _BANDWIDTH


def speed_of(model: Model, of: Availability, bandwidth: float) -> float:
    """Return the speed: the rating of the entry, the measured tokens a second, or those that the size lets expect."""
    if model.rating.speed is not None:
        return float(model.rating.speed)
    if of.pace is not None:
        return _between(of.pace, _SLOWEST, _FASTEST)
    return _between(bandwidth / _size(model, of), _SLOWEST, _FASTEST) if _size(model, of) else _UNKNOWN


def _size(model: Model, of: Availability) -> int:
    return 0 if model.remote is not None else sum(model.source.size) or of.bytes


def _between(value: float, low: float, high: float) -> float:
    """Return the place of a value between two others, on a logarithmic scale."""
    return min(max(math.log(max(value, 1e-9) / low) / math.log(high / low), 0.0), 1.0)
