"""Expected times over HTTP: at the submission, of what is left, and deadlines that cannot be met."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest
from fastapi.testclient import TestClient

from app.api.services import Services
from app.inference.prediction import forecast as forecasts
from app.inference.prediction import store
from app.inference.prediction.forecast import Learned
from app.inference.prediction.history import StepSample, WorkflowHistory
from app.inference.prediction.learn import EndedRun, EndedStep, Knowledge, learn
from app.kernel.sections.predictions import PredictionSettings
from app.workflows.language import check
from app.workflows.language.source import SourceDocument

WAIT = {
    "workflow": "slow",
    "steps": [
        {"id": "first", "kind": "noop"},
        {"id": "rest", "kind": "workflow", "workflow": "other", "needs": ["first"]},
    ],
}


@pytest.fixture
def known(services: Services) -> None:
    """20 runs of the workflow took a minute."""
    knowledge, definition = Knowledge(WorkflowHistory()), check.check(SourceDocument(WAIT, {}))
    for _ in range(20):
        expected = forecasts.as_stored(forecasts.forecast(definition, Learned(knowledge.workflow), 2))
        rest = EndedStep("rest", True, samples=[StepSample(60.0)])
        learn(knowledge, EndedRun(2, 60.0, expected, [EndedStep("first", True, samples=[StepSample(0.0)]), rest]))
    with services.database.work() as work:
        store.write(work, {("workflow", "default", "slow"): knowledge.workflow.state()})


def submit(client: TestClient, **more: Any) -> Any:
    return client.post("/v1/runs", json={"definition": WAIT, **more})


@pytest.mark.usefixtures("known")
def test_a_run_has_its_expected_time_and_what_is_left(client: TestClient, services: Services) -> None:
    run = submit(client).json()
    assert run["expected"]["basis"] == "history"
    assert run["expected"]["seconds"] == pytest.approx(60, abs=1)
    assert run["expected"]["low"] <= 60 <= run["expected"]["high"]
    assert run["remaining"]["seconds"] == pytest.approx(60, abs=1)
    assert {step["key"]: round(step["expected"]["seconds"]) for step in run["steps"]} == {"first": 0, "rest": 60}

    client.post(f"/v1/runs/{run['id']}/cancel")
    ended = client.get(f"/v1/runs/{run['id']}").json()
    assert (ended["remaining"], ended["steps"][1]["expected"]) == (None, None)
    assert ended["expected"] == run["expected"], "the one of the submission stays"
    services.runs.cancel(UUID(run["id"]))


@pytest.mark.usefixtures("known")
def test_a_deadline_that_cannot_be_met_is_refused_with_what_was_predicted(client: TestClient) -> None:
    answer = submit(client, deadline="30s")

    assert answer.status_code == 422
    (problem,) = answer.json()["errors"]
    assert problem["where"] == "deadline"
    assert "30s cannot be met: the run is expected to take 1m" in problem["message"]
    assert "or more, no deadline" in problem["accepted"]
    assert client.get("/v1/runs").json()["runs"] == []
    assert submit(client, deadline="2m").json()["expected"]["warning"] is None


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize(("rule", "warns"), [("warn", True), ("ignore", False)])
def test_the_settings_say_what_happens_to_such_a_deadline(
    client: TestClient, services: Services, rule: Any, warns: bool
) -> None:
    services.settings = services.settings.model_copy(update={"predictions": PredictionSettings(deadlines=rule)})
    answer = submit(client, deadline="30s")

    assert answer.status_code == 202
    assert bool(answer.json()["expected"]["warning"]) is warns


def test_a_guess_refuses_nothing(client: TestClient) -> None:
    run = submit(client, deadline="1s").json()
    assert run["expected"]["basis"] == "defaults"
    assert run["expected"]["warning"].startswith("deadline: 1s will probably not be met")
