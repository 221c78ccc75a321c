"""Settings that are changed while a real installation runs: each process follows within seconds."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import httpx2
import pytest

from tests.live.conftest import MODEL, Live, as_json, until

CALL = {"workflow": "call", "steps": [{"id": "get", "kind": "http", "url": "http://localhost:9/x"}]}
NOOP = {"workflow": "w", "steps": [{"id": "a", "kind": "noop"}]}


@pytest.fixture
def changed(live: Live) -> Iterator[Live]:
    """The installation; what a test changes is removed again."""
    yield live
    live.arriero("config", "revert", "0", "--reason", "the end of a test")


def change(live: Live, key: str, value: str) -> None:
    live.arriero("config", "set", key, value, "--reason", "a test")


def kept_for(live: Live, run_id: str) -> timedelta:
    run = live.until_ended(run_id)
    return datetime.fromisoformat(run["expires_at"]) - datetime.fromisoformat(run["finished_at"])


def test_each_process_follows_a_change(changed: Live) -> None:
    live = changed
    with httpx2.Client(base_url=live.api, timeout=60, trust_env=False) as client:

        def post(path: str, body: Any, **more: Any) -> httpx2.Response:
            return client.post(path, json=body, **more)

        # The API: the size of bodies, inline values, origins of pages, limits.
        change(live, "api.max_body_bytes", "2048")
        assert post("/v1/runs", {"definition": NOOP, "inputs": {"x": "y" * 4000}}).status_code == 413
        change(live, "api.max_body_bytes", "1000000")
        change(live, "api.max_inline_bytes", "0")
        run_id = live.submit({"workflow": "w", "inputs": {"t": {"type": "string"}}, "steps": NOOP["steps"]}, t="x" * 50)
        assert "$payload" in client.get(f"/v1/runs/{run_id}").json()["inputs"]
        page = {"Origin": "https://app.example.com"}
        assert client.get("/v1/runs", headers=page).status_code == 403
        change(live, "api.cors_origins", page["Origin"])
        assert client.get("/v1/runs", headers=page).headers["access-control-allow-origin"] == page["Origin"]
        change(live, "limits.namespace_requests_per_minute", "1")
        assert [post("/v1/runs", {"definition": NOOP}).status_code for _ in range(2)] == [202, 429]
        live.arriero("config", "unset", "limits.namespace_requests_per_minute", "--reason", "a test")

        # The API refuses unlisted hosts, and so does the control worker, which runs the step.
        assert post("/v1/runs", {"definition": CALL}).status_code == 422
        change(live, "http.allowed_hosts", "localhost:9")

        def message() -> str:
            found = live.until_ended(live.submit(CALL))
            return str(found["error"]["message"])

        until(lambda: "private" in message() or "loopback" in message())

        # The pool records a direct call, with the retention of the moment.
        change(live, "runs.retention", "2d")

        def run_of_call() -> str:
            body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi."}], "max_tokens": 2}
            return str(post("/v1/chat/completions", body).headers["X-Arriero-Run"])

        until(lambda: kept_for(live, run_of_call()) == timedelta(days=2))

        # The reconciler, and the views of the API.
        for value, models in (("", []), (MODEL, [MODEL])):
            change(live, "pools.models", value)
            targets = client.get("/v1/fleet").json()["targets"]
            assert [one["model"] for one in targets if one["by"] == "settings"] == models

    # Every process, the agent too: the level of the log, below which the line about a change is dropped.
    change(live, "log.level", "warning")
    logs = [live.folder / "logs" / f"{name}.log" for name in ("api", "control", "agent")]
    version = as_json(live.arriero("config", "history", "-n", "1", "--json").stdout)["versions"][0]["version"]
    change(live, "log.level", "info")
    for log in logs:
        until(lambda log=log: f'"version": {version + 1}' in log.read_text())
    found = as_json(live.arriero("config", "show", "log.level", "--json").stdout)
    assert found[0]["origin"] == f"run time, version {version + 1}"
