"""Differences between versions, and the published schema, over HTTP."""

from __future__ import annotations

from typing import Any

from fastapi.testclient import TestClient
from jsonschema import Draft202012Validator

ONE = {"workflow": "rest", "steps": [{"id": "a", "kind": "noop"}, {"id": "b", "kind": "noop", "needs": ["a"]}]}
TWO = {"workflow": "rest", "steps": [{"id": "c", "kind": "noop"}, {"id": "a", "kind": "noop", "timeout": "1m"}]}


def stored(client: TestClient, *definitions: dict[str, Any]) -> None:
    for definition in definitions:
        assert client.put(f"/v1/workflows/{definition['workflow']}", json=definition).status_code == 201


def test_the_newest_version_is_compared_with_the_one_before(client: TestClient) -> None:
    stored(client, ONE, TWO)
    body = client.get("/v1/workflows/rest/diff").json()

    assert (body["name"], body["old"], body["new"]) == ("rest", 1, 2)
    assert [(change["kind"], change["path"]) for change in body["changes"]] == [
        ("added", "steps.c"),
        ("added", "steps.a.timeout"),
        ("removed", "steps.b"),
    ]
    assert body["changes"][1] == {"kind": "added", "path": "steps.a.timeout", "old": None, "new": "1m"}


def test_any_two_versions_are_compared(client: TestClient) -> None:
    stored(client, ONE, TWO, ONE)

    def compared(**versions: int) -> tuple[int, int, int]:
        body = client.get("/v1/workflows/rest/diff", params=versions).json()
        return body["old"], body["new"], len(body["changes"])

    assert compared(old=1, new=3) == (1, 3, 0)
    assert compared(old=2) == (2, 3, 3)
    assert compared(new=2) == (1, 2, 3)


def test_the_first_stored_version_is_compared_with_the_shipped_workflow(client: TestClient) -> None:
    shipped = client.get("/v1/workflows/support-triage").json()["definition"]
    stored(client, {**shipped, "description": "ours"})
    body = client.get("/v1/workflows/support-triage/diff").json()

    assert (body["old"], body["new"]) == (0, 1)
    assert [change["path"] for change in body["changes"]] == ["description"]


def test_an_unknown_version_is_reported_with_the_existing_ones(client: TestClient) -> None:
    stored(client, ONE, TWO)
    missing = client.get("/v1/workflows/rest/diff", params={"old": 7})
    first = client.get("/v1/workflows/rest/diff", params={"new": 1})
    unknown = client.get("/v1/workflows/rset/diff")

    assert (missing.status_code, first.status_code, unknown.status_code) == (404, 404, 404)
    assert missing.json()["detail"] == "no version of workflow 'rest': '7'; there are: 2, 1"
    assert first.json()["detail"] == "no version of workflow 'rest' before '1'"
    assert "rest" in unknown.json()["detail"]
    assert client.get("/v1/workflows/support-triage/diff").status_code == 404


def test_the_schema_is_published(client: TestClient) -> None:
    answer = client.get("/v1/schemas/workflow")

    assert answer.headers["content-type"] == "application/schema+json"
    assert Draft202012Validator(answer.json()).is_valid(ONE)
    assert not Draft202012Validator(answer.json()).is_valid({**ONE, "stpes": []})
