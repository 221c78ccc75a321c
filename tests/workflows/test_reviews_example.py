"""examples/reviews.yaml on the real small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.workflows.runs.service import Runs
from tests.workflows.small_model import Pools, engine_of

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_reviews_are_judged_right_and_the_letter_waits_for_a_person(runs: Runs) -> None:
    engine = engine_of("smollm2:135m")
    pools = Pools(runs, {"model.smollm2-135m": engine})
    inputs = json.loads((EXAMPLES / "reviews.json").read_text())
    run_id = pools.worker.submit((EXAMPLES / "reviews.yaml").read_text(), **inputs)
    assert pools.work(run_id).state == "running"
    pools.worker.send_event(run_id, "publish", {"approved": True})
    run = pools.work(run_id)
    pools.close()
    engine.close()

    assert run.state == "succeeded", run.error
    assert run.output["verdicts"] == ["good", "bad", "good"]
    assert run.output["published"] is True
