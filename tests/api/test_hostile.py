"""Hostile requests: each gets a status below 500 and the reason, and is parsed off the event loop."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.fleet import views
from app.workflows.language import source

JSON = {"Content-Type": "application/json"}
YAML = {"Content-Type": "application/yaml"}
NOOP = {"workflow": "w", "inputs": {"x": {}}, "steps": [{"id": "a", "kind": "noop"}]}


def given(text: str) -> bytes:
    """Return the body of a run with the text as its input, unchanged."""
    return b'{"definition": %s, "inputs": {"x": %s}}' % (json.dumps(NOOP).encode(), text.encode())


BODIES: dict[str, tuple[bytes, dict[str, str], int, str]] = {
    "brackets": (b"[" * 500, JSON, 422, "64 levels"),
    "brackets in an input": (given("[" * 500 + "]" * 500), JSON, 422, "64 levels"),
    "brackets in YAML": (b"[" * 5_000, YAML, 422, "64 levels"),
    "merges in YAML": (b"a: &a {<<: *a}", YAML, 422, "merged mappings are nested"),
    "no JSON": (b"workflow: w", JSON, 422, "this is not JSON"),
    "not UTF-8": (b'{"workflow": "\xff"}', JSON, 422, "not valid UTF-8"),
    "a lone surrogate": (given('"\\ud800"'), JSON, 422, "lone surrogate"),
    "a lone surrogate in a key": (given('{"\\ud800": 1}'), JSON, 422, "lone surrogate"),
    "10^400": (given("1" + "0" * 400), JSON, 422, "308 digits"),
    "many digits": (given("1" * 10_000), JSON, 422, "308 digits"),
    "1e400": (given("1e400"), JSON, 422, "beyond the range of a double"),
    "no number": (given("NaN"), JSON, 422, "JSON has no number NaN"),
    "a key twice": (given('{"a": 1, "a": 2}'), JSON, 422, "duplicate key"),
    "NUL": (given('"\\u0000"'), JSON, 202, "w"),
    "NUL in a label": (b'{"workflow": "x", "labels": {"a": "\\u0000"}}', JSON, 404, "no workflow"),
    "NUL as a name": (b'{"workflow": "\\u0000"}', JSON, 422, "workflow"),
    "an empty body": (b"", JSON, 422, "empty"),
    "a text in a text": (json.dumps({"definition": "[" * 500}).encode(), JSON, 422, "64 levels"),
}


@pytest.mark.parametrize("name", BODIES)
def test_an_invalid_body_is_refused_with_the_reason(name: str, client: TestClient) -> None:
    body, headers, status, text = BODIES[name]
    answer = client.post("/v1/runs", content=body, headers=headers)
    assert answer.status_code == status, answer.text
    assert text in answer.text


@pytest.mark.parametrize(
    "path", ["/v1/workflows/%00", "/v1/runs?workflow=%00", "/v1/runs?label=a%3D%00", "/v1/catalog/%00"]
)
def test_nul_in_a_url_is_refused(path: str, client: TestClient) -> None:
    answer = client.get(path)
    assert answer.status_code == 422, answer.text
    assert "NUL" in answer.text


RUN = "/v1/runs/00000000-0000-7000-8000-000000000000"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/runs"),
        ("POST", f"{RUN}/events"),
        ("POST", f"{RUN}/fork"),
        ("POST", "/v1/bulk/cancel"),
        ("POST", "/v1/bulk/retry"),
        ("POST", "/v1/pools"),
        ("POST", "/v1/pools/stop"),
        ("PUT", "/v1/hosts/a"),
        ("PUT", "/v1/namespaces/a"),
        ("PUT", "/v1/schedules/a"),
        ("PUT", "/v1/workflows/a"),
    ],
)
def test_every_body_is_bounded_and_parsed_off_the_event_loop(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, method: str, path: str
) -> None:
    on_event_loop = []
    read = source.read

    def noted(*arguments: Any) -> Any:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            on_event_loop.append(False)
        else:
            on_event_loop.append(True)
        return read(*arguments)

    monkeypatch.setattr(source, "read", noted)
    for body in (b"[" * 500, b'{"name": 1, "name": 2}'):
        assert client.request(method, path, content=body, headers=JSON).status_code == 422
    assert on_event_loop == [False, False]


UNSTORABLE: dict[str, tuple[str, str, bytes]] = {
    "a version beyond integers": ("GET", f"/v1/workflows/support-triage?version={2**31}", b""),
    "a version of 31 digits": ("GET", f"/v1/workflows/support-triage?version={10**30}", b""),
    "versions to compare": ("GET", f"/v1/workflows/support-triage/diff?old={2**63}", b""),
    "a long name of a workflow": ("POST", f"/v1/workflows/{'x' * 5000}/pause", b"{}"),
    "NUL in a filter": ("POST", "/v1/bulk/cancel", rb'{"workflow": "\u0000"}'),
    "a lone surrogate in a filter": ("POST", "/v1/bulk/retry", rb'{"workflow": "\ud800"}'),
    "a lone surrogate in a label": ("POST", "/v1/bulk/retry", rb'{"labels": {"a": "\ud800"}}'),
    "NUL in a model": ("POST", "/v1/pools/stop", rb'{"model": "\u0000"}'),
    "a lone surrogate in a model": ("POST", "/v1/pools/stop", rb'{"model": "\ud800"}'),
    "a schedule's version": (
        "PUT",
        "/v1/schedules/s",
        b'{"schedule": "s", "workflow": "support-triage", "every": "1d", "version": %d}' % 2**31,
    ),
    "a schedule before the calendar": (
        "PUT",
        "/v1/schedules/s",
        b'{"schedule": "s", "workflow": "support-triage", "every": "1d", "start": "0001-01-01T00:00:00+14:00"}',
    ),
    "a schedule after the calendar": (
        "PUT",
        "/v1/schedules/s",
        b'{"schedule": "s", "workflow": "support-triage", "every": "1d", "end": "9999-12-31T23:59:59-14:00"}',
    ),
}


@pytest.mark.parametrize("name", UNSTORABLE)
def test_values_that_the_database_cannot_store_are_refused(name: str, client: TestClient) -> None:
    method, path, body = UNSTORABLE[name]
    answer = client.request(method, path, content=body, headers=JSON)
    assert answer.status_code == 422, answer.text
    assert answer.json()["errors"]


@pytest.mark.parametrize(
    "body",
    [
        b'{"workflow": [%s]}' % (b'"' + b"x" * 50_000 + b'"'),
        b"{%s}" % b",".join(b'"k%d": 1' % number for number in range(5000)),
        b'{"states": [%s]}' % b",".join([b'"%s"' % (b"x" * 50)] * 1000),
    ],
    ids=["a long value", "many fields", "many values"],
)
def test_an_answer_does_not_repeat_a_long_input(body: bytes, client: TestClient) -> None:
    answer = client.post("/v1/bulk/cancel", content=body, headers=JSON)
    assert answer.status_code == 422
    assert len(answer.json()["errors"]) <= 1000
    assert len(answer.content) < 350_000
    definition = client.put("/v1/workflows/w", json={**NOOP, "workflow": "w", "retention": "x" * 50_000})
    assert definition.status_code == 422
    assert len(definition.content) < 30_000


def test_a_namespace_that_is_deleted_at_once_is_answered(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "accounts", lambda _: [])
    answer = client.put("/v1/namespaces/brief", json={})
    assert answer.status_code == 200, answer.text
    assert answer.json()["held_bytes"] == 0


def test_unknown_query_parameters_are_refused(client: TestClient) -> None:
    answer = client.get("/v1/runs", params={"stat": "failed", "limit": 3})
    other = client.get("/healthz", params={"x": 1})

    assert (answer.status_code, other.status_code) == (422, 422)
    assert answer.json()["errors"] == [
        {
            "where": "query.stat",
            "message": "unknown query parameter",
            "accepted": "one of created_after, created_before, cursor, label, limit, namespace, state, workflow",
            "line": None,
        }
    ]
    assert other.json()["errors"][0]["accepted"] == "no query parameters"


def test_errors_name_nothing_of_the_code(client: TestClient) -> None:
    answers = [
        client.post("/v1/runs", json=[]),
        client.post("/v1/runs", json="x"),
        client.post("/v1/pools", json=[1]),
        client.put("/v1/namespaces/n", json={"period": 0}),
        client.put("/v1/namespaces/n", json={"period": "0s", "weight": "x"}),
        client.post("/v1/runs", json={"workflow": "w", "deadline": "soon", "labels": []}),
    ]

    for answer in answers:
        assert answer.status_code == 422
        for leak in ("instance of", "timedelta", "Value error", "RunIn", "StartIn", "LimitsIn"):
            assert leak not in answer.text, answer.text
