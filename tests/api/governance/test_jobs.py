"""The resource `jobs`."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.governance.jobs import store
from app.governance.jobs.registry import JOBS
from app.kernel.database import Database
from app.kernel.live import notices
from workers.messaging import messages


def job(client: TestClient, name: str) -> dict[str, Any]:
    answer = client.get(f"/v1/jobs/{name}")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_every_job_is_listed_before_it_has_ever_run(client: TestClient) -> None:
    listed = client.get("/v1/jobs").json()
    assert [one["name"] for one in listed["jobs"]] == [one.name for one in JOBS]
    assert listed["beat"] == "stopped", "no beat holds the lock"
    sweep, folder = (next(one for one in listed["jobs"] if one["name"] == name) for name in ("sweep", "context_folder"))
    assert (sweep["state"], sweep["last"], sweep["next_at"], sweep["passes"]) == ("active", None, None, 0)
    assert sweep["trigger"] == sweep["default_trigger"]
    assert folder["state"] == "off", "the setting context.folder is not set"
    assert client.post("/v1/jobs/context_folder/run").status_code == 409


def test_the_next_pass_is_what_beat_has_planned(client: TestClient, valkey: Any) -> None:
    valkey.set("redbeat::lock", "someone")
    valkey.zadd("redbeat::schedule", {"redbeat:sweep": 1_900_000_000, "redbeat:nothing": 5})
    listed = client.get("/v1/jobs").json()
    assert listed["beat"] == "running"
    assert job(client, "sweep")["next_at"] == "2030-03-17T17:46:40Z"
    valkey.set("redbeat::schedule", "of a wrong type")
    assert job(client, "sweep")["next_at"] is None


def test_a_job_is_paused_resumed_changed_and_reset(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(notices, "send", lambda _, topic: told.append(topic))
    paused = client.post("/v1/jobs/expire/pause", params={"reason": "we look at old runs"}).json()
    assert (paused["state"], paused["paused_reason"]) == ("paused", "we look at old runs")
    assert client.post("/v1/jobs/expire/resume").json()["state"] == "active"
    nightly = client.put("/v1/jobs/expire/trigger", json={"cron": "@daily", "timezone": "Europe/Madrid"}).json()
    assert nightly["trigger"] == {"every": None, "cron": "0 0 * * *", "timezone": "Europe/Madrid"}
    assert nightly["changed"]
    assert nightly["next_at"] is not None
    assert client.put("/v1/jobs/expire/trigger", json={"every": "2h"}).json()["trigger"]["every"] == "2h"
    reset = client.delete("/v1/jobs/expire/trigger").json()
    assert reset["trigger"] == reset["default_trigger"]
    assert not reset["changed"]
    assert told == ["jobs"] * 5, "beat and the control workers hear of each change"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, ""),
        ({"every": "1h", "cron": "@daily"}, ""),
        ({"every": "10ms"}, "every"),
        ({"every": "500d"}, "every"),
        ({"every": "1h", "timezone": "UTC"}, "timezone"),
        ({"cron": "61 * * * *"}, "cron"),
        ({"cron": "* * * * *", "timezone": "Europe/Atlantis"}, "timezone"),
        ({"cron": "* * * * *", "timezone": "../../etc/passwd"}, "timezone"),
        ({"cron": "* * * * *", "timezone": "\x00"}, "timezone"),
        ({"cadence": "1h"}, "cadence"),
    ],
)
def test_an_invalid_trigger_is_refused(client: TestClient, body: dict[str, str], field: str) -> None:
    answer = client.put("/v1/jobs/expire/trigger", json=body)
    assert answer.status_code == 422
    assert field in answer.text
    assert not job(client, "expire")["changed"]


def test_a_requested_pass_is_sent_to_the_control_workers(client: TestClient, database: Database, valkey: Any) -> None:
    requested = client.post("/v1/jobs/expire/run")
    assert requested.status_code == 202
    found = requested.json()
    assert (found["state"], found["by_hand"], found["outcome"]) == ("requested", True, None)
    (message,) = valkey.lrange("control", 0, -1)
    assert b"run_job" in messages.validated(message.encode(), "control", 0, "tag")
    with database.work() as work:
        assert store.begin(work, "expire", found["id"], "worker")
    assert client.get(f"/v1/jobs/expire/passes/{found['id']}").json()["state"] == "running"
    assert [one["id"] for one in client.get("/v1/jobs/expire/passes").json()["passes"]] == [found["id"]]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/jobs/nothing"),
        ("POST", "/v1/jobs/nothing/pause"),
        ("POST", "/v1/jobs/nothing/resume"),
        ("POST", "/v1/jobs/nothing/run"),
        ("DELETE", "/v1/jobs/nothing/trigger"),
        ("GET", "/v1/jobs/nothing/passes"),
        ("GET", "/v1/jobs/sweep/passes/01a20000-0000-7000-8000-000000000000"),
    ],
)
def test_what_is_unknown_is_not_found(client: TestClient, method: str, path: str) -> None:
    assert client.request(method, path).status_code == 404
