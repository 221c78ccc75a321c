"""Splits over a real database: what is collected, when a ramp goes on, what ends a split."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from app.catalog import files
from app.inference.splits import definition, judgement, service, store
from app.inference.splits.definition import CONTROL, SplitMetric
from app.inference.splits.rows import SplitState
from app.inference.splits.service import Splits
from app.inference.splits.table import SplitTable
from app.kernel import ids
from app.kernel.database import Database
from app.kernel.errors import Conflict, InvalidInput, NotFound
from app.workflows import registry
from app.workflows.language import definition as definitions
from app.workflows.runs import views
from app.workflows.runs.service import Runs
from app.workflows.runs.submission import Submission

MODEL, OTHER = "smollm2:135m", "gemma3:270m"
CALLS: dict[str, Any] = {
    "split": "smaller",
    "model": MODEL,
    "unit": "run",
    "candidates": [{"name": "b", "model": OTHER}],
    "goal": {"metric": "error", "effect": 0.1},
}
FLOW: dict[str, Any] = {"workflow": "report", "steps": [{"id": "wait", "kind": "wait", "for": "1h"}]}
_END = text("""
    INSERT INTO run (id, namespace, workflow, sha256, state, priority, rank, labels, inputs, finished_at, created_at,
                     paused, workflow_paused, depth, retention_s)
    SELECT :id, 'default', 'openai', :sha256, :state, 'interactive', 1, CAST(:labels AS jsonb), '{}', now(),
           now() - make_interval(secs => :seconds), false, false, 0, 3600
""")


@pytest.fixture
def splits(database: Database) -> Splits:
    return Splits(database, files.read_catalog)


def start(splits: Splits, database: Database, **changes: Any) -> Any:
    with database.work() as work:
        return splits.start(work, {**CALLS, **changes}, "ana")


def end_runs(database: Database, variant: str, count: int, *, failed: int = 0, seconds: float = 1.0) -> list[UUID]:
    """Write ended runs of a variant, as pools would."""
    definition = definitions.from_document(FLOW)
    made = [ids.new_id() for _ in range(count)]
    with database.work() as work:
        work.run(
            text("INSERT INTO definition (sha256, document) VALUES (:sha, CAST(:doc AS json)) ON CONFLICT DO NOTHING"),
            {"sha": definition.sha256(), "doc": json.dumps(definition.document())},
        )
        for at, id_ in enumerate(made):
            state = "failed" if at < failed else "succeeded"
            labels = json.dumps({"split.smaller": variant})
            values = {"id": id_, "sha256": definition.sha256(), "state": state, "labels": labels, "seconds": seconds}
            work.run(_END, values)
    return made


def test_outcomes_are_counted_once(splits: Splits, database: Database) -> None:
    started = start(splits, database)
    end_runs(database, CONTROL, 30, failed=3)
    end_runs(database, "b", 30, seconds=2.0)
    end_runs(database, "nobody", 5)

    assert splits.advance().outcomes == 60
    assert splits.advance().outcomes == 0
    with database.work() as work:
        found = store.samples(work, started.id)
        counts = store.quantiles(work, started.id)
    assert (found[CONTROL, SplitMetric.ERROR].units, found[CONTROL, SplitMetric.ERROR].mean) == (30, 0.1)
    assert (counts["b"].runs, counts["b"].failed) == (30, 0)
    assert counts["b"].seconds[0] == pytest.approx(2.0, abs=0.1)
    compared = judgement.evidence_of(definition.parse(started.definition), found, "b", SplitMetric.SECONDS).comparison
    assert compared.difference == pytest.approx(0.693, abs=0.1)


def test_a_candidate_that_fails_is_rolled_back(splits: Splits, database: Database) -> None:
    start(splits, database)
    end_runs(database, CONTROL, 60)
    end_runs(database, "b", 60, failed=30)

    done = splits.advance()

    (ended,) = done.ended
    assert (ended.state, ended.reason) == (SplitState.ROLLED_BACK, "b: error is 50.00%, of the control 0.00%")
    assert splits.get("smaller").state == SplitState.ROLLED_BACK
    assert splits.advance().ended == ()


@pytest.mark.parametrize(("failed", "guards"), [(2, {"error": 0.05}), (30, {"error": None})])
def test_a_candidate_within_its_guards_goes_on(
    splits: Splits, database: Database, failed: int, guards: dict[str, Any]
) -> None:
    start(splits, database, guards=guards)
    end_runs(database, CONTROL, 60, failed=1)
    end_runs(database, "b", 60, failed=failed)

    assert splits.advance().ended == ()


def test_a_slow_candidate_is_rolled_back(splits: Splits, database: Database) -> None:
    start(splits, database, guards={"seconds": 1.5})
    end_runs(database, CONTROL, 40, seconds=1.0)
    end_runs(database, "b", 40, seconds=4.0)

    (ended,) = splits.advance().ended
    assert ended.reason.startswith("b: seconds is 4")


def test_scores_count_also_when_they_come_later(splits: Splits, database: Database) -> None:
    started = start(splits, database, goal={"metric": "score", "effect": 0.1, "stop": True}, guards={})
    made = {variant: end_runs(database, variant, 40) for variant in (CONTROL, "b")}
    splits.advance()
    with database.work() as work:
        for number in range(40):
            noise = (number % 3) / 50
            assert store.set_score(work, made[CONTROL][number], "helpful", 0.4 + noise, "", "ana", 4)
            assert store.set_score(work, made["b"][number], "helpful", 0.9 - noise, "", "ana", 4)

    (ended,) = splits.advance().ended

    assert (ended.state, ended.reason) == (SplitState.DECIDED, "score: b is better")
    with database.work() as work:
        assert store.samples(work, started.id)["b", SplitMetric.SCORE].units == 40
        with pytest.raises(NotFound):
            store.set_score(work, ids.new_id(), "helpful", 1.0, "", "ana", 4)
        assert not store.set_score(work, made["b"][0], "other", 1.0, "", "ana", 1)


def test_a_ramp_waits_for_its_time_and_for_outcomes(splits: Splits, database: Database) -> None:
    ramp = [{"share": 0.1, "for": "1h"}, {"share": 0.5, "for": "1h"}, {"share": 1.0}]
    started = start(splits, database, ramp=ramp)
    later = text("UPDATE split SET stage_at = now() - interval '2 hours' WHERE id = :id")
    with database.work() as work:
        work.run(later, {"id": started.id})
    assert splits.advance().ramped == ()

    end_runs(database, CONTROL, 25)
    end_runs(database, "b", 25)
    assert splits.advance().ramped == ("smaller",)
    assert service.share_of(splits.get("smaller")) == 0.5
    assert splits.advance().ramped == ()
    with database.work() as work:
        splits.set_share(work, "smaller", 0.7)
        work.run(later, {"id": started.id})
    assert splits.advance().ramped == ()
    assert service.share_of(splits.get("smaller")) == 0.7


def test_what_divides_the_same_is_refused(splits: Splits, database: Database) -> None:
    start(splits, database, namespaces=["a"])
    with pytest.raises(Conflict, match="divides the same"):
        start(splits, database, split="second")
    start(splits, database, split="second", namespaces=["b"])
    with pytest.raises(Conflict, match="there is a split"):
        start(splits, database, namespaces=["c"])
    with pytest.raises(InvalidInput, match="there is no model"):
        start(splits, database, split="third", model="nobody:1b")
    with database.work() as work:
        with pytest.raises(Conflict, match="stop it first"):
            splits.remove(work, "smaller")
        splits.stop(work, "smaller", "enough")
        with pytest.raises(Conflict, match="has ended"):
            splits.stop(work, "smaller", "again")
        splits.remove(work, "smaller")
    with pytest.raises(NotFound):
        splits.get("smaller")


def test_a_rule_ends_the_splits_of_a_model(splits: Splits, database: Database) -> None:
    start(splits, database)
    with database.work() as work:
        assert service.roll_back(work, None, "embeddinggemma:300m", "slow", files.read_catalog()) == []
        assert service.roll_back(work, None, OTHER, "slow", files.read_catalog()) == ["smaller"]
    assert splits.get("smaller").reason == "slow"


def test_runs_of_a_workflow_are_divided(splits: Splits, database: Database, runs: Runs) -> None:
    registry.put(database, "report", definitions.from_document(FLOW))
    changed = {**FLOW, "steps": [{"id": "wait", "kind": "wait", "for": "2h"}]}
    registry.put(database, "report", definitions.from_document(changed))
    candidates = [{"name": "old", "version": 1}]
    start(splits, database, model=None, workflow="report", unit="user", candidates=candidates, ramp=[{"share": 0.5}])
    table = SplitTable(database)
    dividing = Runs(database, runs.publisher, runs.policy, assign=table.submission)
    newest = registry.get(database, "report")

    def submit(user: str, **more: Any) -> views.RunView:
        request = Submission(newest.definition, {}, newest.version, labels={"user": user}, newest=True)
        return views.run(database, dividing.submit(replace(request, **more)).id)

    found = {user: submit(user).run for user in (f"u{number}" for number in range(12))}
    assert {run.version for run in found.values()} == {1, 2}
    for user, run in found.items():
        assert run.labels["split.smaller"] == ("old" if run.version == 1 else CONTROL)
        again = submit(user).run
        assert (again.version, again.labels["split._unit"]) == (run.version, run.labels["split._unit"])
    named = submit("u1", newest=False).run
    assert (named.version, [name for name in named.labels if name.startswith("split.")]) == (2, [])
    once = submit("u2", idempotency_key="k").run
    assert submit("u2", idempotency_key="k").run.id == once.id


def test_labels_of_splits_are_their_own(runs: Runs) -> None:
    with pytest.raises(InvalidInput, match="labels that begin with"):
        runs.submit(Submission(definitions.from_document(FLOW), {}, labels={"split.smaller": "b"}))
