"""What outcomes say of a difference, however often one looks. The seeds are fixed, so the counts are."""

from __future__ import annotations

import math
import random

import pytest

from app.inference.splits import evidence
from app.inference.splits.evidence import LEAST_UNITS, SplitVerdict, VariantSample

SEEDS = 200


def rate(count: int, events: int) -> VariantSample:
    return VariantSample(count, count, events, events, count, events, is_rate=True)


def verdict_of(seed: int, control: float, candidate: float, most: int, effect: float) -> SplitVerdict:
    """The first verdict on two rates, with a look after every 50 outcomes."""
    chance = random.Random(seed)
    counts = {True: [0, 0], False: [0, 0]}
    for at in range(1, most + 1):
        is_candidate = chance.random() < 0.5
        counts[is_candidate][0] += 1
        counts[is_candidate][1] += chance.random() < (candidate if is_candidate else control)
        if at % 50 == 0:
            found = evidence.compare(rate(*counts[False]), rate(*counts[True]), effect, 0.05)
            verdict = found.verdict(effect, higher_is_better=True)
            if verdict is not SplitVerdict.UNDECIDED:
                return verdict
    return SplitVerdict.UNDECIDED


@pytest.mark.parametrize(
    ("control", "candidate", "expected"),
    [(0.7, 0.8, SplitVerdict.BETTER), (0.7, 0.6, SplitVerdict.WORSE), (0.7, 0.7, SplitVerdict.EQUAL)],
)
def test_decisions_are_right(control: float, candidate: float, expected: SplitVerdict) -> None:
    found = [verdict_of(seed, control, candidate, 6_000, 0.1) for seed in range(SEEDS)]

    assert found.count(expected) >= 0.95 * SEEDS


@pytest.mark.parametrize(("base", "effect"), [(0.02, 0.02), (0.3, 0.05), (0.5, 0.02)])
def test_peeking_finds_no_difference_where_there_is_none(base: float, effect: float) -> None:
    found = [verdict_of(seed, base, base, 2_000, effect) for seed in range(SEEDS)]

    assert found.count(SplitVerdict.BETTER) + found.count(SplitVerdict.WORSE) <= 0.05 * SEEDS


def test_users_who_resemble_each_other_are_counted_as_users() -> None:
    """Of 40 users with 100 runs each, two of whom fail always, the runs seem to show what the users do not."""
    control = VariantSample(40, 4_000, 0, 0, 40 * 100**2, 0, is_rate=True)
    candidate = VariantSample(40, 4_000, 200, 2 * 100**2, 40 * 100**2, 2 * 100 * 100, is_rate=True)

    of_users = evidence.compare(control, candidate, 0.05, 0.05)
    of_runs = evidence.compare(rate(4_000, 0), rate(4_000, 200), 0.05, 0.05)

    assert of_users.verdict(0.02, higher_is_better=False) is SplitVerdict.UNDECIDED
    assert of_runs.verdict(0.02, higher_is_better=False) is SplitVerdict.WORSE


def test_few_units_decide_nothing() -> None:
    few = LEAST_UNITS - 1
    found = evidence.compare(rate(few, 0), rate(few, few), 0.5, 0.05)

    assert found.difference == 1.0
    assert found.verdict(0.05, higher_is_better=False) is SplitVerdict.UNDECIDED
    nothing = evidence.compare(VariantSample(), rate(100, 5), 0.05, 0.05)
    assert (nothing.difference, nothing.low) == (None, -math.inf)


def test_values_without_any_spread_are_compared() -> None:
    found = evidence.compare(VariantSample.of_values([1.0] * 50), VariantSample.of_values([2.0] * 50), 0.1, 0.05)

    assert found.verdict(0.1, higher_is_better=True) is SplitVerdict.BETTER


def test_the_number_of_units_is_told_beforehand() -> None:
    needed = evidence.units_needed(0.5, 0.05, 0.05, 0.8)
    assert needed is not None

    found = [verdict_of(seed, 0.5, 0.55, needed, 0.05) for seed in range(SEEDS)]

    assert found.count(SplitVerdict.BETTER) >= 0.8 * SEEDS
    smaller = evidence.units_needed(0.5, 0.05, 0.05, 0.8, share=0.01)
    assert smaller is not None
    assert smaller > 10 * needed
    assert evidence.units_needed(100.0, 0.0005, 0.05, 0.8) is None


def test_looks_narrow_the_interval() -> None:
    widths = [evidence.half_width(0.25 / count, 0.05, 0.05) for count in (10, 100, 1_000, 10_000)]

    assert widths == sorted(widths, reverse=True)
    assert evidence.half_width(0.0, 0.05, 0.05) == 0.0
