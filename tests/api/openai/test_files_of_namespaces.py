"""Files and batches with API keys: a key of a namespace sees and changes only what is of its namespace."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from app.access.callers import KeyScope
from app.files.rows import CHUNK_BYTES
from app.inference.batches.advance import Batches
from app.kernel.sections.files import FileSettings
from app.kernel.settings import Settings
from app.workflows.runs.service import Runs
from tests.api.openai.conftest import MODEL, catalog

URL = "/v1/chat/completions"


@pytest.fixture
def settings(settings: Settings) -> Settings:
    files = FileSettings(max_bytes=3 * CHUNK_BYTES, max_namespace_bytes=2 * CHUNK_BYTES)
    return settings.model_copy(update={"files": files})


@pytest.fixture
def http(api: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=api, trust_env=False) as made:
        yield made


def key(http: httpx2.Client, namespace: str | None, *scopes: KeyScope) -> dict[str, str]:
    body: dict[str, Any] = {"name": "k", "scopes": scopes or ["submit", "read"], "namespace": namespace}
    return {"Authorization": f"Bearer {http.post('/v1/keys', json=body).json()['key']}"}


def upload(http: httpx2.Client, headers: dict[str, str], content: bytes) -> httpx2.Response:
    return http.post("/v1/files", files={"file": ("a", content)}, data={"purpose": "batch"}, headers=headers)


def test_a_foreign_key_meets_nothing(http: httpx2.Client, runs: Runs, settings: Settings) -> None:
    owner, foreign, everybody = key(http, "blue"), key(http, "red"), key(http, None)
    request = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}
    line = {"custom_id": "a", "method": "POST", "url": URL, "body": request}
    file_id = upload(http, owner, json.dumps(line).encode()).json()["id"]
    body = {"input_file_id": file_id, "endpoint": URL, "completion_window": "24h"}
    batch = http.post("/v1/batches", json=body, headers=owner).json()
    catalogs = catalog()
    Batches(runs, lambda: catalogs, settings.files, settings.batches, "control@here/1/x").advance_all()

    assert http.post("/v1/batches", json=body, headers=foreign).status_code == 400
    for method, path in [
        ("GET", f"/v1/files/{file_id}"), ("GET", f"/v1/files/{file_id}/content"), ("DELETE", f"/v1/files/{file_id}"),
        ("GET", f"/v1/batches/{batch['id']}"), ("POST", f"/v1/batches/{batch['id']}/cancel"),
        ("GET", f"/v1/batches?after={batch['id']}"),
    ]:  # fmt: skip
        answer = http.request(method, path, json={} if method == "POST" else None, headers=foreign)
        assert answer.status_code == 404, (method, path)
    for path in ("/v1/files", "/v1/batches"):
        assert http.get(path, headers=foreign).json()["data"] == []
        for caller in (owner, everybody):
            assert len(http.get(path, headers=caller).json()["data"]) == 1
    assert http.get(f"/v1/runs/{batch['run_id']}", headers=owner).json()["labels"] == {"namespace": "blue"}
    reader = key(http, "blue", KeyScope.READ)
    assert http.get(f"/v1/batches/{batch['id']}", headers=reader).status_code == 200
    assert upload(http, reader, b"x").status_code == 403
    assert http.post(f"/v1/batches/{batch['id']}/cancel", json={}, headers=reader).status_code == 403
    assert http.post(f"/v1/batches/{batch['id']}/cancel", json={}, headers=owner).status_code == 200


def test_the_bytes_of_a_namespace_are_its_own(http: httpx2.Client) -> None:
    blue, red = key(http, "blue"), key(http, "red")
    assert upload(http, blue, b"x" * 2 * CHUNK_BYTES).status_code == 200
    assert upload(http, blue, b"x" * CHUNK_BYTES).status_code == 413
    assert upload(http, red, b"x" * CHUNK_BYTES).status_code == 200
