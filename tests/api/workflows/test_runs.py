"""Runs over HTTP."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest
from fastapi.testclient import TestClient

from app.api.services import Services
from app.kernel.errors import FailureReason
from app.workflows.state_machine.outcomes import Failure, Success, TokenUsage

NOOP = {"workflow": "rest", "steps": [{"id": "a", "kind": "noop"}]}
GREET = {
    "workflow": "greet",
    "inputs": {"name": {"type": "string", "minLength": 1}},
    "steps": [{"id": "say", "kind": "generate", "model": "smollm2:135m", "prompt": "Greet {{ inputs.name }}."}],
}


def submit(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/runs", json=body)


def problems(answer: Any) -> list[str]:
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["status"] == answer.status_code
    return [item["where"] for item in answer.json()["errors"]]


def stored_runs(client: TestClient) -> int:
    return len(client.get("/v1/runs").json()["runs"])


def test_a_run_is_accepted_and_found_again(client: TestClient) -> None:
    answer = submit(client, definition=GREET, inputs={"name": "Ada"})

    assert answer.status_code == 202
    run = answer.json()
    assert answer.headers["location"] == f"/v1/runs/{run['id']}"
    assert (run["state"], run["workflow"], run["version"]) == ("queued", "greet", None)
    assert [(step["key"], step["state"], step["attempt"]) for step in run["steps"]] == [("say", "ready", 1)]
    assert client.get(f"/v1/runs/{run['id']}").json() == run


def test_a_finished_run_shows_its_attempts_times_and_tokens(client: TestClient, services: Services) -> None:
    run = submit(client, definition=GREET, inputs={"name": "Ada"}).json()
    taken = services.runs.claim(UUID(run["steps"][0]["id"]), 1, "w")
    assert taken is not None
    services.runs.succeed(taken, "w", Success("Hello Ada", TokenUsage(12, 4)))

    found = client.get(f"/v1/runs/{run['id']}").json()
    assert found["state"] == "succeeded"
    assert found["output"] == {"say": "Hello Ada"}
    assert (found["tokens_in"], found["tokens_out"]) == (12, 4)
    assert found["steps"][0]["attempts"][0]["outcome"] == "succeeded"
    assert found["steps"][0]["took_s"] >= 0


def test_text_that_breaks_the_schema_is_kept_for_inspection(client: TestClient, services: Services) -> None:
    run = submit(client, definition=GREET, inputs={"name": "Ada"}).json()
    taken = services.runs.claim(UUID(run["steps"][0]["id"]), 1, "w")
    assert taken is not None
    services.runs.fail(taken, "w", Failure(FailureReason.INVALID_OUTPUT, "no JSON", text="Sure! Here is"))

    tried = client.get(f"/v1/runs/{run['id']}").json()["steps"][0]["attempts"][0]
    assert (tried["outcome"], tried["text"]) == ("invalid_output", "Sure! Here is")


def test_the_same_key_returns_the_same_run_and_other_content_conflicts(client: TestClient) -> None:
    headers = {"Idempotency-Key": "order-7"}
    first = client.post("/v1/runs", json={"definition": NOOP}, headers=headers)
    second = client.post("/v1/runs", json={"definition": NOOP}, headers=headers)
    other = client.post("/v1/runs", json={"definition": NOOP, "priority": "batch"}, headers=headers)

    assert (first.status_code, second.status_code, other.status_code) == (202, 200, 409)
    assert first.json()["id"] == second.json()["id"]
    assert first.json()["id"] in other.json()["detail"]
    assert stored_runs(client) == 1


def test_a_run_of_a_named_workflow_uses_the_newest_version(client: TestClient) -> None:
    client.put("/v1/workflows/rest", json=NOOP)
    newer = {**NOOP, "description": "again"}
    client.put("/v1/workflows/rest", json=newer)

    assert submit(client, workflow="rest").json()["version"] == 2
    assert submit(client, workflow="rest", version=1).json()["version"] == 1
    assert submit(client, workflow="rest", version=3).status_code == 404


def test_yaml_is_accepted(client: TestClient) -> None:
    text = "definition:\n  workflow: rest\n  steps:\n    - {id: a, kind: noop}\n"
    answer = client.post("/v1/runs", content=text, headers={"Content-Type": "application/yaml"})

    assert answer.status_code == 202


def test_pages_go_from_the_newest_to_the_oldest_without_gaps(client: TestClient) -> None:
    made = [submit(client, definition=NOOP).json()["id"] for _ in range(5)]
    first = client.get("/v1/runs", params={"limit": 2}).json()
    second = client.get("/v1/runs", params={"limit": 2, "cursor": first["next_cursor"]}).json()
    third = client.get("/v1/runs", params={"limit": 2, "cursor": second["next_cursor"]}).json()

    listed = [run["id"] for page in (first, second, third) for run in page["runs"]]
    assert listed == made[::-1]
    assert third["next_cursor"] is None


def test_lists_are_filtered(client: TestClient) -> None:
    cancelled = submit(client, definition=NOOP).json()["id"]
    submit(client, definition=GREET, inputs={"name": "x"})
    client.post(f"/v1/runs/{cancelled}/cancel")

    only = client.get("/v1/runs", params={"state": "cancelled"}).json()["runs"]
    assert [(run["id"], run["steps"], run["steps_succeeded"]) for run in only] == [(cancelled, 1, 0)]
    assert len(client.get("/v1/runs", params={"workflow": "greet"}).json()["runs"]) == 1
    assert client.get("/v1/runs", params={"state": "done"}).status_code == 422


def test_a_cancelled_run_stays_cancelled(client: TestClient) -> None:
    run = submit(client, definition=NOOP).json()["id"]

    assert client.post(f"/v1/runs/{run}/cancel").json() == {"id": run, "state": "cancelled"}
    assert client.post(f"/v1/runs/{run}/cancel").status_code == 202


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({}, ["workflow"]),
        ({"workflow": "a", "definition": NOOP}, ["workflow"]),
        ({"definition": NOOP, "version": 1}, ["version"]),
        ({"definition": NOOP, "input": {}}, ["input"]),
        ({"definition": NOOP, "priority": "urgent"}, ["priority"]),
        ({"definition": NOOP, "inputs": []}, ["inputs"]),
        ({"definition": GREET}, ["inputs.name"]),
        ({"definition": GREET, "inputs": {"name": ""}}, ["inputs.name"]),
        ({"definition": GREET, "inputs": {"name": 5}}, ["inputs.name"]),
        ({"definition": GREET, "inputs": {"name": "x", "nam": "y"}}, ["inputs.nam"]),
        (
            {"definition": {"workflow": "x", "steps": [{"id": "a", "kind": "noop", "needs": ["b"]}]}},
            ["steps[0].needs[0]"],
        ),
    ],
)
def test_invalid_submissions_name_the_field_and_store_nothing(client: TestClient, body: Any, where: list[str]) -> None:
    answer = submit(client, **body)

    assert answer.status_code == 422
    assert problems(answer) == where
    assert stored_runs(client) == 0


def test_malformed_bodies_are_rejected_with_their_line(client: TestClient) -> None:
    answer = client.post("/v1/runs", content='{"definition": \n {]}', headers={"Content-Type": "application/json"})

    assert answer.status_code == 422
    assert answer.json()["errors"][0]["line"] == 2


def test_a_body_of_another_media_type_is_rejected(client: TestClient) -> None:
    answer = client.post("/v1/runs", content="<run/>", headers={"Content-Type": "text/xml"})

    assert answer.status_code == 415
    assert "application/yaml" in answer.text


@pytest.mark.parametrize("declared", [True, False])
def test_bodies_over_the_limit_are_rejected(client: TestClient, declared: bool) -> None:
    big = b" " * (64 * 1024 + 1)
    content = big if declared else iter([big[:40_000], big[40_000:]])
    answer = client.post("/v1/runs", content=content, headers={"Content-Type": "application/json"})

    assert answer.status_code == 413
    assert "65536 bytes" in answer.json()["detail"]


@pytest.mark.parametrize(
    "path", ["/v1/runs/00000000-0000-7000-8000-000000000000", "/v1/workflows/nothing", "/v1/catalog/no"]
)
def test_unknown_resources_are_not_found(client: TestClient, path: str) -> None:
    answer = client.get(path)

    assert answer.status_code == 404
    problems(answer)


def test_an_invalid_id_is_rejected(client: TestClient) -> None:
    assert problems(client.get("/v1/runs/seven")) == ["path.run_id"]


def test_an_unknown_path_is_a_problem_too(client: TestClient) -> None:
    assert client.get("/v2/runs").json()["type"] == "urn:arriero:error:http"


def test_a_run_is_found_by_the_beginning_or_the_end_of_its_id(client: TestClient) -> None:
    ids = [client.post("/v1/runs", json={"definition": NOOP}).json()["id"] for _ in range(2)]

    assert client.get(f"/v1/runs/{ids[0][-8:]}").json()["id"] == ids[0]
    assert client.get(f"/v1/runs/{ids[1][:-1].upper()}").json()["id"] == ids[1]
    assert client.post(f"/v1/runs/{ids[0][-8:]}/cancel").json()["id"] == ids[0]
    both = client.get(f"/v1/runs/{ids[0][:4]}")
    assert (both.status_code, all(one in both.json()["detail"] for one in ids)) == (409, True)
    assert client.get("/v1/runs/0000").status_code == 404
    for wrong in ("abc", "xyzw", "%20%20%20%20", "a" * 33, "a" * 37, "----", "-a-b-c-", "-" * 36):
        answer = client.get(f"/v1/runs/{wrong}")
        assert (answer.status_code, answer.json()["errors"][0]["where"]) == (422, "path.run_id"), wrong


def test_another_model_is_used_and_kept_by_forks(client: TestClient, services: Services) -> None:
    run = submit(client, definition=GREET, inputs={"name": "Ada"}, models={"*": "qwen3:4b"}).json()
    assert run["steps"][0]["model"] == "qwen3:4b"
    named = submit(client, workflow="support-triage", inputs={"message": "hi"}, models={"topic": "qwen3:0.6b"}).json()
    assert named["version"] is None, "it is not that version"
    used = {step["key"]: step["model"] for step in named["steps"] if step["model"]}
    assert used.pop("topic") == "qwen3:0.6b"
    assert "qwen3:0.6b" not in used.values()

    services.runs.cancel(UUID(run["id"]))
    fork = client.post(f"/v1/runs/{run['id']}/fork", json={"from": "say", "inputs": {"name": "Eva"}}).json()
    assert fork["steps"][0]["model"] == "qwen3:4b"


def test_a_key_with_other_models_is_another_request(client: TestClient) -> None:
    def send(**body: Any) -> Any:
        given = {"workflow": "support-triage", "inputs": {"message": "hi"}, **body}
        return client.post("/v1/runs", json=given, headers={"Idempotency-Key": "k"})

    first = send(models={"topic": "qwen3:0.6b"})
    assert first.status_code == 202
    assert send(models={"topic": "qwen3:0.6b"}).json()["id"] == first.json()["id"]
    assert send(models={"topic": "qwen3:4b"}).status_code == 409
    assert send().status_code == 409


def test_another_model_is_checked_as_in_the_file(client: TestClient) -> None:
    text = 'workflow: greet\nsteps:\n  - id: say\n    kind: generate\n    prompt: "hi"\n    max_tokens: 4000\n'
    found = submit(client, definition=text, models={"say": "qwen3:4"}).json()
    assert found["errors"][0]["where"] == "steps[0].model"
    assert "did you mean 'qwen3:4b'?" in found["errors"][0]["accepted"]
    found = submit(client, definition=text, models={"*": "smollm2:135m"}).json()
    assert "4000 tokens do not fit in the context of 'smollm2:135m'" in found["errors"][0]["message"]
    assert found["errors"][0]["line"] == 6
    assert submit(client, definition=text, models={"*": "qwen3:4b"}).status_code == 202, "the file names no model"
    assert problems(submit(client, definition=GREET, inputs={"name": "A"}, models={"other": "x:1"})) == ["models.other"]


def test_lists_are_bounded_by_the_time_of_submission(client: TestClient) -> None:
    made = submit(client, definition=NOOP).json()
    before, after = "2020-01-01T00:00:00Z", made["created_at"]

    def listed(**times: str) -> list[str]:
        answer = client.get("/v1/runs", params=times)
        assert answer.status_code == 200, answer.text
        return [run["id"] for run in answer.json()["runs"]]

    assert listed(created_after=before) == listed(created_after=after) == [made["id"]]
    assert listed(created_before=before) == listed(created_before=after) == []
    assert listed(created_after="0001-01-01T00:00:00+14:00", created_before="9999-12-31T23:59:59Z") == [made["id"]]
    assert listed(created_after="9999-12-31T23:59:59Z") == listed(created_before="0001-01-01T00:00:00Z") == []
    assert client.get("/v1/runs", params={"created_after": "2026-01-01T00:00:00"}).status_code == 422, "no time zone"


def test_a_prompt_is_that_of_its_step(client: TestClient) -> None:
    steps = [
        {
            "id": "ask",
            "kind": "generate",
            "model": "smollm2:135m",
            "system": "Be short.",
            "prompt": "Hi {{ inputs.a }}",
        },
        {"id": "end", "kind": "noop", "needs": ["ask"]},
    ]
    body = {"definition": {"workflow": "w", "inputs": {"a": {"type": "string"}}, "steps": steps}, "inputs": {"a": "Al"}}
    run = submit(client, **body).json()["id"]
    found = client.get(f"/v1/runs/{run}/steps/ask/prompt").json()
    assert [(one["role"], one["content"]) for one in found["messages"]] == [("system", "Be short."), ("user", "Hi Al")]
    assert found["prompt"] is None
    for key, status in (("end", 404), ("nothing", 404), ("x" * 81, 422)):
        assert client.get(f"/v1/runs/{run}/steps/{key}/prompt").status_code == status
