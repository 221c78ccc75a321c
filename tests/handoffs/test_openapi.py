"""Calls of APIs that an OpenAPI document describes: what is sent, what is refused, and how often."""

from __future__ import annotations

import json
from typing import Any

import pytest

from app.handoffs import check
from app.kernel.errors import InvalidInput
from tests.handoffs.conftest import Crm, HandoffWorld

API: dict[str, Any] = {
    "openapi": "3.1.0",
    "servers": [{"url": "http://127.0.0.1:1/"}],
    "paths": {
        "/shops/{shop}/leads": {
            "parameters": [{"$ref": "#/components/parameters/shop"}],
            "post": {
                "operationId": "createLead",
                "parameters": [
                    {"name": "notify", "in": "query", "schema": {"type": "boolean"}},
                    {"name": "campaign", "in": "query"},
                    {"name": "X-Trace", "in": "header"},
                ],
                "requestBody": {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Lead"}}}},
            },
        }
    },
    "components": {
        "parameters": {"shop": {"name": "shop", "in": "path", "required": True}},
        "schemas": {"Lead": {"type": "object", "required": ["id"], "properties": {"id": {"type": "integer"}}}},
    },
}


def document(url: str, target: dict[str, Any] | None = None, **more: Any) -> str:
    called = {"kind": "openapi", "document": API, "operation": "createLead", "server": url, "token": "crm"}
    given = {"handoff": "call", "source": {"kind": "api"}, "mapping": {"jmespath": "message"}}
    return json.dumps({**given, "retry": {"max_attempts": 3, "delay": "0s"}, **more, "target": called | (target or {})})


def api_with(**operation: Any) -> dict[str, Any]:
    """An API with one operation, which is not as it should be."""
    return {"document": {"paths": {"/x": {"get": {"operationId": "createLead", **operation}}}}}


def put(world: HandoffWorld, text: str) -> Any:
    return world.client.put("/v1/handoffs/call", content=text, headers={"Content-Type": "application/json"})


def send(world: HandoffWorld, message: dict[str, Any]) -> None:
    assert world.client.post("/v1/handoffs/call/messages", json=message).status_code == 202


def test_a_message_becomes_the_request_that_is_described(world: HandoffWorld, crm: Crm) -> None:
    assert put(world, document(crm.url)).status_code == 201
    send(world, {"shop": "a/b c", "campaign": "x&y", "id": 7, "note": '"quoted"', "tags": ["a", None]})
    send(world, {"shop": "s"})
    send(world, {"id": 8})
    send(world, {"shop": "..", "id": 9})
    world.work()

    assert crm.leads() == [{"id": 7, "note": '"quoted"', "tags": ["a", None]}]
    assert crm.paths == ["/shops/a%2Fb%20c/leads?&campaign=x%26y"]
    problems = [one["problems"][0]["where"] for one in world.messages("call", state="invalid")]
    assert sorted(problems) == ["payload.id", "payload.shop", "payload.shop"]


def test_no_more_are_sent_than_the_target_can_take(world: HandoffWorld, crm: Crm) -> None:
    assert put(world, document(crm.url, rate={"requests": 3, "per": "1h"})).status_code == 201
    for id_ in range(8):
        send(world, {"shop": "s", "id": id_})
    world.work()
    assert len(crm.leads()) == 3
    assert len(world.messages("call", state="received")) == 5
    for expected in (6, 8):
        world.run("UPDATE handoff_message SET sent_at = sent_at - interval '1 h', due_at = due_at - interval '1 h'")
        world.work()
        assert len(crm.leads()) == expected
    assert len(world.messages("call", state="delivered")) == 8


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"operation": "deleteAll"}, "createLead"),
        ({"server": "file:///etc"}, "server"),
        ({"document": {**API, "paths": {}}}, "none"),
        ({"document": {**API, "components": {}}}, "shop"),
        (api_with(requestBody={"content": {}}), "json"),
        (api_with(parameters=[{"$ref": "https://evil.example/x"}]), "leads out"),
        ({"document": {"x": "y" * 500_001}}, "500000"),
    ],
)
def test_what_a_document_does_not_describe_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        check.parse(document("http://127.0.0.1:1", target=change))
