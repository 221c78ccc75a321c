"""A short tempest; `python -m tests.faults.tempest` makes longer ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import assert_nothing_left, shown
from tests.faults.hostile import ATTACKS
from tests.faults.tempest import Plan, Tempest


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    assert_nothing_left(tmp_path)


def test_a_whole_installation_outlives_kills_and_freezes(directory: Path) -> None:
    """Each part of an installation is killed or frozen while it works; all runs end, each step recorded once."""
    plan = Plan(kills=8, seed=278, large=(16,), items=200, hostile=tuple(ATTACKS), freezes=(1.0, 6.0), patience=120)
    seen = Tempest(directory, plan).run()
    shown("tempest", seen.shown())
    assert sum(seen.work.values()) > 10
    assert seen.answered["/healthz"], "it was asked meanwhile"
