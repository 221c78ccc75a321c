"""What follows from a probe: a slow pool is told from a hung one."""

from __future__ import annotations

from datetime import timedelta

import pytest

from app.governance.probes.probe import PoolProgress, ProbeAnswer, ProbeOutcome, is_restarted, judge

TIMEOUT = timedelta(seconds=10)


def progress(*, busy: bool, stalled: float = 0) -> PoolProgress:
    return PoolProgress(busy, timedelta(seconds=stalled))


@pytest.mark.parametrize(
    ("answer", "reported", "outcome"),
    [
        (ProbeAnswer(0.2), progress(busy=False), ProbeOutcome.OK),
        (ProbeAnswer(0.2, "CUDA error"), progress(busy=False), ProbeOutcome.FAILED),
        (None, progress(busy=False), ProbeOutcome.HUNG),
        (None, progress(busy=True), ProbeOutcome.SLOW),
        (None, progress(busy=True, stalled=40), ProbeOutcome.SLOW),
        (None, progress(busy=True, stalled=130), ProbeOutcome.HUNG),
    ],
)
def test_a_hung_pool_is_told_from_a_slow_one(
    answer: ProbeAnswer | None, reported: PoolProgress, outcome: ProbeOutcome
) -> None:
    found = judge(answer, reported, TIMEOUT, timedelta(minutes=2))
    assert found.outcome is outcome
    assert bool(found.detail) is (outcome is not ProbeOutcome.OK)


def test_a_pool_is_restarted_after_failures_in_a_row_but_not_for_ever() -> None:
    assert [is_restarted(failures, 2, 0, 3) for failures in (0, 1, 2, 3)] == [False, False, True, True]
    assert [is_restarted(2, 2, restarts, 3) for restarts in (0, 2, 3, 9)] == [True, True, False, False]
    assert not is_restarted(9, 0, 0, 3), "0: never"
