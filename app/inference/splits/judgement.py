"""
Judgement: what the outcomes of a split say of each candidate, and whether it has broken a guard.

Nothing here reads a clock or a database.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from app.inference.splits import evidence
from app.inference.splits.definition import CONTROL, SplitDefinition, SplitMetric
from app.inference.splits.evidence import Comparison, SplitVerdict, VariantSample

#: By variant and metric.
VariantSamples = Mapping[tuple[str, SplitMetric], VariantSample]

#: The probability that a guard ends the split of a candidate that is not worse, however often one looks.
_GUARD_ALPHA = 0.01
#: The effect for which guards look, where it is larger than what they tolerate.
_GUARD_EFFECT = 0.05


@dataclass(frozen=True, slots=True)
class CandidateEvidence:
    """A candidate beside the control in one metric."""

    metric: SplitMetric
    control: VariantSample
    candidate: VariantSample
    comparison: Comparison
    verdict: SplitVerdict


def variants_of(given: SplitDefinition) -> list[str]:
    """Return the names of all variants, the control first."""
    return [CONTROL, *(one.name for one in given.candidates)]


def evidence_of(
    given: SplitDefinition, samples: VariantSamples, candidate: str, metric: SplitMetric
) -> CandidateEvidence:
    """Compare a candidate with the control in a metric, as sure as the goal asks for."""
    control, other = (samples.get((name, metric), _empty(metric)) for name in (CONTROL, candidate))
    effect = _scaled(metric, given.goal.effect)
    found = evidence.compare(control, other, effect, given.goal.alpha / len(given.candidates))
    verdict = found.verdict(effect, higher_is_better=metric.higher_is_better)
    return CandidateEvidence(metric, control, other, found, verdict)


def _scaled(metric: SplitMetric, effect: float) -> float:
    """The effect in the unit of the means: of times, the logarithm of the ratio."""
    return math.log1p(effect) if metric.is_logarithmic else effect


def _empty(metric: SplitMetric) -> VariantSample:
    return VariantSample(is_rate=metric is SplitMetric.ERROR)


def broken_guard(given: SplitDefinition, samples: VariantSamples, candidate: str) -> str | None:
    """
    Return which guard a candidate has broken, or None.

    It has when it is worse than the control for sure, and by more than is tolerated as far as one has seen.
    """
    alpha = _GUARD_ALPHA / (len(given.candidates) * max(len(given.guards.tolerances()), 1))
    for metric, given_tolerance in given.guards.tolerances().items():
        tolerance = math.log(given_tolerance) if metric.is_logarithmic else given_tolerance
        control, other = (samples.get((name, metric), _empty(metric)) for name in (CONTROL, candidate))
        found = evidence.compare(control, other, max(tolerance, _GUARD_EFFECT), alpha)
        verdict = found.verdict(tolerance, higher_is_better=metric.higher_is_better)
        if verdict is SplitVerdict.WORSE and found.difference is not None and abs(found.difference) > tolerance:
            before, after = shown_mean(metric, control), shown_mean(metric, other)
            return f"{candidate}: {metric} is {after}, of the control {before}"
    return None


def shown_mean(metric: SplitMetric, sample: VariantSample) -> str:
    """Return the mean of a sample for people; of times the geometric one."""
    if sample.mean is None:
        return "not known"
    match metric:
        case SplitMetric.ERROR:
            return f"{sample.mean:.2%}"
        case SplitMetric.SCORE:
            return f"{sample.mean:.3f}"
    return f"{math.exp(sample.mean):.3g} s"
