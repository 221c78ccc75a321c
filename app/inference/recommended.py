"""Recommended sampling: replaces the parameters that a request did not set. A value of the request is never changed."""

from __future__ import annotations

from dataclasses import replace

from app.catalog.profiles.family import RecommendedSampling
from app.inference.requests import Sampling

#: The parameters that can be recommended.
RECOMMENDABLE = frozenset(RecommendedSampling.model_fields)


def applied(sampling: Sampling, recommended: RecommendedSampling) -> Sampling:
    """
    Return the sampling with recommended values for its unset parameters.

    A request that sets the temperature to 0 asks for the likeliest text, and gets no recommended penalty either.
    """
    if not sampling.unset or ("temperature" not in sampling.unset and sampling.temperature <= 0):
        return sampling
    found = {name: value for name, value in recommended.shown().items() if name in sampling.unset}
    return replace(sampling, **found) if found else sampling
