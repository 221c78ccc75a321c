"""Hostile requests: each gets an answer below 500 that says what is wrong, and is parsed off the event loop."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.workflows.language import source

JSON = {"Content-Type": "application/json"}
YAML = {"Content-Type": "application/yaml"}
NOOP = {"workflow": "w", "inputs": {"x": {}}, "steps": [{"id": "a", "kind": "noop"}]}


def given(text: str) -> bytes:
    """A run whose input is the text as it is."""
    return b'{"definition": %s, "inputs": {"x": %s}}' % (json.dumps(NOOP).encode(), text.encode())


BODIES: dict[str, tuple[bytes, dict[str, str], int, str]] = {
    "brackets": (b"[" * 500, JSON, 422, "64 levels"),
    "brackets in an input": (given("[" * 500 + "]" * 500), JSON, 422, "64 levels"),
    "brackets in YAML": (b"[" * 5_000, YAML, 422, "64 levels"),
    "merges in YAML": (b"a: &a {<<: *a}", YAML, 422, "merged into one another"),
    "no JSON": (b"workflow: w", JSON, 422, "this is no JSON"),
    "no UTF-8": (b'{"workflow": "\xff"}', JSON, 422, "no UTF-8"),
    "half a character": (given('"\\ud800"'), JSON, 422, "half a character"),
    "half a character in a key": (given('{"\\ud800": 1}'), JSON, 422, "half a character"),
    "10^400": (given("1" + "0" * 400), JSON, 422, "308 digits"),
    "many digits": (given("1" * 10_000), JSON, 422, "308 digits"),
    "1e400": (given("1e400"), JSON, 422, "beyond what a double"),
    "no number": (given("NaN"), JSON, 422, "none that JSON knows"),
    "a key twice": (given('{"a": 1, "a": 2}'), JSON, 422, "stands twice"),
    "NUL": (given('"\\u0000"'), JSON, 202, "w"),
    "NUL in a label": (b'{"workflow": "x", "labels": {"a": "\\u0000"}}', JSON, 404, "no workflow"),
    "NUL as a name": (b'{"workflow": "\\u0000"}', JSON, 422, "workflow"),
    "an empty body": (b"", JSON, 422, "empty"),
    "a text in a text": (json.dumps({"definition": "[" * 500}).encode(), JSON, 422, "64 levels"),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_body_gets_an_answer_that_says_what_is_wrong(name: str, client: TestClient) -> None:
    body, headers, status, told = BODIES[name]
    answer = client.post("/v1/runs", content=body, headers=headers)
    assert answer.status_code == status, answer.text
    assert told in answer.text


@pytest.mark.parametrize(
    "path", ["/v1/workflows/%00", "/v1/runs?workflow=%00", "/v1/runs?label=a%3D%00", "/v1/models/%00"]
)
def test_nul_in_an_address_is_refused(path: str, client: TestClient) -> None:
    answer = client.get(path)
    assert answer.status_code == 422, answer.text
    assert "NUL" in answer.text


def test_bodies_are_read_off_the_event_loop(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_loop = []
    read = source.read

    def noted(*arguments: Any) -> Any:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            on_a_loop.append(False)
        else:
            on_a_loop.append(True)
        return read(*arguments)

    monkeypatch.setattr(source, "read", noted)
    assert client.post("/v1/runs", content=given("1"), headers=JSON).status_code == 202
    assert on_a_loop == [False]
