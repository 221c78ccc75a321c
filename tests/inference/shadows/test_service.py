"""Shadows over a real database: what is done again, what is left out, and what pairs become."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from app.catalog import files
from app.inference.direct import DirectRequest
from app.inference.shadows.comparison import PairMetric
from app.inference.shadows.rows import ShadowState
from app.inference.shadows.service import Shadows
from app.kernel.database import Database
from app.kernel.errors import Conflict, InvalidInput, NotFound
from app.workflows import registry
from app.workflows.language import definition as definitions
from app.workflows.runs import views
from app.workflows.runs.service import Runs
from app.workflows.state_machine.outcomes import Failure, Success, TokenUsage

MODEL, OTHER, OWNER = "smollm2:135m", "gemma3:270m", "pool@here/1/x"
SHADOW: dict[str, Any] = {
    "shadow": "next",
    "model": MODEL,
    "share": 1.0,
    "candidate": {"model": OTHER, "set": {"max_tokens": 5}},
}
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def shadows(runs: Runs) -> Shadows:
    return Shadows(runs, files.read_catalog)


def start(shadows: Shadows, database: Database, **changes: Any) -> None:
    with database.work() as work:
        shadows.start(work, {**SHADOW, **changes}, "ana")


def answer(words: str) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": words}, "finish_reason": "stop"}]}


def called(runs: Runs, words: str = "Hi there", **body: Any) -> UUID:
    """A call that a pool has answered."""
    request = DirectRequest.new(MODEL, {"messages": HELLO, "stream": True, **body}, "interactive", {}, 0)
    claim = runs.submit_held(request.submission(), OWNER)
    assert claim is not None
    runs.succeed(claim, OWNER, Success(answer(words), TokenUsage(10, 4)))
    return request.run_id


def end_candidate(runs: Runs, database: Database, run_id: UUID, outcome: Success | Failure) -> None:
    with database.work() as work:
        step = work.rows(text("SELECT id FROM step WHERE run_id = :id"), {"id": run_id})[0].id
    claim = runs.claim(step, 1, OWNER)
    assert claim is not None
    if isinstance(outcome, Success):
        runs.succeed(claim, OWNER, outcome)
    else:
        runs.fail(claim, OWNER, outcome)


def candidate_of(database: Database) -> views.RunView:
    rows = views.page(database, limit=50, workflow="shadow").runs
    return views.run(database, rows[0].id)


def test_a_call_is_done_again_and_compared(shadows: Shadows, runs: Runs, database: Database) -> None:
    before = called(runs)
    start(shadows, database)
    original = called(runs)

    assert shadows.advance().begun == 1
    assert shadows.advance().begun == 0
    candidate = candidate_of(database)
    assert candidate.run.labels == {"shadow": "next", "shadow_of": str(original)}
    assert candidate.run.priority == "batch"
    assert candidate.run.inputs["request"] == {"messages": HELLO, "max_tokens": 5}
    assert [step.model for step in candidate.steps] == [OTHER]
    assert str(before) not in candidate.run.labels.values()

    end_candidate(runs, database, candidate.run.id, Success(answer("Hi"), TokenUsage(10, 2)))
    assert shadows.advance().compared == 1
    found = shadows.report("next")
    assert (found.open, found.compared, found.skipped) == (0, 1, {})
    metrics = {one.metric: one.difference for one in found.metrics}
    assert metrics[PairMetric.ERROR] == 0
    assert metrics[PairMetric.TOKENS_OUT] == pytest.approx(-0.5)
    assert metrics[PairMetric.LENGTH] == pytest.approx(-0.75)
    assert shadows.advance().begun == 0, "what a candidate did is not done again"


def test_a_candidate_that_fails_counts(shadows: Shadows, runs: Runs, database: Database) -> None:
    start(shadows, database)
    called(runs)
    shadows.advance()
    failed = Failure("engine_error", "no memory", final=True)  # type: ignore[arg-type] # as a pool reports it
    end_candidate(runs, database, candidate_of(database).run.id, failed)
    shadows.advance()

    (error,) = shadows.report("next").metrics
    assert (error.metric, error.difference) == (PairMetric.ERROR, 1.0)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"conversation_id": "conv_1"}, "it continues a conversation"),
        ({"memory": {"recall": True}}, "it continues a conversation"),
        ({"messages": "x" * 2_000_000}, "it is too large to compare"),
    ],
)
def test_what_cannot_be_done_again_is_counted(
    shadows: Shadows, runs: Runs, database: Database, body: dict[str, Any], reason: str
) -> None:
    start(shadows, database)
    called(runs, **body)

    assert shadows.advance().skipped == 1
    assert shadows.report("next").skipped == {reason: 1}


def test_the_number_of_open_runs_and_of_pairs_is_limited(shadows: Shadows, runs: Runs, database: Database) -> None:
    start(shadows, database, max_open=2)
    start(shadows, database, shadow="few", pairs=1)
    for _ in range(3):
        called(runs)
    done = shadows.advance()

    assert (done.begun, done.skipped) == (3, 3)
    assert shadows.report("next").skipped == {"2 runs of the candidate were open": 1}
    called(runs)
    shadows.advance()
    assert shadows.report("few").stored.state == ShadowState.COMPLETE


def test_a_share_is_sampled_by_the_ids_of_runs(shadows: Shadows, runs: Runs, database: Database) -> None:
    start(shadows, database, share=0.5)
    for _ in range(60):
        called(runs)

    assert 12 <= shadows.advance().begun <= 48


def test_runs_of_a_workflow_are_done_again_when_they_harm_nobody(
    shadows: Shadows, runs: Runs, database: Database
) -> None:
    pure = {"workflow": "report", "steps": [{"id": "sum", "kind": "transform", "cel": "1 + 1"}]}
    acting = {"workflow": "report", "steps": [{"id": "pause", "kind": "wait", "for": "1h"}]}
    registry.put(database, "report", definitions.from_document(pure))
    registry.put(database, "report", definitions.from_document(acting))
    of_runs = {"model": None, "workflow": "report"}
    with pytest.raises(InvalidInput, match="act outside of the run"):
        start(shadows, database, **of_runs, candidate={"version": 2})
    with pytest.raises(InvalidInput, match="version"):
        start(shadows, database, **of_runs, candidate={"version": 9})
    start(shadows, database, **of_runs, candidate={"version": 1})


def test_shadows_end_and_are_removed(shadows: Shadows, runs: Runs, database: Database) -> None:
    start(shadows, database)
    with pytest.raises(Conflict, match="there is a shadow"):
        start(shadows, database)
    with pytest.raises(InvalidInput, match="there is no model"):
        start(shadows, database, shadow="other", compare={"judge": "nobody:1b"})
    called(runs)
    shadows.advance()
    with database.work() as work:
        with pytest.raises(Conflict, match="stop it first"):
            shadows.remove(work, "next")
        shadows.stop(work, "next", "enough")
        with pytest.raises(Conflict, match="has ended"):
            shadows.stop(work, "next", "")
    runs.cancel(candidate_of(database).run.id)
    assert shadows.advance().compared == 1
    assert shadows.report("next").skipped == {"one of its runs was cancelled or removed": 1}
    with database.work() as work:
        shadows.remove(work, "next")
        with pytest.raises(NotFound):
            shadows.get(work, "next")
