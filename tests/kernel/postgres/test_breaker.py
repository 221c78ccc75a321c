"""The circuit breaker: a silent server gets one probe at a time, a slow one all calls."""

from __future__ import annotations

from datetime import timedelta

from app.kernel.postgres.breaker import Breaker


def test_a_silent_server_gets_one_probe_per_interval() -> None:
    breaker = Breaker(timedelta(hours=1))
    assert breaker.admits()

    breaker.timed_out(5)

    assert not breaker.admits(), "it has just timed out"
    impatient = Breaker(timedelta(0))
    impatient.timed_out(5)
    assert impatient.admits()
    impatient.timed_out(5)
    assert impatient.admits(), "the probe failed; the next one is due"
    impatient.answered()
    assert impatient.admits()


def test_an_answer_closes_the_breaker_at_once() -> None:
    breaker = Breaker(timedelta(hours=1))
    breaker.timed_out(5)

    breaker.answered()

    assert [breaker.admits() for _ in range(3)] == [True] * 3


def test_a_server_that_answered_another_caller_is_slow_not_silent() -> None:
    breaker = Breaker(timedelta(hours=1))
    breaker.answered()

    breaker.timed_out(5)

    assert breaker.admits()
