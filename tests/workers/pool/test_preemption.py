"""Steps of the class `batch` are requeued for more urgent ones, and for nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from uuid import UUID

import pytest
import redis

from app.kernel.broker import PRIORITIES, CeleryPublisher, model_queue
from app.workflows.language import check
from app.workflows.runs import views
from app.workflows.runs.claims import Claim
from app.workflows.runs.messages import RUN_STEP
from app.workflows.runs.service import Runs
from app.workflows.runs.submission import Submission
from workers import steps
from workers.leases import Leases, StopReason
from workers.pool.preemption import Preemption

OWNER = "pool@here/1/x"
QUEUE = model_queue("other")
ONE_STEP = "workflow: w\nsteps: [{id: a, kind: generate, model: 'm:1', prompt: x}]"


@pytest.fixture
def leases(runs: Runs) -> Iterator[Leases]:
    made = Leases(runs, OWNER, interval=timedelta(seconds=60))
    made.start()
    yield made
    made.close()


@pytest.fixture
def preemption(leases: Leases, redis_url: str, valkey: redis.Redis) -> Iterator[Preemption]:
    made = Preemption(leases, redis_url, QUEUE)
    yield made
    made.close()


def claimed(runs: Runs, priority: str) -> Claim:
    run_id = runs.submit(Submission(check.parse(ONE_STEP), {}, priority=priority)).id
    taken = runs.claim(views.run(runs.database, run_id).steps[0].id, 1, OWNER)
    assert taken is not None
    return taken


def test_the_steps_begun_last_are_requeued_for_urgent_ones_that_wait(
    runs: Runs, leases: Leases, preemption: Preemption, publisher: CeleryPublisher
) -> None:
    classes = ("batch", "standard", "batch", "interactive", "batch")
    claims = [claimed(runs, priority) for priority in classes]
    with ExitStack() as stack:
        first, standard, second, interactive, third = [stack.enter_context(leases.hold(claim)) for claim in claims]
        publisher.publish(RUN_STEP, [str(UUID(int=1)), 1], queue=QUEUE, priority=PRIORITIES["batch"] + 1)
        assert preemption.look(preemption.look(0)) == 0, "batch waits for batch"

        for priority in ("standard", "interactive"):
            publisher.publish(RUN_STEP, [str(UUID(int=1)), 1], queue=QUEUE, priority=PRIORITIES[priority])
        waiting = preemption.look(0)
        assert waiting == 2
        holdings = (first, standard, second, interactive, third)
        assert {holding.reason for holding in holdings} == {None}, "they may be taken at once"
        assert preemption.look(waiting) == 2
        assert [holding.reason for holding in holdings] == [
            None, None, StopReason.PREEMPTED, None, StopReason.PREEMPTED,
        ]  # fmt: skip
        preemption.look(waiting)
        assert first.reason is None, "those that are stopping count"


def test_nothing_is_asked_of_the_broker_without_a_batch(
    runs: Runs, leases: Leases, preemption: Preemption, publisher: CeleryPublisher
) -> None:
    publisher.publish(RUN_STEP, [str(UUID(int=1)), 1], queue=QUEUE, priority=0)
    with leases.hold(claimed(runs, "standard")) as holding:
        assert preemption.look(5) == 0
        assert holding.reason is None


def test_a_preempted_step_is_ready_again_and_nothing_counts_against_it(runs: Runs) -> None:
    claim = claimed(runs, "batch")
    assert runs.fail(claim, OWNER, steps.PREEMPTED) == "ready"
    step = views.run(runs.database, claim.run_id).steps[0]
    assert (step.failures, step.losses, step.attempt) == (0, 0, 2)
