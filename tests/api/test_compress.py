"""`POST /v1/compress`, executed by a worker in this process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.api.compression import WaitingCalls
from app.catalog import files
from app.kernel.activity import Activity
from app.kernel.security.secrets import Secrets
from app.kernel.settings import Settings
from app.scheduler.wake_up import AgentCalls
from app.workflows.runs.service import Runs
from tests.workflows.conftest import StepWorker
from workers.leases import Leases
from workers.runtime import Runtime
from workers.steps import run_step
from workers.tokenizers import Tokenizers

MODEL = "smollm2:135m"


@pytest.fixture
def worker(runs: Runs, tmp_path: Path) -> Iterator[None]:
    """A control worker that does every step that is ready."""
    leases = Leases(runs, "w@here/1/x", interval=timedelta(seconds=1))
    leases.start()
    calls = AgentCalls("redis://127.0.0.1:1")
    activity = Activity("redis://127.0.0.1:1")
    given = Settings(data_dir=tmp_path)
    tokenizers = Tokenizers()
    runtime = Runtime(
        given, runs, leases, None, Secrets(tmp_path), files.read_catalog(), activity, calls, tokenizers=tokenizers
    )
    ended, steps = threading.Event(), StepWorker(runs)

    def work() -> None:
        while not ended.wait(0.05):
            for row in steps.ready():
                run_step(runtime, row.id, row.attempt)

    thread = threading.Thread(target=work)
    thread.start()
    yield
    ended.set()
    thread.join()
    leases.close()
    tokenizers.close()


def post(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/compress", json={"model": MODEL, **body})


@pytest.mark.slow
def test_a_text_is_compressed(client: TestClient, worker: None) -> None:
    text = "It was really a very nice day, and so we went to the lake. The lease of Anna ends on 2027-03-31. " * 2
    answer = post(client, text=text, max_tokens=20, query="When does the lease end?")

    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert "2027-03-31" in found["text"]
    assert found["tokens"]["after"] <= 20
    assert found["target_met"] is True
    run = client.get(f"/v1/runs/{answer.headers['X-Arriero-Run']}").json()
    assert (run["workflow"], run["state"]) == ("compress", "succeeded")
    missing = post(client, text=text, model="qwen3:4b", max_tokens=5)
    assert missing.status_code == 422
    assert "its file is not on this worker's host" in missing.json()["detail"]


def test_a_call_that_takes_longer_is_a_run(client: TestClient) -> None:
    """No worker is there."""
    answer = client.post("/v1/compress", params={"wait": 0}, json={"model": MODEL, "text": "a", "max_tokens": 1})

    assert answer.status_code == 202
    assert answer.json() == {"run": answer.headers["X-Arriero-Run"], "state": "queued"}


def test_a_call_counts_against_the_limits_of_its_caller(client: TestClient) -> None:
    assert client.put("/v1/limits/namespace/default", json={"requests_per_minute": 1}).status_code == 200
    answers = [
        client.post("/v1/compress", params={"wait": 0}, json={"model": MODEL, "text": "a", "max_tokens": 1})
        for _ in range(2)
    ]

    assert [answer.status_code for answer in answers] == [202, 429]
    assert answers[0].headers["RateLimit"].startswith('"requests";r=0')
    assert len(client.get("/v1/runs").json()["runs"]) == 1, "a refused call stores nothing"


def test_only_so_many_calls_wait(client: TestClient) -> None:
    waiting = client.app.state.compressions = WaitingCalls(1)  # type: ignore[attr-defined] # it is a FastAPI
    given = {"model": MODEL, "text": "a", "max_tokens": 1}
    with waiting.one():
        refused = client.post("/v1/compress", params={"wait": 0}, json=given)
    accepted = [client.post("/v1/compress", params={"wait": 0}, json=given) for _ in range(2)]

    assert refused.status_code == 429
    assert "1 calls wait" in refused.json()["detail"]
    assert refused.headers["Retry-After"] == "5"
    assert [answer.status_code for answer in accepted] == [202, 202], "calls that have ended wait no more"
    assert len(client.get("/v1/runs").json()["runs"]) == 2, "a refused call stores nothing"


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({"max_tokens": 5}, "exactly one of 'text' and 'messages'"),
        ({"text": "a", "messages": [], "max_tokens": 5}, "exactly one of 'text' and 'messages'"),
        ({"messages": [{"role": "user", "content": 5}], "max_tokens": 5}, "messages[0].content is no text"),
        ({"text": "a"}, "either 'target_ratio' or 'max_tokens'"),
        ({"text": "a", "max_tokens": 5, "model": "nope"}, "no model 'nope'"),
        ({"text": "a", "max_tokens": 5, "embedding_model": MODEL}, "serves no embeddings"),
        ({"text": "a", "max_tokens": 5, "summary": {"model": "nope"}}, "summary.model"),
        ({"text": "a", "max_tokens": 5, "methods": ["surprisal"]}, "'surprisal' is not offered"),
        ({"text": "a", "max_tokens": 5, "more": 1}, "more"),
    ],
)
def test_a_wrong_request_is_refused_with_its_reason(client: TestClient, body: dict[str, Any], where: str) -> None:
    answer = client.post("/v1/compress", json={"model": MODEL, **body})

    assert answer.status_code == 422
    assert where in answer.text


@pytest.mark.parametrize("text", ["\\u0000", "\\ud800", "\\ud83d\\ude00", ""])
def test_characters_that_cannot_be_stored_are_no_defect(client: TestClient, text: str) -> None:
    raw = f'{{"model": "{MODEL}", "text": "{text}", "max_tokens": 5, "query": "{text}"}}'
    answer = client.post("/v1/compress?wait=0", content=raw, headers={"Content-Type": "application/json"})

    assert answer.status_code in (202, 422), answer.text
