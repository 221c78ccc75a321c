"""Memories over HTTP: remembered once, ended, superseded, marked, forgotten; and what extraction is allowed to do."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text

from app.api.services import Services
from app.files.file import shown_id
from app.kernel.sections.memory import ConversationSettings
from app.memory.conversations.conversation import NewConversation
from app.memory.conversations.message import MESSAGE_PREFIX, MessageRole, NewMessage
from app.memory.conversations.service import Conversations, shown_conversation


def remember(client: TestClient, given: str, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/memories", json={"text": given, **fields})
    assert answer.status_code in (200, 201), answer.text
    found: dict[str, Any] = answer.json()
    return found


def listed(client: TestClient, **parameters: Any) -> list[str]:
    answer = client.get("/v1/memories", params=parameters)
    assert answer.status_code == 200, answer.text
    return sorted(one["text"] for one in answer.json()["memories"])


def test_a_memory_from_its_first_day_to_its_last(client: TestClient, services: Services) -> None:
    conversations = Conversations(services.database, ConversationSettings())
    talk = conversations.create(
        NewConversation("default", user="ana"), [NewMessage(MessageRole.USER, "I live in Bern")]
    )
    message = shown_id(conversations.read(talk.id)[0].id, MESSAGE_PREFIX)
    since = "2026-01-01T00:00:00Z"

    made = remember(
        client,
        "Ana lives in Bern",
        user="ana",
        messages=[message],
        conversation=shown_conversation(talk.id),
        valid_from=since,
    )
    assert [(one["origin"], one["message"]) for one in made["sources"]] == [("message", message), ("hand", None)]
    assert made["created"]
    again = client.post("/v1/memories", json={"text": "ana lives in bern.", "user": "ana"})
    assert (again.status_code, again.json()["id"], again.json()["created"]) == (200, made["id"], False)

    path = f"/v1/memories/{made['id']}"
    answer = client.post(f"{path}/supersede", json={"text": "Ana lives in Porto", "note": "she moved"})
    assert answer.status_code == 201, answer.text
    new = answer.json()
    assert new["user"] == "ana"
    assert client.get(path).json()["superseded_by"] == new["id"]
    assert listed(client, user="ana") == ["Ana lives in Porto"]
    assert listed(client, user="ana", as_of="2026-02-01T00:00:00Z") == ["Ana lives in Bern"]
    assert listed(client, user="ana", all=True) == ["Ana lives in Bern", "Ana lives in Porto"]
    assert listed(client, conversation=shown_conversation(talk.id)) == ["Ana lives in Porto"]
    past = client.get(f"/v1/memories/{new['id']}/history").json()
    assert [one["text"] for one in past["memories"]] == ["Ana lives in Bern", "Ana lives in Porto"]
    assert [one["event"] for one in past["events"]] == ["remembered", "remembered", "superseded"]

    assert client.post(f"/v1/memories/{new['id']}/breakthrough", json={}).json()["kind"] == "breakthrough"
    assert listed(client, kind="breakthrough") == ["Ana lives in Porto"]
    ended = client.post(f"/v1/memories/{new['id']}/invalidate", json={"note": "wrong"})
    assert ended.json()["invalid_at"] is not None
    assert client.post(f"/v1/memories/{new['id']}/invalidate", json={}).status_code == 409
    assert listed(client) == []


def test_forgetting_is_shown_before_done_for_real_and_leaves_no_text_anywhere(
    client: TestClient, services: Services
) -> None:
    secret = "xylophone"
    made = remember(client, f"Ana plays the {secret}", user="ana")
    new = client.post(f"/v1/memories/{made['id']}/supersede", json={"text": f"Ana sold the {secret}"}).json()
    remember(client, "Ana likes tea", user="ana")

    preview = client.post("/v1/memories/forget", json={"query": f"the {secret}", "user": "ana"}).json()
    assert preview["preview"]
    assert {one["id"] for one in preview["matches"]} == {made["id"], new["id"]}
    assert len(listed(client, all=True)) == 3, "a preview deletes nothing"

    ids = [one["id"] for one in preview["matches"]]
    done = client.post("/v1/memories/forget", json={"ids": ids}).json()
    assert set(done["forgotten"]) == set(ids)
    assert done["proved"]
    assert sum(one["found"] for one in done["searched"]) == 0
    assert listed(client, all=True) == ["Ana likes tea"]
    assert client.get(f"/v1/memories/{made['id']}").status_code == 404
    with services.database.work() as work:
        tables = [row.name for row in work.rows(text("SELECT relname AS name FROM pg_stat_user_tables"))]
        left = [
            table
            for table in tables
            if work.rows(
                text(f'SELECT 1 FROM "{table}" AS one WHERE strpos(lower(one::text), :word) > 0'), {"word": secret}
            )
        ]
    assert left == [], "neither the tables of memories nor the audit log, nor any other"

    everything = client.post("/v1/memories/forget", json={"user": "ana", "everything": True}).json()
    assert (len(everything["forgotten"]), everything["proved"]) == (1, True)
    assert client.delete(f"/v1/memories/{made['id']}").status_code == 404


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "exactly one"),
        ({"user": "ana"}, "exactly one"),
        ({"everything": True}, "needs 'user'"),
        ({"ids": ["mem_1"], "query": "x"}, "exactly one"),
        ({"query": "x", "with_history": True}, "with_history"),
    ],
)
def test_what_is_to_be_forgotten_must_be_said(client: TestClient, body: dict[str, Any], said: str) -> None:
    answer = client.post("/v1/memories/forget", json=body)
    assert answer.status_code == 422
    assert said in answer.text


def test_an_unknown_conversation_is_named_with_its_field(client: TestClient) -> None:
    answer = client.post("/v1/memories", json={"text": "Ana likes tea", "conversation": "conv_1"})
    assert answer.status_code == 404
    assert [error["where"] for error in answer.json()["errors"]] == ["conversation"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"text": ""}, 422),
        ({"text": "x", "kind": "rumour"}, 422),
        ({"text": "x", "messages": ["msg_1"]}, 422),
        ({"text": "x", "conversation": "conv_1"}, 404),
        ({"text": "x", "supersedes": "mem_1"}, 404),
        ({"text": "x", "valid_from": "2026-01-01T00:00:00"}, 422),
        ({"text": "x", "valid_from": "2099-01-01T00:00:00Z"}, 422),
        ({"text": "x", "importance": 2}, 422),
        ({"text": "x\x00"}, 422),
    ],
)
def test_what_cannot_be_remembered_is_refused(client: TestClient, body: dict[str, Any], status: int) -> None:
    answer = client.post("/v1/memories", json=body)
    assert answer.status_code == status, answer.text


def test_extraction_is_off_until_somebody_turns_it_on(client: TestClient, services: Services) -> None:
    conversations = Conversations(services.database, ConversationSettings())
    talk = conversations.create(NewConversation("default"), [NewMessage(MessageRole.USER, "I live in Bern")])
    shown = shown_conversation(talk.id)

    assert client.get("/v1/memories/extraction").json()["effective"] is False
    answer = client.put("/v1/memories/extraction", json={"enabled": True, "model": "smollm2:135m"})
    assert (answer.json()["effective"], answer.json()["effective_model"]) == (True, "smollm2:135m")
    assert client.put("/v1/memories/extraction", json={"enabled": True, "model": "nothing"}).status_code == 404
    assert client.get(f"/v1/memories/extraction/{shown}").json()["enabled"] is None
    now = client.put(f"/v1/memories/extraction/{shown}", json={"enabled": True}).json()
    assert (now["last_message"], now["read_through"]) == (1, 1), "the past is not read"
    assert client.put(f"/v1/memories/extraction/{shown}", json={"enabled": False}).json()["enabled"] is False
    assert client.get("/v1/memories/refused").json() == {
        "refused": [],
        "reasons": {},
        "has_more": False,
        "last_id": None,
    }
