"""The view of a run says why no pool is started for its steps."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import text

from app.kernel.database import Database
from app.workflows.runs import views
from tests.workflows.conftest import StepWorker

FLOW = """
workflow: flow
inputs: {texts: {type: array}}
steps:
  - {id: say, kind: generate, model: "smollm2:135m", prompt: Hello, max_tokens: 4}
  - id: each
    kind: map
    over: inputs.texts
    max_parallel: 1
    step: {kind: generate, model: "qwen3:4b", prompt: "{{ item }}", max_tokens: 4}
  - {id: later, kind: generate, needs: [say], model: "qwen3:4b", prompt: Hello, max_tokens: 4}
"""
_REFUSE = text("INSERT INTO refusal (configuration, model, reason, needs_bytes) VALUES (:model, :model, :reason, 0)")


def refuse(database: Database, **reasons: str) -> None:
    with database.work() as work:
        work.run(text("DELETE FROM refusal"))
        for model, reason in reasons.items():
            work.run(_REFUSE, {"model": model, "reason": reason})


def reasons(worker: StepWorker, run_id: UUID) -> dict[str, str | None]:
    return {step.key: step.waiting_reason for step in views.run(worker.runs.database, run_id).steps}


def test_a_ready_step_and_a_map_with_ready_items_show_why_they_wait(worker: StepWorker, database: Database) -> None:
    run_id = worker.submit(FLOW, texts=["a", "b"])
    worker.do(worker.claim("each"), {})
    assert set(reasons(worker, run_id).values()) == {None}

    refuse(database, **{"smollm2:135m": "no host has its file", "qwen3:4b": "it is too large", "other:1": "no"})
    assert reasons(worker, run_id) == {"say": "no host has its file", "each": "it is too large", "later": None}


def test_a_step_that_runs_or_has_ended_waits_for_nothing(worker: StepWorker, database: Database) -> None:
    run_id = worker.submit(FLOW, texts=["a"])
    worker.do(worker.claim("each"), {})
    claim, item = worker.claim("say"), worker.claim("each[0]")
    refuse(database, **{"smollm2:135m": "its pool is gone", "qwen3:4b": "it is too large"})
    assert set(reasons(worker, run_id).values()) == {None}

    worker.do(claim, {})
    worker.do(item, {})
    assert reasons(worker, run_id) == {"say": None, "each": None, "later": "it is too large"}
    worker.work(run_id)
    assert set(reasons(worker, run_id).values()) == {None}
