"""Control of runs and events over HTTP."""

from __future__ import annotations

import json
from typing import Any
from uuid import UUID

import pytest
from fastapi.testclient import TestClient

from app.api.services import Services
from tests.workflows.conftest import StepWorker, failure

FLOW = """
workflow: flow
labels: {team: red}
inputs: {words: {type: array, default: [a, b, c]}}
defaults: {model: "smollm2:135m"}
steps:
  - {id: each, kind: map, over: inputs.words, max_parallel: 2, step: {kind: generate, prompt: "{{ item }}"}}
  - {id: last, kind: generate, prompt: hi, needs: [each], retry: {max_attempts: 1}}
  - {id: ok, kind: wait, needs: [last], approval: {message: "{{ steps.last.output }}?"}, expires: 1h}
"""


@pytest.fixture
def worker(services: Services) -> StepWorker:
    """A worker next to the API."""
    return StepWorker(services.runs)


def submit(client: TestClient, **more: Any) -> str:
    answer = client.post("/v1/runs", json={"definition": FLOW, **more})
    assert answer.status_code == 202, answer.text
    run_id: str = answer.json()["id"]
    return run_id


def get(client: TestClient, path: str) -> Any:
    answer = client.get(path)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_labels_priority_and_times_of_a_submission_are_kept(client: TestClient) -> None:
    run_id = submit(client, labels={"by": "ana"}, priority="batch", rank=0, deadline="1h", retention="2d")
    run = get(client, f"/v1/runs/{run_id}")

    assert (run["labels"], run["priority"], run["rank"]) == ({"team": "red", "by": "ana"}, "batch", 0)
    assert run["deadline_at"] is not None
    assert [r["id"] for r in get(client, "/v1/runs?label=by=ana&label=team=red")["runs"]] == [run_id]
    assert get(client, "/v1/runs?label=by=ben")["runs"] == []
    assert client.get("/v1/runs?label=by").status_code == 422


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"a": "x" * 501}, "labels.a (line 1): String should have at most 500 characters"),
        ({"a" * 64: "x"}, "labels." + "a" * 64),
        ({f"a{n}": "x" for n in range(33)}, "labels (line 1): Dictionary should have at most 32 items"),
    ],
    ids=["a long value", "a long name", "too many"],
)
def test_labels_of_a_submission_are_bounded(client: TestClient, labels: dict[str, str], message: str) -> None:
    answer = client.post("/v1/runs", json={"workflow": "flow", "labels": labels})

    assert answer.status_code == 422
    assert message in answer.json()["detail"]


def test_items_of_a_map_are_listed_by_page_and_state(client: TestClient, worker: StepWorker) -> None:
    run_id = submit(client)
    worker.work(UUID(run_id), each=lambda claim: failure("context_exceeded") if claim.data["item"] == "b" else "x")
    base = f"/v1/runs/{run_id}/steps/each/items"

    first = get(client, f"{base}?limit=2")
    assert [(item["index"], item["input"]) for item in first["items"]] == [(0, "a"), (1, "b")]
    assert [item["index"] for item in get(client, f"{base}?first={first['next_first']}")["items"]] == [2]
    failed = get(client, f"{base}?state=failed")["items"]
    assert [(item["key"], item["error"]["reason"]) for item in failed] == [("each[1]", "context_exceeded")]
    assert client.get(f"/v1/runs/{run_id}/steps/nothing/items").json()["detail"].endswith("there are: each")


def test_a_run_is_paused_resumed_and_receives_events(client: TestClient, worker: StepWorker) -> None:
    run_id = submit(client)
    base = f"/v1/runs/{run_id}"
    assert client.post(f"{base}/pause").json() == {"id": run_id, "paused": True, "changed": True}
    worker.work()
    assert get(client, base)["paused"]
    assert client.post(f"{base}/pause").json()["changed"] is False
    client.post(f"{base}/resume")
    worker.work(last="send it")
    assert get(client, base)["steps"][2]["awaits"] == {"event": "ok", "message": "send it?"}

    wrong = client.post(f"{base}/events", json={"name": "ok", "payload": {"approved": "yes"}})
    assert (wrong.status_code, wrong.json()["errors"][0]["where"]) == (422, "payload.approved")
    assert client.post(f"{base}/events", json={"name": "no"}).status_code == 404
    sent = client.post(
        f"{base}/events", json={"name": "ok", "payload": {"approved": True}}, headers={"Idempotency-Key": "k"}
    )
    assert (sent.status_code, sent.json()["answered"]) == (202, "ok")
    again = client.post(
        f"{base}/events", json={"name": "ok", "payload": {"approved": True}}, headers={"Idempotency-Key": "k"}
    )
    assert again.status_code in (200, 409)

    page = get(client, f"{base}/events?limit=3")
    assert [entry["event"] for entry in page["events"]][:2] == ["submitted", "ready"]
    rest = get(client, f"{base}/events?after={page['next_after']}")["events"]
    assert rest[-1]["event"] == "succeeded"

    with client.stream("GET", f"{base}/events", headers={"Accept": "text/event-stream"}) as stream:
        text = "".join(stream.iter_text())
    told_ids = [int(line[4:]) for line in text.splitlines() if line.startswith("id: ")]
    assert told_ids == [entry["id"] for entry in page["events"] + rest]
    last = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")][-1]
    assert (last["event"], last["step"]) == ("succeeded", None)
    with client.stream(
        "GET", f"{base}/events", headers={"Accept": "text/event-stream", "Last-Event-ID": str(told_ids[-2])}
    ) as stream:
        assert "".join(stream.iter_text()).count("id: ") == 1


def test_a_run_is_retried_and_forked(client: TestClient, worker: StepWorker) -> None:
    run_id = submit(client)
    base = f"/v1/runs/{run_id}"
    assert client.post(f"{base}/retry").status_code == 409
    worker.work(last=failure())
    assert client.post(f"{base}/retry").json() == {"id": run_id, "state": "running"}
    worker.work(last="fine")
    client.post(f"{base}/events", json={"name": "ok", "payload": {"approved": True}})

    forked = client.post(f"{base}/fork", json={"from": "last", "inputs": {"words": ["z"]}})
    assert (forked.status_code, forked.json()["forked_from"]) == (202, run_id)
    assert [step["state"] for step in forked.json()["steps"]] == ["succeeded", "ready", "pending"]
    assert client.post(f"{base}/fork", json={"from": "nothing"}).status_code == 404
    assert client.post(f"{base}/fork", json={"step": "last"}).status_code == 422


def test_a_step_and_many_runs_are_cancelled(client: TestClient) -> None:
    first, second = submit(client), submit(client, labels={"team": "blue"})
    answer = client.post(f"/v1/runs/{first}/steps/each/cancel")
    assert (answer.status_code, answer.json()) == (202, {"key": "each", "state": "cancelled"})
    assert client.post(f"/v1/runs/{first}/steps/nothing/cancel").status_code == 404

    assert client.post("/v1/bulk/cancel", json={"labels": {"team": "blue"}}).json()["done"] == [second]
    assert client.post("/v1/bulk/retry", json={"states": ["cancelled"]}).json()["done"] == [second]
    assert client.post("/v1/bulk/cancel", json={"status": "failed"}).status_code == 422


def test_a_workflow_is_paused(client: TestClient) -> None:
    submit(client)
    assert client.post("/v1/workflows/flow/pause").json() == {"name": "flow", "paused": True, "runs": 1}
    assert get(client, f"/v1/runs/{submit(client)}")["paused"]
    assert client.post("/v1/workflows/flow/resume").json()["runs"] == 2


def test_a_state_that_does_not_allow_an_action_is_named_in_words(client: TestClient) -> None:
    run_id = submit(client)

    answer = client.post(f"/v1/runs/{run_id}/retry")
    assert (answer.status_code, answer.json()["detail"]) == (
        409,
        f"run {run_id} is queued; that state does not allow: retry requested",
    )


def test_only_the_chosen_runs_are_changed(client: TestClient, worker: StepWorker) -> None:
    definition = {"workflow": "w", "steps": [{"id": "a", "kind": "noop"}]}
    first, second = (client.post("/v1/runs", json={"definition": definition}).json()["id"] for _ in range(2))
    answer = client.post("/v1/bulk/cancel", json={"ids": [first]}).json()
    assert (answer["done"], answer["more"]) == ([first], False)
    assert client.get(f"/v1/runs/{second}").json()["state"] == "queued"
    assert client.post("/v1/bulk/cancel", json={"ids": []}).json()["done"] == []
    assert client.post("/v1/bulk/cancel", json={"ids": [first] * 1001}).status_code == 422
