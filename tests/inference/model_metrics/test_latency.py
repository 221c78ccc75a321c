"""Latencies in buckets: exact counts and sums, quantiles close to the truth, and sums of histograms."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.inference.model_metrics.latency import BOUNDS, EXPORTED_BOUNDS, Latencies, of_buckets

SECONDS = st.lists(st.floats(min_value=0.001, max_value=3000), min_size=1, max_size=200)


def of(values: list[float]) -> Latencies:
    found = Latencies()
    for value in values:
        found.add(value)
    return found


@given(SECONDS, st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_a_quantile_is_within_a_bucket_of_the_truth(values: list[float], part: float) -> None:
    truth = sorted(values)[math.ceil(part * len(values)) - 1]
    found = of(values).quantile(part)

    assert found is not None
    assert truth / 1.7 <= found <= truth * 1.7
    assert min(values) <= found <= max(values)


@given(SECONDS, SECONDS)
def test_the_sum_of_two_histograms_is_that_of_all_values(one: list[float], other: list[float]) -> None:
    both, merged = of(one + other), of(one)
    merged.merge(of(other))

    assert (merged.count, merged.least, merged.greatest) == (both.count, both.least, both.greatest)
    assert merged.buckets == both.buckets
    assert merged.total == pytest.approx(both.total)


def test_without_a_value_nothing_is_known() -> None:
    empty = Latencies()

    assert (empty.mean, empty.least, empty.greatest, empty.quantile(0.5)) == (None, None, None, None)


def test_what_prometheus_sees_counts_each_value_up_to_its_bound() -> None:
    values = [0.004, 0.02, 0.02, 1.0, 1.001, 9000.0]
    exported = dict(of(values).exported())

    assert set(EXPORTED_BOUNDS) <= set(BOUNDS)
    assert exported["0.005"] == 1
    assert exported["0.02"] == 3, "a value is in the bucket of a bound that it equals"
    assert exported["1"] == 4
    assert exported["+Inf"] == 6
    assert list(exported.values()) == sorted(exported.values())


def test_buckets_of_another_version_are_left_out() -> None:
    found = of_buckets([1, 2], 3, 6.0, 1.0, 3.0)

    assert (found.count, found.mean, sum(found.buckets)) == (3, 2.0, 0)
