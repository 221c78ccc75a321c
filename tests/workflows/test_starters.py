"""The workflows that `arriero workflows new` writes, on the real small model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from app.cli.starters import workflows
from app.cli.starters.workflows import StarterKind
from app.workflows.runs.service import Runs
from tests.workflows.small_model import Pools, engine_of
from workers.engine.engine import LlamaEngine

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def engine() -> Iterator[LlamaEngine]:
    made = engine_of("smollm2:135m")
    yield made
    made.close()


@pytest.fixture
def pools(runs: Runs, engine: LlamaEngine) -> Iterator[Pools]:
    made = Pools(runs, {"model.smollm2-135m": engine})
    yield made
    made.close()


def test_generate(pools: Pools) -> None:
    run = pools.work(pools.worker.submit(workflows.text(StarterKind.GENERATE, "first")))

    assert run.state == "succeeded", run.error
    assert 0 < len(run.output["title"]) < 200
    assert len(run.output["text"]) > 40


def test_map(pools: Pools) -> None:
    run = pools.work(pools.worker.submit(workflows.text(StarterKind.MAP, "reviews")))

    assert run.state == "succeeded", run.error
    assert [verdict for _, verdict in run.output["verdicts"]] == ["good", "bad", "good"]
    assert run.output["verdicts"][0][0].startswith("The parcel")
    assert run.output["count"] == {"good": 2, "bad": 1}


def test_extract(pools: Pools) -> None:
    run = pools.work(pools.worker.submit(workflows.text(StarterKind.EXTRACT, "orders")))

    assert run.state == "succeeded", run.error
    assert set(run.output["order"]) == {"number", "customer", "city"}
    assert run.output["not_in_the_text"] == []
    assert run.output["order"]["number"] in {"2041", "2026"}, "a number of the text; which one, is the model's choice"


def test_refine(pools: Pools) -> None:
    run = pools.work(pools.worker.submit(workflows.text(StarterKind.REFINE, "orders")), others=True)

    assert run.state == "succeeded", run.error
    assert set(run.output["order"]) == {"number", "customer", "city"}
    assert (run.output["verification"] == "passed") is (run.output["score"] == 1.0)
    assert 1 <= run.output["rounds"] <= 4


def test_agent(pools: Pools) -> None:
    """The calls are forced by a grammar: the model's chat template has no tools."""
    text = (
        workflows.text(StarterKind.AGENT, "helper").replace("turns: 3", "turns: 2").replace("tokens: 400", "tokens: 48")
    )
    tool = "name: order, description: Looks up an order, http: {url: 'https://a.example'}"
    text = text.replace("- workflow: document-digest ", f"- {{{tool}}} #")
    run = pools.work(pools.worker.submit(text.replace("limits:", "tool_retry: {max_attempts: 1}\n    limits:")))

    assert run.state == "succeeded", run.error
    assert run.output["stopped_by"] in ("answer", "turns")
    turn, *_ = items = pools.worker.items(run.id, "agent")
    assert turn.kind == "turn"
    assert turn.output["finish_reason"] in ("stop", "length", "tool_calls")
    assert {item.input["tool"] for item in items if item.kind == "call"} <= {"order"}


@pytest.mark.parametrize("approved", [True, False])
def test_approve(pools: Pools, approved: bool) -> None:
    run_id = pools.worker.submit(workflows.text(StarterKind.APPROVE, "replies"))
    assert pools.work(run_id).state == "running", "it waits for a person"
    assert "Send this?" in pools.worker.step(run_id, "ok").awaits["message"]
    pools.worker.send_event(run_id, "ok", {"approved": approved})
    run = pools.work(run_id)

    assert run.state == "succeeded", run.error
    assert run.output["sent"] is approved
    assert bool(run.output["reply"]) is approved
