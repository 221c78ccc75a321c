"""The overlap policy: fires that become due while an earlier run is active."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from app.workflows.schedules.overlap import MAX_WAITING, ActiveFire, decide_overlap
from app.workflows.schedules.schedule import Overlap

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
ACTIVE = (ActiveFire(NOON - timedelta(hours=1), "r1"),)


def instants(count: int) -> list[datetime]:
    return [NOON + timedelta(minutes=n) for n in range(count)]


@given(st.sampled_from(Overlap), st.integers(0, 250), st.booleans())
def test_at_most_one_run_is_active_unless_allowed(overlap: Overlap, count: int, busy: bool) -> None:
    decision = decide_overlap(overlap, instants(count), ACTIVE if busy else ())
    skipped = [place for place, _ in decision.skip]

    assert overlap is Overlap.ALLOW or len(decision.start) + busy <= 1
    assert len(set(decision.start) | set(skipped)) == len(decision.start) + len(skipped), "no fire is decided twice"
    assert decision.start or busy or not count, "a fire starts when no run is active"
    assert count - len(decision.start) - len(skipped) <= {Overlap.QUEUE: MAX_WAITING, Overlap.CANCEL_RUNNING: 1}.get(
        overlap, 0
    )
    assert decision.cancel == (overlap is Overlap.CANCEL_RUNNING and busy and count > 0)


def test_the_earliest_fire_starts_except_with_cancel_running() -> None:
    assert decide_overlap(Overlap.SKIP, instants(3), ()).start == (0,)
    assert decide_overlap(Overlap.QUEUE, instants(3), ()).start == (0,)
    assert decide_overlap(Overlap.CANCEL_RUNNING, instants(3), ()).start == (2,)


def test_skipped_fires_have_a_reason() -> None:
    assert decide_overlap(Overlap.SKIP, instants(1), ACTIVE).skip == (
        (0, "run r1 of 2026-01-01 11:00:00Z is still active"),
    )
    assert "has just started" in decide_overlap(Overlap.SKIP, instants(2), ()).skip[0][1]
    assert "became due before it could start" in decide_overlap(Overlap.CANCEL_RUNNING, instants(2), ACTIVE).skip[0][1]
    full = decide_overlap(Overlap.QUEUE, instants(MAX_WAITING + 1), ACTIVE)
    assert full.skip == ((MAX_WAITING, "100 earlier fires are already waiting"),)
