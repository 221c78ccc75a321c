"""Clusters of vectors, by the program that a child process runs."""

from __future__ import annotations

import random
from datetime import timedelta

import pytest

from app.kernel.errors import Unavailable
from workers.memory.consolidation import clusterer

DIMENSIONS = 64


def near(middle: int, chance: random.Random, width: float = 0.08) -> list[float]:
    """A vector near one of the axes."""
    return [chance.gauss(1.0 if at == middle else 0.0, width) for at in range(DIMENSIONS)]


def test_groups_are_clustered_by_themselves_and_what_belongs_to_none_stays_outside() -> None:
    chance = random.Random(1)
    two = [near(index % 2, chance) for index in range(20)]
    scattered = [[chance.gauss(0, 1) for _ in range(DIMENSIONS)] for _ in range(20)]
    one = [near(5, chance) for _ in range(8)]
    groups = [[str(vector) for vector in group] for group in ([*two, *scattered], one, scattered)]

    first, second, third = clusterer.cluster(groups, 4, timedelta(minutes=2))

    found = [{index % 2 for index in members if index < 20} for members in first]
    assert sorted(map(sorted, found)) == [[0], [1]]
    assert all(8 <= len(members) <= 10 and max(members) < 20 for members in first)
    assert [sorted(members) for members in second] == [list(range(8))], "a single cluster is one, too"
    assert third == []


def test_a_process_that_takes_too_long_is_ended_and_the_reason_told() -> None:
    with pytest.raises(Unavailable, match=r"took more than 0\.01 s \(setting consolidation\.cluster_timeout\)"):
        clusterer.cluster([[str([1.0, 0.0])] * 4], 2, timedelta(milliseconds=10))
