"""Fires that meet an earlier run."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from app.workflows.schedules.overlap import MOST_WAITING, Going, settle
from app.workflows.schedules.schedule import Overlap

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
GOING = (Going(NOON - timedelta(hours=1), "r1"),)


def instants(count: int) -> list[datetime]:
    return [NOON + timedelta(minutes=n) for n in range(count)]


@given(st.sampled_from(Overlap), st.integers(0, 250), st.booleans())
def test_at_most_one_run_goes_on_unless_it_is_allowed(overlap: Overlap, count: int, busy: bool) -> None:
    settled = settle(overlap, instants(count), GOING if busy else ())
    skipped = [place for place, _ in settled.skip]

    assert overlap is Overlap.ALLOW or len(settled.begin) + busy <= 1
    assert len(set(settled.begin) | set(skipped)) == len(settled.begin) + len(skipped), "none is decided twice"
    assert settled.begin or busy or not count, "somebody begins when nobody goes on"
    assert count - len(settled.begin) - len(skipped) <= {Overlap.QUEUE: MOST_WAITING, Overlap.CANCEL_RUNNING: 1}.get(
        overlap, 0
    )
    assert settled.cancel == (overlap is Overlap.CANCEL_RUNNING and busy and count > 0)


def test_the_earliest_begins_and_the_newest_cancels() -> None:
    assert settle(Overlap.SKIP, instants(3), ()).begin == (0,)
    assert settle(Overlap.QUEUE, instants(3), ()).begin == (0,)
    assert settle(Overlap.CANCEL_RUNNING, instants(3), ()).begin == (2,)


def test_what_is_skipped_says_why() -> None:
    assert settle(Overlap.SKIP, instants(1), GOING).skip == ((0, "run r1 of 2026-01-01 11:00:00Z still goes on"),)
    assert "has just begun" in settle(Overlap.SKIP, instants(2), ()).skip[0][1]
    assert "came before it could begin" in settle(Overlap.CANCEL_RUNNING, instants(2), GOING).skip[0][1]
    full = settle(Overlap.QUEUE, instants(MOST_WAITING + 1), GOING)
    assert full.skip == ((MOST_WAITING, "100 earlier fires wait already"),)
