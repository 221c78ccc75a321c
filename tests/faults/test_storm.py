"""A short storm; `python -m tests.faults.storm --hours 8` is the long one. The fit of growth, at values."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.conftest import assert_nothing_left, show_section
from tests.faults.storm.measure import Sample, fit
from tests.faults.storm.storm import StormPlan, run

MIB = 2**20


@pytest.mark.storm
def test_an_installation_survives_a_storm(tmp_path: Path) -> None:
    """Faults of every kind once, under mixed work: nothing is lost, doubled or stuck, and nothing grows."""
    report = run(tmp_path / "site", StormPlan(seconds=600, faults=29, seed=7, calm=60))
    show_section("storm", report.text())
    assert report.problems == []
    assert report.faults == 29
    assert_nothing_left(tmp_path)


def samples(per_hour: float, base: int, seconds: int = 600) -> list[Sample]:
    noise = (0, 3, -2, 1, -1)
    return [
        Sample(age, int(base + per_hour * age / 3600 + noise[age % 5] * MIB / 8), 20 + noise[age % 5])
        for age in range(0, seconds, 2)
    ]


def test_the_growth_of_a_leaking_process_is_found_over_restarts() -> None:
    """Each process begins anew; the growth within them counts, and not that one is larger than another."""
    leaking = fit({1: samples(400 * MIB, 100 * MIB), 2: samples(400 * MIB, 180 * MIB)})
    assert leaking is not None
    assert leaking.bytes_per_hour == pytest.approx(400 * MIB, rel=0.05)
    assert leaking.problems("control") != []


def test_a_process_that_only_varies_does_not_grow() -> None:
    steady = fit({1: samples(0, 100 * MIB), 2: samples(0, 250 * MIB)})
    assert steady is not None
    assert steady.problems("control") == []
    assert fit({1: samples(0, 100 * MIB, seconds=40)}) is None, "it was not seen for long enough"
