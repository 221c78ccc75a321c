"""The circuit breaker: a silent server is asked by one caller at a time, a slow one by all."""

from __future__ import annotations

from datetime import timedelta

from app.kernel.postgres.breaker import Breaker


def test_a_silent_server_is_asked_by_one_caller_each_pause() -> None:
    breaker = Breaker(timedelta(hours=1))
    assert breaker.admits()

    breaker.timed_out(5)

    assert not breaker.admits(), "it was silent just now"
    eager = Breaker(timedelta(0))
    eager.timed_out(5)
    assert eager.admits()
    eager.timed_out(5)
    assert eager.admits(), "the probe failed, and another may follow"
    eager.answered()
    assert eager.admits()


def test_an_answer_closes_it_at_once() -> None:
    breaker = Breaker(timedelta(hours=1))
    breaker.timed_out(5)

    breaker.answered()

    assert [breaker.admits() for _ in range(3)] == [True] * 3


def test_a_server_that_answered_others_meanwhile_is_slow_not_silent() -> None:
    breaker = Breaker(timedelta(hours=1))
    breaker.answered()

    breaker.timed_out(5)

    assert breaker.admits()
