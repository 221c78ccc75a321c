"""Payloads: a value of any length is read as it was written, stored once, and removed with its last row."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from app.kernel import ids
from app.kernel.database import Database
from app.kernel.errors import InvalidInput, PayloadTooLarge
from app.kernel.settings import Settings
from app.workflows import garbage, registry, retention
from app.workflows.language import check
from app.workflows.runs import control, forks, views
from app.workflows.runs.details import Elsewhere
from app.workflows.runs.service import Runs
from app.workflows.runs.storage import payloads
from app.workflows.runs.storage.payloads import PayloadLimits, as_json
from app.workflows.state_machine.states import RunState
from tests.workflows.conftest import StepWorker, failure
from workers import jobs

#: Values on both sides of it are short enough to be many.
SMALL = PayloadLimits(inline=48, one=4000, read=10_000)
CHILD = """
workflow: child
inputs: {v: {}}
defaults: {model: "m:1"}
steps: [{id: give, kind: generate, prompt: "{{ inputs.v }}"}]
outputs: {v: steps.give.output}
"""
EVERYWHERE = """
workflow: everywhere
inputs: {v: {}, w: {default: null}}
defaults: {model: "m:1"}
steps:
  - {id: a, kind: generate, prompt: "{{ inputs.v }}"}
  - {id: same, kind: noop, needs: [a], when: steps.a.output == inputs.v}
  - id: each
    kind: map
    needs: [same]
    over: "[inputs.v, steps.a.output, 1]"
    step: {kind: generate, prompt: "{{ item }}"}
  - {id: both, kind: join, needs: [a, each]}
  - {id: call, kind: workflow, workflow: child, needs: [same], inputs: {v: steps.a.output}}
  - {id: told, kind: wait, needs: [same], event: news}
  - {id: last, kind: generate, prompt: "{{ steps }} {{ inputs }}", needs: [both, call, told]}
outputs: {a: steps.a.output, each: steps.each.output, call: steps.call.output.v, told: steps.told.output}
"""
GIVE = """
workflow: give
inputs: {v: {}}
defaults: {model: "m:1"}
steps: [{id: a, kind: generate, prompt: hi, retry: {max_attempts: 1}}]
"""
LONG = "x" * 100

_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60)
    | st.sampled_from(["\\u0000", '"\\', "\u2028é\U0001f999"])
)
VALUES = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("zyxab", max_size=3), inner, max_size=4),
    max_leaves=8,
)


def text_of(runs: Runs, run_id: UUID, name: str, key: str | None = None) -> str:
    return "".join(views.text_of(runs.database, run_id, name, key))


def stored(database: Database, what: str = "payload") -> int:
    with database.work() as work:
        found: int = work.rows(text(f"SELECT count(*) AS n FROM {what}"))[0].n
    return found


@pytest.fixture
def worker(runs: Runs) -> StepWorker:
    """A worker with a low limit for values in rows."""
    return StepWorker(replace(runs, policy=replace(runs.policy, limits=SMALL)))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(v=VALUES, w=VALUES, told=VALUES)
def test_a_value_is_read_byte_for_byte_wherever_it_is_stored(worker: StepWorker, v: Any, w: Any, told: Any) -> None:
    registry.put(worker.runs.database, "child", check.parse(CHILD))
    seen: dict[str, Any] = {}

    def keep(claim: Any) -> Any:
        seen[claim.key] = claim.data
        return claim.data.get("item", claim.data["inputs"].get("v"))

    run_id = worker.submit(EVERYWHERE, v=v, w=w)
    worker.send_event(run_id, "news", told)
    worker.work(a=keep, each=keep, give=keep, last=keep)
    run, listed = worker.run(run_id), worker.items(run_id, "each")
    fork = forks.fork(worker.runs, run_id, "last", {"w": told}).id
    child = worker.step(run_id, "call").called_run_id
    worker.work(last=keep)
    forked = worker.run(fork)

    assert (run.state, forked.state) == ("succeeded", "succeeded"), run.error
    everything = {"a": v, "each": [v, v, 1], "call": v, "told": told}
    came = [
        (v, seen["a"]["inputs"]["v"]),
        (v, seen["each[0]"]["item"]),
        (v, seen["each[1]"]["item"]),
        (v, seen["give"]["inputs"]["v"]),
        ({"v": v, "w": told}, seen["last"]["inputs"]),
        ({"a": v, "each": [v, v, 1]}, seen["last"]["steps"]["both"]["output"]),
        ([v, v, 1], seen["last"]["steps"]["each"]["output"]),
        ({"v": v}, seen["last"]["steps"]["call"]["output"]),
        (told, seen["last"]["steps"]["told"]["output"]),
        ({"v": v, "w": w}, run.inputs),
        (everything, run.output),
        (everything, forked.output),
        (v, worker.run(child).inputs["v"]),
        (v, worker.step(run_id, "a").output),
        *((one, row.input) for one, row in zip([v, v, 1], listed, strict=True)),
        *((one, row.output) for one, row in zip([v, v, 1], listed, strict=True)),
    ]
    assert [(as_json(is_), as_json(was)) for was, is_ in came] == [(as_json(was), as_json(was)) for was, _ in came]
    for text_is, value in (
        (text_of(worker.runs, run_id, "inputs"), {"v": v, "w": w}),
        (text_of(worker.runs, run_id, "output"), everything),
        (text_of(worker.runs, run_id, "output", "a"), v),
        (text_of(worker.runs, run_id, "input", "each[1]"), v),
        (text_of(worker.runs, run_id, "output", "each"), [v, v, 1]),
        (text_of(worker.runs, fork, "output", "each[1]"), v),
    ):
        assert text_is == as_json(value)
    with worker.runs.database.work() as work:
        rows = work.rows(
            text("SELECT output IS NULL AS left, output_bytes AS size FROM step WHERE run_id = :id AND key = 'a'"),
            {"id": run_id},
        )
    assert [(row.left, row.size) for row in rows] == [
        (len(as_json(v).encode()) > SMALL.inline, len(as_json(v).encode()))
    ]


def test_only_characters_that_postgres_cannot_store_are_replaced() -> None:
    assert json.loads(as_json({"\\u0000": ["\\\0", "\\u0000\0"]})) == {"\\u0000": ["\\\ufffd", "\\u0000\ufffd"]}


def test_values_as_long_as_the_limit_are_accepted(runs: Runs) -> None:
    """Inputs, an output and an event of 60 MB each: more than the buffers of a connection."""
    worker, long = StepWorker(runs), "llama " * 10 * 2**20
    source = CHILD.replace("]\noutputs", ", {id: told, kind: wait, needs: [give], event: news}]\noutputs")
    run_id = worker.submit(source, v=long)
    worker.work(run_id, give=f"out{long}")
    control.send_event(runs, run_id, "news", f"in{long}")

    assert views.run(runs.database, run_id).run.state == RunState.SUCCEEDED
    assert json.loads(text_of(runs, run_id, "inputs")) == {"v": long}
    assert json.loads(text_of(runs, run_id, "output", "give")) == f"out{long}"
    assert json.loads(text_of(runs, run_id, "output", "told")) == f"in{long}"


def test_the_same_value_is_stored_once(worker: StepWorker) -> None:
    for _ in range(2):
        worker.submit(GIVE, v=LONG)
        worker.work(a=LONG)

    assert stored(worker.runs.database, "run") == 2
    assert stored(worker.runs.database) == 3, "inputs, output of the step, output of the run"


def test_a_shared_body_is_removed_with_its_last_row(worker: StepWorker) -> None:
    database = worker.runs.database
    registry.put(database, "give", check.parse(GIVE))
    short = worker.submit(GIVE.replace("workflow: give", "workflow: give\nretention: 1h"), v=LONG)
    worker.submit(GIVE, v=LONG)
    worker.work(a=[LONG])
    forks.fork(worker.runs, short, "a", {})
    assert (stored(database), stored(database, "definition")) == (3, 2)

    def expire(hours: int) -> tuple[int, int, int]:
        worker.pass_time(hours=hours)
        return (
            retention.remove_runs(database),
            retention.remove_definitions(database),
            retention.remove_payloads(database),
        )

    assert expire(2) == (1, 0, 0), "the fork has its definition, and the other run its inputs and output"
    control.cancel_all(worker.runs, control.Filter())
    assert expire(2) == (1, 1, 0)
    assert expire(24 * 31) == (1, 0, 3), "the version of the workflow stays"
    assert stored(database, "definition") == 1


def test_the_body_of_an_output_that_was_replaced_is_removed(worker: StepWorker) -> None:
    run_id = worker.submit(GIVE + "on_failure: [{id: undo, kind: generate, prompt: hi}]", v=1)
    worker.work(a=failure(), undo=LONG)
    assert retention.remove_payloads(worker.runs.database) == 0
    control.retry(worker.runs, run_id)

    assert retention.remove_payloads(worker.runs.database) == 1


def test_a_body_that_a_transaction_locks_is_not_removed(worker: StepWorker) -> None:
    """A body that nothing refers to, while another transaction has locked it."""
    database = worker.runs.database
    with database.work() as work:
        (ref,) = payloads.put(work, [LONG])
    with database.work() as work:
        assert payloads.put(work, [LONG]) == [ref]
        assert retention.remove_payloads(database) == 0
    assert retention.remove_payloads(database) == 1


def test_a_body_that_is_being_removed_is_stored_again(worker: StepWorker) -> None:
    database = worker.runs.database
    run_id = worker.submit(GIVE, v=LONG)
    worker.runs.cancel(run_id)
    worker.pass_time(hours=24 * 31)
    assert retention.remove_runs(database) == 1
    submitted: list[UUID] = []
    thread = threading.Thread(target=lambda: submitted.append(worker.submit(GIVE, v=LONG)))
    with database.work() as work:
        # Both are gone for whoever begins after this, and there until it commits.
        assert (garbage.remove(work, "payload", "", 9)[0], garbage.remove(work, "definition", "", 9)[0]) == (1, 1)
        thread.start()
        wait_until_blocked(database, thread)
    thread.join()

    assert worker.run(submitted[0]).inputs == {"v": LONG}


def test_a_body_that_was_referred_to_at_the_last_moment_is_not_removed(
    worker: StepWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run is submitted after the remover has read the body and before it has locked it."""
    database = worker.runs.database
    with database.work() as work:
        payloads.put(work, [as_json({"v": LONG})])
    look, lock, delete = garbage._statements("payload")
    gate = "AND (SELECT CAST(pg_advisory_xact_lock(42) AS text)) IS NOT NULL ORDER BY"
    slow = (look, text(lock.text.replace("ORDER BY", gate)), delete)
    monkeypatch.setattr(garbage, "_statements", lambda _: slow)
    removed: list[int] = []
    remover = threading.Thread(target=lambda: removed.append(retention.remove_payloads(database)))
    with database.work() as work:
        work.run(text("SELECT pg_advisory_xact_lock(42)"))
        remover.start()
        wait_until_blocked(database, remover)
        run_id = worker.submit(GIVE, v=LONG)
    remover.join()

    assert (removed, worker.run(run_id).inputs) == ([0], {"v": LONG})


def wait_until_blocked(database: Database, thread: threading.Thread) -> None:
    while True:
        assert thread.is_alive()
        with database.work() as work:
            if work.rows(text("SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'")):
                return
        thread.join(0.01)


def test_no_body_is_lost_among_concurrent_runs_and_removals(worker: StepWorker) -> None:
    """Two threads submit and remove the same values repeatedly; a third removes unused bodies."""
    database = worker.runs.database
    over = threading.Event()
    broken: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 told at the end
                broken.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def come_and_go() -> None:
        for _ in range(25):
            run_id = worker.submit(GIVE, v=LONG)
            assert worker.run(run_id).inputs == {"v": LONG}
            with database.work() as work:
                work.run(text("DELETE FROM run WHERE id = :id"), {"id": run_id})

    def clean() -> None:
        while not over.is_set():
            retention.remove_definitions(database)
            retention.remove_payloads(database)

    cleaner = guarded(clean)
    for thread in [guarded(come_and_go) for _ in range(2)]:
        thread.join()
    over.set()
    cleaner.join()

    assert broken == []


@pytest.mark.parametrize(
    ("output", "why"),
    [
        (
            ["x" * 5000],
            r"the output: 5004 bytes as JSON; at most 4000 can be stored \(setting runs.max_payload_byt",
        ),
        ("half \ud83e", "half a character"),
        ({"n": float("inf")}, "cannot be stored as JSON: Out of range float"),
    ],
)
def test_an_output_that_cannot_be_stored_fails_the_attempt(worker: StepWorker, output: Any, why: str) -> None:
    run_id = worker.submit(GIVE, v=1)
    worker.work(a=output)

    assert worker.run(run_id).state == "failed"
    error = worker.step(run_id, "a").error
    assert error["reason"] == "invalid_output"
    assert re.search(why, error["message"])


def test_inputs_and_events_that_cannot_be_stored_are_refused(worker: StepWorker) -> None:
    with pytest.raises(PayloadTooLarge, match="inputs: 5008 bytes"):
        worker.submit(GIVE, v="x" * 5000)
    with pytest.raises(InvalidInput, match="half a character"):
        worker.submit(GIVE, v="\ud83e")
    assert stored(worker.runs.database, "run") == 0

    run_id = worker.submit(EVERYWHERE, v=1)
    with pytest.raises(PayloadTooLarge, match="payload"):
        worker.send_event(run_id, "news", "x" * 5000)
    assert stored(worker.runs.database, "event") == 0


MANY = """
workflow: many
defaults: {{model: "m:1"}}
steps:
  - {{id: a, kind: generate, prompt: hi}}
  - {{id: b, kind: generate, prompt: hi}}
  - {{id: c, kind: generate, prompt: hi}}
  - {{id: d, kind: generate, prompt: hi}}
{more}
"""


@pytest.mark.parametrize(
    ("more", "key", "why"),
    [
        (
            """  - {id: each, kind: map, needs: [a, b], over: "[steps.a.output, steps.b.output]",
     step: {kind: noop}, retry: {max_attempts: 1}}""",
            "each",
            "invalid_request the items together: 7004 bytes as JSON; at most 4000 can be stored",
        ),
        (
            "  - {id: each, kind: map, over: '[1, 2]', step: {kind: generate, prompt: hi}, retry: {max_attempts: 1}}",
            "each",
            "invalid_output the outputs of its items together: 7004 bytes as JSON; at most 4000 can be stored",
        ),
        (
            "  - {id: all, kind: join, needs: [a, b, c], retry: {max_attempts: 1}}",
            "all",
            r"invalid_request the outputs that are read \(a, b, c\) have 10506 bytes, more than runs.max_read_bytes",
        ),
        (
            "  - {id: asked, kind: noop, needs: [a, b, c, d], when: steps.a.output + steps.b.output == steps.c.output}",
            "asked",
            "invalid_request the outputs that are read",
        ),
    ],
    ids=["items", "outputs of items", "work", "condition"],
)
def test_values_that_are_too_long_together_fail_the_step(worker: StepWorker, more: str, key: str, why: str) -> None:
    run_id = worker.submit(MANY.format(more=more))
    worker.work(a="x" * 3500, b="x" * 3500, c="x" * 3500, each="x" * 3500)

    assert worker.run(run_id).state == "failed"
    error = worker.step(run_id, key).error
    assert re.match(why, f"{error['reason']} {error['message']}")


def test_outputs_of_items_that_nothing_reads_may_be_longer_together(worker: StepWorker) -> None:
    """As those of a batch, whose results are read item by item."""
    more = "  - {id: each, kind: map, over: '[1, 2]', step: {kind: generate, prompt: hi}}\noutputs: {done: 'true'}"
    run_id = worker.submit(MANY.format(more=more))
    worker.work(each="x" * 3500)

    assert worker.run(run_id).state == "succeeded"
    assert worker.run(run_id).output == {"done": True}


def test_a_run_whose_output_is_too_long_fails_with_its_steps_done(worker: StepWorker) -> None:
    run_id = worker.submit(GIVE.replace("hi, retry", "hi}, {id: b, kind: noop, retry"), v=1)
    worker.work(a="x" * 3990)

    assert set(worker.states(run_id).values()) == {"succeeded"}
    assert worker.run(run_id).state == "failed"
    assert "the output of the run cannot be computed: the output: 40" in worker.run(run_id).error["message"]
    assert len(text_of(worker.runs, run_id, "output", "a")) == 3992


def test_one_run_of_the_job_removes_all_expired_rows(worker: StepWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "_RUNS", 2)
    monkeypatch.setattr(retention, "_SHARED", 2)
    monkeypatch.setattr(ids, "chance", lambda: 0.5)
    for n in range(5):
        worker.submit(GIVE.replace("prompt: hi", f"prompt: hi {n}"), v=f"{LONG}{n}")
    control.cancel_all(worker.runs, control.Filter())
    worker.pass_time(hours=24 * 31)
    runtime: Any = SimpleNamespace(runs=worker.runs, settings=Settings())
    jobs.run_expire(runtime)

    assert [stored(worker.runs.database, what) for what in ("run", "definition", "payload")] == [0, 0, 0]


def test_views_show_the_shortest_values_and_mark_the_others(worker: StepWorker) -> None:
    run_id = worker.submit(
        MANY.format(more="  - {id: each, kind: map, over: '[1, 22]', step: {kind: generate, prompt: hi}}")
    )
    worker.work(a="x" * 100, b="x" * 10, c="x" * 30, d=None, each="x" * 20)
    found = views.run(worker.runs.database, run_id, most=50)
    items = views.items(worker.runs.database, run_id, "each", limit=9, most=23)

    shown = {row.key: row.output for row in found.steps}
    assert shown == {"a": Elsewhere(102), "b": "x" * 10, "c": "x" * 30, "d": None, "each": None}
    assert (found.run.inputs, found.run.output) == ({}, Elsewhere(len(text_of(worker.runs, run_id, "output"))))
    assert [(row.input, row.output) for row in items] == [(1, "x" * 20), (22, Elsewhere(22))]


def test_worker_programs_register_all_tables_with_foreign_keys() -> None:
    """In a new process: tests have imported all tables already."""
    told = "import workers.programs; from app.workflows import garbage; print(*garbage._statements('definition'))"
    done = subprocess.run(
        [sys.executable, "-c", told], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[4]
    )
    assert "NOT EXISTS (SELECT FROM run" in done.stdout
