"""The loop guard: a loop continues after a failure, which is logged once; errors for all items are raised."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from app.kernel.errors import DatabaseUnreachable
from app.kernel.loop_guard import LoopGuard


def test_a_failed_item_does_not_stop_the_others() -> None:
    guard, done = LoopGuard(), []
    with capture_logs() as logs:
        for _ in range(3):
            for divisor in (1, 0, 2):
                with guard.item("number", str(divisor)) as failed:
                    done.append(1 / divisor)
                assert bool(failed) is (divisor == 0)
    assert done == [1, 0.5] * 3
    assert [(entry["event"], entry["id"]) for entry in logs] == [("loop_item_failed", "0")]


def test_another_failure_of_the_same_item_is_logged_too() -> None:
    guard = LoopGuard()
    with capture_logs() as logs:
        for error in (ValueError("a"), ValueError("b"), None, ValueError("b")):
            with guard.item("row", "1"):
                if error is not None:
                    raise error
    assert len(logs) == 3


def test_an_error_for_all_items_is_raised() -> None:
    guard = LoopGuard(DatabaseUnreachable)
    with pytest.raises(DatabaseUnreachable), guard.item("row", "1"):
        raise DatabaseUnreachable("gone")


def test_the_number_of_remembered_failures_is_bounded() -> None:
    guard = LoopGuard()
    with capture_logs():
        for number in range(3_000):
            with guard.item("row", str(number)):
                raise ValueError(number)
    assert len(guard._logged) <= 1_000
