"""The real-estate workflows, with real models, the worker's code and its child processes."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from app.catalog import files
from app.real_estate import statements
from app.workflows import registry
from app.workflows.runs.service import Runs
from app.workflows.runs.submission import Submission
from benchmarks import real_estate_data
from tests.workflows.conftest import StepWorker
from tests.workflows.small_model import Pools, engine_of
from workers.engine.engine import LlamaEngine

EXAMPLES = Path(__file__).parents[2] / "examples/real-estate"
SMALL, GEMMA = "smollm2:135m", "gemma3:270m"


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, LlamaEngine]]:
    folder = tmp_path_factory.mktemp("gemma")
    files.pull(files.read_catalog().get(GEMMA), folder, lambda _: None)
    made = {"model.smollm2-135m": engine_of(SMALL), "model.gemma3-270m": engine_of(GEMMA, folder)}
    yield made
    for engine in made.values():
        engine.close()


@pytest.fixture
def pools(runs: Runs, engines: dict[str, LlamaEngine]) -> Iterator[Pools]:
    made = Pools(runs, engines)
    yield made
    made.close()


def submitted(runs: Runs, name: str, **inputs: Any) -> UUID:
    found = registry.shipped()[f"real-estate-{name}"]
    return runs.submit(Submission(found.definition, inputs, found.version)).id


def read(name: str) -> str:
    return (EXAMPLES / name).read_text()


@pytest.mark.slow
def test_a_valuation_cites_comparables_of_the_table(pools: Pools) -> None:
    subject = json.loads(read("subject.json"))
    run = pools.work(submitted(pools.worker.runs, "valuation", sales=read("sales.csv"), subject=subject), others=True)

    assert run.state == "succeeded", run.error
    found = run.output
    truth = real_estate_data.sales(1, 401)[-1]["price"]
    assert 0.7 * truth < found["low"] < found["estimate"] < found["high"] < 1.4 * truth
    ids = {one["id"] for one in found["comparables"]}
    assert len(ids) == 6
    assert all(f"\n{one}," in read("sales.csv") for one in ids)
    figures = found["figures"]
    checked = statements.check_text(found["reasoning"], figures["facts"], figures["cite"], 2)
    assert checked["passed"], (found["reasoning"], checked)
    assert found["reasoning_by"] in ("model", "code")


@pytest.mark.slow
def test_a_market_comment_states_the_figures(pools: Pools) -> None:
    run = pools.work(submitted(pools.worker.runs, "market", series=read("prices.csv"), horizon=6), others=True)

    assert run.state == "succeeded", run.error
    found = run.output
    assert [one["month"] for one in found["months"]] == [f"2021-{month:02d}" for month in range(1, 7)]
    assert found["backtest"]["better_than_naive"]
    last = found["months"][-1]
    facts = [f"{last['value']:,}", f"{abs(found['trend']['year_percent'])} %"]
    assert any(fact in found["comment"] for fact in facts)


@pytest.mark.slow
def test_a_lead_is_graded_by_what_it_wrote(pools: Pools) -> None:
    lead = real_estate_data.leads(5, 1)[0]
    run = pools.work(
        submitted(pools.worker.runs, "lead", conversation=lead.conversation, asking_price=lead.asking_price)
    )

    assert run.state == "succeeded", run.error
    said = " ".join(message["text"] for message in lead.conversation if message["sender"] == "lead")
    found = run.output
    evidence = [factor["evidence"] for factor in found["factors"] if factor["evidence"]]
    assert evidence
    assert all(quote in said for quote in evidence)
    assert found["score"] == pytest.approx(sum(factor["points"] for factor in found["factors"]), abs=0.5)
    assert found["grade"] in "ABCD"


@pytest.mark.slow
def test_a_lease_is_read_from_its_pdf_and_a_person_decides_its_doubts(pools: Pools) -> None:
    paper = next(one for one in real_estate_data.papers(3, 3) if one.kind == "lease")
    pdf = base64.b64encode((EXAMPLES / "lease.pdf").read_bytes()).decode()
    run_id = submitted(pools.worker.runs, "document", pdf=pdf, doubt=1)
    pools.work(run_id)
    worker: StepWorker = pools.worker
    assert worker.step(run_id, "look").output == "person", "nothing is certain enough"
    asked = worker.step(run_id, "approve").awaits["message"]
    worker.send_event(run_id, "approve", {"approved": True, "comment": "as in the file"})
    run = pools.work(run_id)

    assert (run.state, run.output["status"], run.output["kind"]) == ("succeeded", "approved", "lease")
    lines = [line for page in paper.pages for line in page]
    fields = run.output["fields"]
    for name, field in fields.items():
        if field["confidence"] >= 0.8:
            assert field["value"] == paper.truth[name], (name, field)
        assert field["quote"] in lines if field["value"] is not None else field["confidence"] == 0
        assert name in asked
    assert (fields["rent"]["value"], fields["deposit"]["value"]) == (1600, None)


@pytest.mark.slow
def test_a_reply_has_facts_of_the_record_and_is_sent_only_after_an_approval(pools: Pools) -> None:
    record = {"address": "12 Alder Street", "price": "485,000", "viewing": "2026-12-03", "client": "Ana Prado"}
    run_id = submitted(
        pools.worker.runs, "reply", message="Guten Tag, ist das Haus noch zu haben und was kostet es?", record=record
    )
    pools.work(run_id, others=True)
    worker: StepWorker = pools.worker
    asked = worker.step(run_id, "approve").awaits["message"]
    assert asked.startswith("Send this in German?")
    assert worker.run(run_id).state == "running", "nothing is decided yet"
    worker.send_event(run_id, "approve", {"approved": False})
    run = pools.work(run_id)

    assert (run.state, run.output["status"], run.output["language"]) == ("succeeded", "rejected", "de")
    assert run.output["reply"] in asked
    facts = worker.step(run_id, "facts").output["facts"]
    assert statements.check_text(run.output["reply"], facts, language="de", tone="formal")["passed"]
