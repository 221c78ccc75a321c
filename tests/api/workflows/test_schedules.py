"""Schedules over HTTP."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest
from fastapi.testclient import TestClient

REST = {
    "workflow": "rest",
    "inputs": {"day": {"type": "string", "default": ""}},
    "steps": [{"id": "a", "kind": "noop"}],
}
NIGHTLY = {
    "schedule": "nightly",
    "workflow": "rest",
    "cron": "30 2 * * *",
    "timezone": "Europe/Berlin",
    "inputs": {"day": "{{ fire.date }}"},
    "labels": {"team": "ops"},
}
YAML = "schedule: nightly\nworkflow: rest\ncron: '30 2 * * *'\ninputs:\n  day: 5\n"


@pytest.fixture(autouse=True)
def rest(client: TestClient) -> None:
    client.put("/v1/workflows/rest", json=REST)


def put(client: TestClient, **changes: Any) -> Any:
    return client.put("/v1/schedules/nightly", json=NIGHTLY | changes)


def test_a_schedule_is_stored_replaced_listed_and_removed(client: TestClient) -> None:
    first = put(client)
    assert first.status_code == 201
    made = first.json()
    assert (made["state"], made["trigger"], made["last_fire"], made["last_run"]) == ("active", "30 2 * * *", None, None)
    assert made["schedule"] == NIGHTLY
    assert made["next"]["at"][10:16] == "T02:30"

    second = put(client, every="15m", cron=None)
    assert (second.status_code, second.json()["trigger"]) == (200, "every 15m")
    assert client.get("/v1/schedules").json()["schedules"] == [client.get("/v1/schedules/nightly").json()]

    assert client.delete("/v1/schedules/nightly").status_code == 204
    assert client.get("/v1/schedules/nightly").status_code == 404
    assert client.delete("/v1/schedules/nightly").status_code == 404


def test_a_trigger_creates_a_run_and_a_fire(client: TestClient) -> None:
    put(client)
    headers = {"Idempotency-Key": "now"}
    fire = client.post("/v1/schedules/nightly/trigger", headers=headers)
    assert (fire.status_code, fire.json()["state"], fire.json()["by_hand"]) == (202, "fired", True)
    assert client.post("/v1/schedules/nightly/trigger", headers=headers).json() == fire.json()
    skipped = client.post("/v1/schedules/nightly/trigger").json()
    assert (skipped["state"], skipped["run_id"]) == ("skipped", None)
    forced = client.post("/v1/schedules/nightly/trigger", params={"force": True}).json()

    listed = client.get("/v1/schedules/nightly/fires", params={"state": "fired"}).json()["fires"]
    assert [entry["id"] for entry in listed] == [forced["id"], fire.json()["id"]]
    found = client.get("/v1/schedules/nightly").json()
    assert found["last_run"]["id"] == forced["run_id"]
    assert found["last_fire"]["state"] == "fired"
    assert client.get(f"/v1/runs/{fire.json()['run_id']}").json()["inputs"]["day"].startswith("20")


def test_a_paused_schedule_stays_paused_until_resumed(client: TestClient) -> None:
    put(client)
    paused = client.post("/v1/schedules/nightly/pause", params={"reason": "holidays"}).json()
    assert (paused["state"], paused["paused_reason"], paused["next"]) == ("paused", "holidays", None)
    assert put(client, description="changed").json()["state"] == "paused"
    resumed = client.post("/v1/schedules/nightly/resume").json()
    assert (resumed["state"], resumed["paused_reason"]) == ("active", None)
    assert client.post("/v1/schedules/nightly/resume").status_code == 200


def test_a_preview_shows_local_instants(client: TestClient) -> None:
    put(client)
    preview = client.get("/v1/schedules/nightly/preview", params={"n": 3, "after": "2026-03-28T12:00:00Z"}).json()
    assert [fire["at"] for fire in preview["fires"]] == [
        "2026-03-29T03:00:00+02:00",
        "2026-03-30T02:30:00+02:00",
        "2026-03-31T02:30:00+02:00",
    ]
    assert client.get("/v1/schedules/nightly/preview", params={"n": 0}).status_code == 422
    assert client.get("/v1/schedules/nightly/preview", params={"after": "2026-03-28T12:00:00"}).status_code == 422


def test_a_jitter_is_shown(client: TestClient) -> None:
    put(client, jitter="10m")
    fires = client.get("/v1/schedules/nightly/preview").json()["fires"]
    late = [datetime.fromisoformat(fire["due_at"]) - datetime.fromisoformat(fire["at"]) for fire in fires]
    assert all(timedelta(0) <= each < timedelta(minutes=10) for each in late)
    assert len(set(late)) > 1
    assert client.get("/v1/schedules/nightly").json()["next"] == fires[0]


@pytest.mark.parametrize(
    ("change", "where", "line", "accepted"),
    [
        (("day: 5", "day: 5"), "inputs.day", 5, "string"),
        (("workflow: rest", "workflow: rst"), "workflow", 2, "did you mean 'rest'?"),
        (("schedule: nightly", "schedule: daily"), "schedule", 1, "'nightly'"),
        (("'30 2 * * *'", "'30 2 * *'"), "cron", 3, ""),
    ],
)
def test_an_invalid_schedule_names_field_and_line_and_is_not_stored(
    client: TestClient, change: tuple[str, str], where: str, line: int, accepted: str
) -> None:
    headers = {"Content-Type": "application/yaml"}
    answer = client.put("/v1/schedules/nightly", content=YAML.replace(*change), headers=headers)

    assert (answer.status_code, answer.json()["title"]) == (422, "invalid schedule")
    (problem,) = answer.json()["errors"]
    assert (problem["where"], problem["line"]) == (where, line)
    assert accepted in problem["accepted"]
    assert client.get("/v1/schedules").json() == {"schedules": []}


def test_the_examples_of_the_document_are_accepted(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    body = document["paths"]["/v1/schedules/{name}"]["put"]["requestBody"]["content"]["application/yaml"]
    for example in body["examples"].values():
        name = example["value"]["schedule"]
        assert client.put(f"/v1/schedules/{name}", json=example["value"]).status_code == 201
