"""Learning of ended runs on the real Postgres."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.inference.prediction import learning, store
from app.inference.prediction.history import WorkflowHistory
from app.kernel.database import Database
from app.kernel.errors import FailureReason
from app.workflows.language import check
from app.workflows.runs import views
from app.workflows.runs.service import Runs
from app.workflows.runs.submission import Submission
from app.workflows.state_machine.outcomes import Expanded, Failure, Success, TokenUsage

PAIR = """
workflow: pair
steps:
  - {id: a, kind: generate, model: "m:1", prompt: x, retry: {max_attempts: 1}}
  - {id: b, kind: generate, model: "m:1", prompt: x, needs: [a]}
"""
SPREAD = """
workflow: spread
inputs: {list: {type: array}}
steps:
  - {id: each, kind: map, over: inputs.list, step: {kind: generate, model: "m:1", prompt: x}}
"""


_AGO = "now() - interval '1 minute'"


def do(runs: Runs, run_id: UUID, key: str, outcome: Any) -> None:
    state = views.step_state(runs.database, run_id, key)
    assert state == "ready"
    with runs.database.work() as work:
        row = work.row(
            text("SELECT id, attempt FROM step WHERE run_id = :id AND key = :key"), {"id": run_id, "key": key}
        )
    assert row is not None
    claim = runs.claim(row.id, row.attempt, "w")
    assert claim is not None
    match outcome:
        case Success():
            runs.succeed(claim, "w", outcome)
        case Failure():
            runs.fail(claim, "w", outcome)
        case Expanded():
            runs.leave(claim, "w", outcome)


def succeeded(tokens_out: int) -> Success:
    return Success("text", TokenUsage(100, tokens_out, 40, timedelta(seconds=0.25)))


def submit(runs: Runs, source: str, **inputs: Any) -> UUID:
    return runs.submit(Submission(check.parse(source), inputs)).id


def age(database: Database, run_id: UUID, seconds: float) -> None:
    """Move a run into the past, and stretch it."""
    with database.work() as work:
        run = f"UPDATE run SET created_at = {_AGO}, finished_at = {_AGO} + make_interval(secs => :seconds)"
        steps = f"UPDATE attempt SET started_at = {_AGO}, finished_at = {_AGO} + make_interval(secs => :seconds / 2)"
        values = {"id": run_id, "seconds": seconds}
        work.run(text(f"{run} WHERE id = :id"), values)
        work.run(text(f"{steps} WHERE step_id IN (SELECT id FROM step WHERE run_id = :id)"), values)


def history(database: Database, name: str) -> WorkflowHistory:
    with database.work() as work:
        return WorkflowHistory.of(store.read(work, "workflow", [name], "default").get(name))


def test_a_run_is_learned_of_once(runs: Runs, database: Database) -> None:
    run_id = submit(runs, PAIR)
    for key in ("a", "b"):
        do(runs, run_id, key, succeeded(50))
    assert learning.learn_ended(database, lambda: True) == 0, "a commit that began earlier may still come"
    age(database, run_id, 4.0)

    assert learning.learn_ended(database, lambda: True) == 1
    assert learning.learn_ended(database, lambda: True) == 0
    found = history(database, "pair")
    assert {key: round(step.seconds.mean, 1) for key, step in found.steps.items()} == {"a": 2.0, "b": 2.0}
    assert found.steps["a"].tokens_out.mean_y == 50
    with database.work() as work:
        model = store.read(work, "model", ["m:1"])["m:1"]
    assert model["prompt"][1] == 60, "tokens that were cached are not computed"


def test_a_failed_run_is_passed_and_the_next_one_learned(runs: Runs, database: Database) -> None:
    failed, good = submit(runs, PAIR), submit(runs, PAIR)
    do(runs, failed, "a", Failure(FailureReason.INTERNAL, "no"))
    for key in ("a", "b"):
        do(runs, good, key, succeeded(10))
    for run_id in (failed, good):
        age(database, run_id, 2.0)

    assert learning.learn_ended(database, lambda: True) == 2
    assert history(database, "pair").steps["a"].tokens_out.weight == 1
    assert learning.learn_ended(database, lambda: True) == 0


def test_items_of_a_map_are_learned_of_with_their_number(runs: Runs, database: Database) -> None:
    run_id = submit(runs, SPREAD, list=[1, 2, 3])
    do(runs, run_id, "each", Expanded([1, 2, 3]))
    for index in range(3):
        do(runs, run_id, f"each[{index}]", succeeded(20 + index))
    age(database, run_id, 4.0)

    assert learning.learn_ended(database, lambda: True) == 1
    each = history(database, "spread").steps["each"]
    assert (each.items.mean_y, each.tokens_out.mean_y > 20, round(each.seconds.mean, 1)) == (3, True, 2.0)


def test_the_next_runs_to_learn_of_are_found_by_an_index(runs: Runs, database: Database) -> None:
    with database.work() as work:
        work.run(text("SET LOCAL enable_seqscan = off"))
        cursor = {"at": "2026-01-01T00:00:00+00:00", "id": "00000000-0000-0000-0000-000000000000"}
        plan = work.rows(text(f"EXPLAIN {store._RUNS.text}"), {**cursor, "lag": timedelta(seconds=2), "limit": 200})
    assert "ix_run_finished" in "\n".join(row[0] for row in plan)


def test_two_processes_never_learn_of_the_same_run(runs: Runs, database: Database) -> None:
    run_id = submit(runs, PAIR)
    for key in ("a", "b"):
        do(runs, run_id, key, succeeded(50))
    age(database, run_id, 4.0)
    with database.work() as work:
        store.lock_cursor(work)
    with database.work() as other:
        assert store.lock_cursor(other) is not None
        assert learning.learn_ended(database, lambda: True) == 0
    assert learning.learn_ended(database, lambda: True) == 1
