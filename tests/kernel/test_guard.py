"""A guard lets a loop go on, says what broke once, and keeps nothing from its caller that concerns all."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from app.kernel.errors import DatabaseUnreachable
from app.kernel.guard import LoopGuard


def test_one_that_breaks_does_not_stop_the_others() -> None:
    guard, done = LoopGuard(), []
    with capture_logs() as logs:
        for _ in range(3):
            for divisor in (1, 0, 2):
                with guard.one("number", str(divisor)) as failed:
                    done.append(1 / divisor)
                assert bool(failed) is (divisor == 0)
    assert done == [1, 0.5] * 3
    assert [(entry["event"], entry["id"]) for entry in logs] == [("one_of_many_broke", "0")]


def test_another_defect_of_the_same_member_is_logged_too() -> None:
    guard = LoopGuard()
    with capture_logs() as logs:
        for error in (ValueError("a"), ValueError("b"), None, ValueError("b")):
            with guard.one("row", "1"):
                if error is not None:
                    raise error
    assert len(logs) == 3


def test_what_concerns_all_is_raised() -> None:
    guard = LoopGuard(DatabaseUnreachable)
    with pytest.raises(DatabaseUnreachable), guard.one("row", "1"):
        raise DatabaseUnreachable("gone")


def test_what_is_remembered_is_bounded() -> None:
    guard = LoopGuard()
    with capture_logs():
        for number in range(3_000):
            with guard.one("row", str(number)):
                raise ValueError(number)
    assert len(guard._logged) <= 1_000
