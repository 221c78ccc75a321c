"""A short chaos test of an installation; `python -m tests.faults.installation_chaos` runs longer ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import assert_nothing_left, show_section
from tests.faults.hostile import ATTACKS
from tests.faults.installation_chaos import ChaosPlan, InstallationChaos


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    assert_nothing_left(tmp_path)


@pytest.mark.storm
def test_an_installation_survives_kills_and_freezes(directory: Path) -> None:
    """Each part of an installation is killed or frozen during work; all runs end, and each step is recorded once."""
    plan = ChaosPlan(
        kills=6, seed=278, large=(16,), items=200, hostile=tuple(ATTACKS), freezes=(1.0, 6.0), patience=120
    )
    report = InstallationChaos(directory, plan).run()
    show_section("chaos", report.summary())
    assert sum(report.work.values()) > 10
    assert report.answered["/healthz"], "the API was called meanwhile"
