"""The sweep among bad rows, locked rows, and other sweeps."""

from __future__ import annotations

import base64
import json
import threading
import time
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
import redis
from sqlalchemy import text

from app.kernel.broker import CeleryPublisher
from app.kernel.database import Database
from app.workflows.runs import control
from app.workflows.runs.changes import change as changes
from app.workflows.runs.changes import decisions
from app.workflows.runs.recovery import expiry, overdue
from app.workflows.runs.recovery.overdue import SweepCursor
from app.workflows.runs.recovery.sweep import sweep
from app.workflows.runs.service import Runs
from app.workflows.state_machine.states import RunState
from tests.workflows.conftest import StepWorker
from tests.workflows.language.test_language import flow
from tests.workflows.language.test_language import store as keep
from tests.workflows.runs.test_service import CHAIN, QUEUE, age_messages, let_lease_end, step, submit

#: Far above what a sweep takes, far below what waiting for a lock takes.
SOON = 15.0
WAIT = "\n  - {id: pause, kind: wait, for: 1h}"


def asleep(worker: StepWorker, source: str, **inputs: Any) -> UUID:
    """A run whose wait has begun."""
    run_id = worker.submit(source, **inputs)
    worker.work(run_id)
    return run_id


def test_a_condition_that_overflows_fails_its_step_and_the_sweep_continues(worker: StepWorker) -> None:
    source = flow(
        f"{WAIT}\n  - {{id: after, kind: noop, needs: [pause], when: 'double(inputs.x) > 1.0'}}",
        head="inputs: {x: {type: number}}",
    )
    bad = asleep(worker, source, x=10**400)
    good = asleep(worker, source, x=2)
    worker.pass_time(hours=2)
    worker.sweep()
    worker.work()

    assert worker.run(bad).state == "failed"
    assert worker.step(bad, "after").error["reason"] == "template_error"
    assert worker.run(good).state == "succeeded"


def test_an_output_that_raises_fails_its_run_and_the_sweep_continues(
    worker: StepWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = flow(WAIT, head="outputs: {x: '1 + 1'}")
    bad, good = asleep(worker, source), asleep(worker, source)
    real, raised = decisions.outputs.compute, iter([RecursionError("too deep")])

    def compute(*arguments: Any) -> Any:
        for error in raised:
            raise error
        return real(*arguments)

    monkeypatch.setattr(decisions.outputs, "compute", compute)
    worker.pass_time(hours=2)
    worker.sweep()

    states = [worker.run(run_id).state for run_id in (bad, good)]
    assert sorted(states) == ["failed", "succeeded"]
    assert "RecursionError: too deep" in worker.run((bad, good)[states.index("failed")]).error["message"]


@pytest.mark.parametrize("whatever", [False, True])
def test_a_run_that_raises_ends_with_the_reason_and_the_sweep_continues(
    worker: StepWorker, monkeypatch: pytest.MonkeyPatch, whatever: bool
) -> None:
    """Even where its cancel raises, too."""
    source = flow(f"{WAIT}\n  - {{id: after, kind: noop, needs: [pause]}}")
    bad, good = asleep(worker, source), asleep(worker, source)
    real = changes.RunChange.write

    def write(change: changes.RunChange) -> None:
        ending = change.run.state in (RunState.CANCELLED, RunState.FAILED, RunState.CANCELLING)
        if change.locked.id == bad and (whatever or not ending):
            raise ZeroDivisionError("a defect")
        real(change)

    monkeypatch.setattr(changes.RunChange, "write", write)
    worker.pass_time(hours=2)
    swept = worker.sweep()

    assert (swept.resumed, swept.abandoned) == (1, 1)
    assert worker.run(bad).state == "failed"
    assert "ZeroDivisionError: a defect" in worker.run(bad).error["message"]
    assert set(worker.states(bad).values()) <= {"cancelled", "skipped"}
    assert worker.history(bad)[-1].event == "failed"
    worker.work(good)
    assert worker.run(good).state == "succeeded"
    assert worker.sweep().abandoned == 0


def test_a_holder_of_an_abandoned_run_is_refused(worker: StepWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = worker.submit(CHAIN)
    held = worker.claim("first")
    let_lease_end(worker.runs.database, run_id)
    with monkeypatch.context() as patched:
        patched.setattr(changes.RunChange, "write", lambda _: 1 / 0)
        assert worker.sweep().abandoned == 1

    worker.do(held, {})
    assert worker.run(run_id).state == "failed"
    with worker.runs.database.work() as work:
        assert [row.outcome for row in work.rows(text("SELECT outcome FROM attempt"))] == ["internal"]
    assert control.retry(worker.runs, run_id) is RunState.RUNNING
    worker.work()
    assert worker.run(run_id).state == "succeeded"


def test_a_locked_run_is_skipped(worker: StepWorker) -> None:
    locked, free = asleep(worker, flow(WAIT)), asleep(worker, flow(WAIT))
    worker.pass_time(hours=2)
    with worker.runs.database.work() as work:
        work.rows(text("SELECT FROM run WHERE id = :id FOR UPDATE"), {"id": locked})
        began = time.monotonic()
        assert worker.sweep().resumed == 1
        assert time.monotonic() - began < SOON
        assert worker.run(free).state == "succeeded"
    assert worker.sweep().resumed == 1
    assert worker.run(locked).state == "succeeded"


def test_a_locked_step_of_a_free_run_is_skipped(worker: StepWorker) -> None:
    """A claim locks the step alone, and its process may be frozen."""
    locked, free = asleep(worker, flow(WAIT)), asleep(worker, flow(WAIT))
    worker.pass_time(hours=2)
    with worker.runs.database.work() as work:
        work.rows(text("SELECT FROM step WHERE run_id = :id FOR UPDATE"), {"id": locked})
        began = time.monotonic()
        assert worker.sweep().resumed == 1
        assert time.monotonic() - began < SOON
        assert worker.run(free).state == "succeeded"


def test_a_locked_concurrency_key_is_skipped(worker: StepWorker) -> None:
    keyed = flow(WAIT, head="concurrency: {key: one, limit: 1}")
    first, second = asleep(worker, keyed), asleep(worker, keyed)
    other = asleep(worker, flow(WAIT, name="other"))
    worker.pass_time(hours=2)
    with worker.runs.database.work() as work:
        key = {"key": worker.run(first).concurrency_key}
        work.rows(text("SELECT pg_advisory_xact_lock(hashtextextended(:key, 7205759404))"), key)
        began = time.monotonic()
        worker.sweep()
        assert time.monotonic() - began < SOON
    assert [worker.run(one).state for one in (first, second, other)] == ["succeeded", "blocked", "succeeded"]
    assert worker.sweep().repeated == 1
    assert worker.run(second).state == "queued"


def test_concurrent_sweeps_select_different_rows(worker: StepWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    run_ids = [asleep(worker, flow(WAIT)) for _ in range(20)]
    worker.pass_time(hours=2)
    real, taken = expiry.end_delay, list[bool]()

    def end_delay(*arguments: Any) -> bool:
        ended = real(*arguments)
        taken.append(ended)
        return ended

    monkeypatch.setattr(expiry, "end_delay", end_delay)
    threads = [threading.Thread(target=worker.sweep) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sum(taken) == 20
    # One may be taken up just when another sweep has let go of it.
    assert len(taken) <= 40
    assert {worker.run(run_id).state for run_id in run_ids} == {"succeeded"}


def test_no_concurrency_key_starves_behind_others(worker: StepWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are more keys with blocked runs than one sweep examines."""
    source = flow(
        "\n  - {id: a, kind: generate, model: 'm:1', prompt: hi}",
        head='inputs: {k: {type: string}}\nconcurrency: {key: "{{ inputs.k }}", limit: 1}',
    )
    runs = {key: [worker.submit(source, k=key) for _ in range(2)] for key in "abcdefg"}
    with monkeypatch.context() as patched:
        patched.setattr(Runs, "_carry_out", lambda *_: None)
        worker.work(runs["g"][0])
    cursor = SweepCursor()
    swept = [sweep(worker.runs, republish_after=timedelta(minutes=1), batch=2, cursor=cursor) for _ in range(4)]
    assert sum(one.repeated for one in swept) == 1
    assert worker.run(runs["g"][1]).state == "queued"


def test_lost_answers_are_repeated_page_by_page(worker: StepWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(worker, flow("\n  - {id: a, kind: generate, model: 'm:1', prompt: hi}", name="child"))
    call = flow("\n  - {id: ask, kind: workflow, workflow: child}", name="parent")
    parents = [asleep_on_a_call(worker, call) for _ in range(5)]
    last = sorted(parents, key=lambda one: worker.step(one, "ask").id)[-1]
    with monkeypatch.context() as patched:
        patched.setattr(Runs, "_carry_out", lambda *_: None)
        worker.work(worker.step(last, "ask").called_run_id)
    worker.pass_time(seconds=5)
    cursor = SweepCursor()
    swept = [sweep(worker.runs, republish_after=timedelta(minutes=1), batch=2, cursor=cursor) for _ in range(4)]
    assert sum(one.repeated for one in swept) == 1
    assert worker.run(last).state == "succeeded"


def asleep_on_a_call(worker: StepWorker, source: str) -> UUID:
    run_id = worker.submit(source)
    worker.do(worker.claim("ask", run_id), {})
    return run_id


def test_paused_steps_do_not_hide_lost_messages(runs: Runs, database: Database, valkey: redis.Redis) -> None:
    paused = [submit(runs) for _ in range(3)]
    for run_id in paused:
        control.pause(runs, run_id)
    lost = submit(runs)
    valkey.flushdb()
    age_messages(database)
    swept = [sweep(runs, republish_after=timedelta(seconds=60), batch=2).republished for _ in range(3)]
    assert sum(swept) == 1
    assert [run_id for run_id in (*paused, lost) if message_of(runs, valkey, run_id)] == [lost]

    assert control.resume(runs, paused[0])
    assert message_of(runs, valkey, paused[0])


def message_of(runs: Runs, valkey: redis.Redis, run_id: UUID) -> bool:
    wanted = str(step(runs, run_id, "first").id)
    lists = [valkey.lrange(key, 0, -1) for key in valkey.keys(f"{QUEUE}*")]
    bodies = [base64.b64decode(json.loads(message)["body"]).decode() for found in lists for message in found]
    return any(wanted in body for body in bodies)


def test_a_queue_of_a_wrong_type_does_not_hide_the_others(
    runs: Runs, database: Database, valkey: redis.Redis, publisher: CeleryPublisher
) -> None:
    submit(runs, "workflow: a\nsteps: [{id: a, kind: generate, model: 'a:1', prompt: hi}]")
    submit(runs)
    valkey.flushdb()
    age_messages(database)
    valkey.set("model.a-1", "no list")
    sweep(runs, republish_after=timedelta(seconds=60))
    assert publisher.depth("model.m-1") == 1


def test_a_part_of_the_sweep_that_raises_stops_no_other(worker: StepWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = asleep(worker, flow(WAIT))
    worker.pass_time(hours=2)
    real = overdue.OverdueKind.next

    def next_(kind: overdue.OverdueKind, *arguments: Any) -> Any:
        if kind is overdue.EXPIRED:
            raise KeyError("a defect")
        return real(kind, *arguments)

    monkeypatch.setattr(overdue.OverdueKind, "next", next_)
    assert worker.sweep().resumed == 1
    assert worker.run(run_id).state == "succeeded"


def test_an_effect_that_raises_does_not_fail_the_record_that_ended_the_run(
    worker: StepWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(worker, flow("\n  - {id: a, kind: generate, model: 'm:1', prompt: hi}", name="child"))
    parent = asleep_on_a_call(worker, flow("\n  - {id: ask, kind: workflow, workflow: child}", name="parent"))
    with monkeypatch.context() as patched:
        patched.setattr(Runs, "answer", lambda *_: 1 / 0)
        worker.work(worker.step(parent, "ask").called_run_id)
        worker.pass_time(seconds=5)
        assert worker.sweep().abandoned == 1
    assert "ZeroDivisionError" in worker.run(parent).error["message"]


def is_near(database: Database, seconds: float = 10) -> bool:
    with database.work() as work:
        return overdue.is_near(work, timedelta(seconds=seconds))


def test_only_what_a_sweep_may_act_on_soon_is_near(worker: StepWorker, database: Database) -> None:
    """Steps that are ready or run count, and those whose time comes; an approval that waits for days does not."""
    assert not is_near(database), "nothing is there"
    asking = worker.submit(flow("\n  - {id: ask, kind: wait, approval: {message: 'go on?'}}"))
    worker.work(asking)
    assert worker.run(asking).state == "running"
    assert not is_near(database), "only a person can go on"

    waiting = asleep(worker, flow(WAIT))
    assert not is_near(database)
    assert is_near(database, seconds=2 * 3600), "it ends within that time"
    worker.pass_time(hours=0.999)
    assert is_near(database)
    worker.pass_time(hours=1)
    worker.sweep()
    worker.work(waiting)
    assert worker.run(waiting).state == "succeeded"
    assert not is_near(database)

    worker.submit(flow("\n  - {id: one, kind: noop}"))
    assert is_near(database), "it is ready"
