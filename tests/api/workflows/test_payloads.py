"""Long inputs and outputs over HTTP."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from fastapi.testclient import TestClient

from app.api.main import serve
from app.api.services import Services
from app.kernel.sections.servers import ApiSettings
from app.kernel.settings import Settings
from app.workflows.runs.service import Runs
from app.workflows.runs.storage.payloads import PayloadLimits, as_json
from tests.workflows.conftest import StepWorker

FLOW = """
workflow: flow
inputs: {words: {}}
defaults: {model: "smollm2:135m"}
steps:
  - {id: each, kind: map, over: inputs.words, step: {kind: generate, prompt: "{{ item }}"}}
  - {id: short, kind: generate, prompt: hi}
  - {id: ok, kind: wait, needs: [each], event: go}
"""
FLOW_OF_ONE = {"workflow": "one", "inputs": {"words": {}}, "steps": [{"id": "only", "kind": "noop"}]}
WORDS = ["a", {"z": "é" * 300, "a": [1.0, None]}, "c"]


@pytest.fixture
def services(services: Services, runs: Runs, tmp_path: Path) -> Services:
    """An API with small limits: few bytes inline in answers, and few in the rows of runs."""
    settings = Settings(data_dir=tmp_path, api=ApiSettings(max_inline_bytes=500))
    small = replace(runs, policy=replace(runs.policy, limits=PayloadLimits(inline=100, one=4000)))
    return replace(services, settings=settings, runs=small)


@pytest.fixture
def client(services: Services) -> TestClient:
    return TestClient(serve(services), base_url="http://localhost", raise_server_exceptions=False)


def submit(client: TestClient, words: Any) -> Any:
    return client.post("/v1/runs", json={"definition": FLOW, "inputs": {"words": words}})


def get(client: TestClient, path: str) -> Any:
    answer = client.get(path)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_long_value_is_replaced_by_a_reference(client: TestClient, services: Services) -> None:
    run_id = submit(client, WORDS).json()["id"]
    base = f"/v1/runs/{run_id}"
    assert client.get(f"{base}/output").status_code == 404
    worker = StepWorker(services.runs)
    worker.work(each=lambda claim: claim.data["item"], short="s")
    worker.send_event(UUID(run_id), "go", "x" * 600)
    run, page = get(client, base), get(client, f"{base}/steps/each/items")

    def marked(value: Any, path: str) -> dict[str, Any]:
        assert client.get(path).text == as_json(value), "byte for byte"
        return {"$payload": {"bytes": len(as_json(value).encode()), "href": path}}

    outputs = {"short": "s", "ok": "x" * 600}
    assert run["state"] == "succeeded"
    assert run["inputs"] == marked({"words": WORDS}, f"{base}/inputs")
    assert run["output"] == marked(outputs, f"{base}/output")
    assert {step["key"]: step["output"] for step in run["steps"]} == {
        "each": None,
        "short": "s",
        "ok": marked("x" * 600, f"{base}/steps/ok/output"),
    }
    item = f"{base}/steps/each%5B1%5D"
    assert [one["input"] for one in page["items"]] == ["a", marked(WORDS[1], f"{item}/input"), "c"]
    assert [one["output"] for one in page["items"]] == ["a", marked(WORDS[1], f"{item}/output"), "c"]
    assert client.get(f"{base}/steps/each/output").text == as_json(WORDS)
    assert client.get("/v1/runs").json()["runs"][0]["id"] == run_id


@pytest.mark.parametrize("path", ["steps/none/output", "steps/short/output", "steps/short/input", "steps/each/output"])
def test_missing_values_are_not_found(client: TestClient, path: str) -> None:
    run_id = submit(client, WORDS).json()["id"]

    assert client.get(f"/v1/runs/{run_id}/{path}").status_code == 404


def test_the_output_of_an_empty_map_is_an_empty_list(client: TestClient, services: Services) -> None:
    run_id = submit(client, []).json()["id"]
    StepWorker(services.runs).work()

    assert json.loads(client.get(f"/v1/runs/{run_id}/steps/each/output").text) == []


def test_too_long_values_are_rejected(client: TestClient) -> None:
    rejected = submit(client, "x" * 5000)
    assert rejected.status_code == 413
    assert "inputs: 5012 bytes as JSON; at most 4000 can be stored" in rejected.json()["detail"]

    run_id = submit(client, []).json()["id"]
    sent = client.post(f"/v1/runs/{run_id}/events", json={"name": "go", "payload": "x" * 5000})
    assert (sent.status_code, sent.json()["type"]) == (413, "urn:arriero:error:payload-too-large")


def test_a_body_of_60_mb_is_stored_and_shown(services: Services, runs: Runs, tmp_path: Path) -> None:
    """With a raised `api.max_body_bytes`: payloads have no lower limit."""
    raised = Settings(data_dir=tmp_path, api=ApiSettings(max_body_bytes=70 * 2**20))
    client = TestClient(serve(replace(services, settings=raised, runs=runs)), base_url="http://localhost")
    body = {"definition": FLOW_OF_ONE, "inputs": {"words": "llama " * 10 * 2**20}}

    answer = client.post("/v1/runs", json=body)

    assert answer.status_code == 202, answer.text[:1000]
    assert client.get(f"{answer.headers['Location']}/inputs").json() == body["inputs"]
