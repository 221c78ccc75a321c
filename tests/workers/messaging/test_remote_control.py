"""Commands of Flower to workers: what they do, and that none of them strands work."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from celery.worker import control
from hypothesis import given
from hypothesis import strategies as st

from app.workflows.runs.messages import RUN_STEP
from workers.messaging import remote_control
from workers.messaging.rate import RATE, StepRate


def worker(*queues: str) -> Any:
    consumer = SimpleNamespace(queues=[SimpleNamespace(name=name) for name in queues])
    task = SimpleNamespace(rate_limit=None)
    return SimpleNamespace(
        consumer=SimpleNamespace(task_consumer=consumer), app=SimpleNamespace(tasks={RUN_STEP: task}), hostname="w@h"
    )


@pytest.fixture(autouse=True)
def _unlimited() -> Any:
    yield
    RATE.set(0)


@pytest.mark.parametrize("name", sorted(remote_control.REFUSED))
def test_a_command_that_would_strand_work_is_refused_with_what_to_do(name: str) -> None:
    remote_control.install()

    answer = control.Panel.data[name](worker("model.a"), queue="model.b", n=1, task_id="x")
    assert set(answer) == {"error"}
    assert len(answer["error"]) > 20


def test_the_rate_of_a_pool_is_limited_and_shown() -> None:
    pool = worker("model.a")

    assert "ok" in remote_control.limit_rate(pool, RUN_STEP, "30/m")
    assert (RATE.per_second, pool.app.tasks[RUN_STEP].rate_limit) == (0.5, "30/m")
    assert "ok" in remote_control.limit_rate(pool, RUN_STEP, "0")
    assert (RATE.per_second, RATE.allows(), pool.app.tasks[RUN_STEP].rate_limit) == (0, True, None)


@pytest.mark.parametrize("rate", ["", "x/s", "5/y", "-1/s", "1e300", "nan", "9" * 400])
def test_what_is_no_rate_is_refused(rate: str) -> None:
    answer = remote_control.limit_rate(worker("model.a"), RUN_STEP, rate)

    assert RATE.per_second == 0
    assert "error" in answer or rate == "", "an empty rate is none"


def test_control_workers_and_jobs_have_no_limit() -> None:
    assert "scheduled jobs" in remote_control.limit_rate(worker("control", "io"), RUN_STEP, "1/m")["error"]
    assert "scheduled jobs" in remote_control.limit_rate(worker("model.a"), "workers.jobs.run_sweep", "1/m")["error"]
    assert RATE.allows()


@given(
    st.floats(min_value=0.01, max_value=100),
    st.lists(st.floats(min_value=0.001, max_value=5), min_size=5, max_size=200),
)
def test_no_more_steps_are_taken_than_the_rate_and_one_burst_allow(per_second: float, pauses: list[float]) -> None:
    now = 0.0
    rate = StepRate(lambda: now)
    rate.set(per_second)
    taken = 0
    for pause in pauses:
        now += pause
        while rate.allows():
            rate.take()
            taken += 1
    assert taken <= now * per_second + max(1.0, per_second) + 1e-6
    assert taken >= min(1, int(now * per_second))
