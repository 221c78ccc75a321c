"""Deletion for real, and its proof; retention of namespaces; search."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import httpx2
import pytest
import redis
from sqlalchemy import text
from sqlmodel import SQLModel

from app.kernel.database import Database
from app.kernel.sections.memory import ConversationSettings
from app.memory.conversations import retention
from app.memory.conversations.message import MessageRole, NewMessage
from app.memory.conversations.service import Conversations, parsed_conversation
from app.memory.memories import service as memories
from app.memory.memories.kinds import MemoryKind
from app.memory.memories.memory import NewMemory

URL = "/v1/conversations"
#: A text that only what is deleted has.
MARK = "zanzibarian"


@pytest.fixture
def http(api: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=api, trust_env=False) as made:
        yield made


def tables_with(database: Database, mark: str) -> set[str]:
    """The tables of which a row has a text, whatever its columns are."""
    found = set()
    with database.work() as work:
        for table in SQLModel.metadata.tables:
            if work.row(
                text(f"SELECT 1 FROM {table} AS one WHERE strpos(CAST(one AS text), :mark) > 0"), {"mark": mark}
            ):
                found.add(table)
    return found


def keys_with(valkey: redis.Redis, mark: str) -> list[str]:
    return [key for key in valkey.scan_iter() if valkey.type(key) == "hash" and mark in str(valkey.hgetall(key))]


def run_with(http: httpx2.Client, content: str) -> str:
    """A run that waits, and holds a text in its inputs, too long for its row."""
    flow = {"workflow": "w", "inputs": {"t": {"type": "string"}}, "steps": [{"id": "w", "kind": "wait", "for": "1h"}]}
    body = {"definition": flow, "inputs": {"t": content + "x" * 70_000}}
    return str(http.post("/v1/runs", json=body).raise_for_status().json()["id"])


def conversation_with(http: httpx2.Client, database: Database, content: str, **fields: Any) -> tuple[str, UUID]:
    """A conversation that says a text, with a run and a memory that stem from it, read once."""
    items = [{"role": "user", "content": f"{content} is what I say"}]
    shown = str(http.post(URL, json={"items": items, "title": content, **fields}).raise_for_status().json()["id"])
    id_ = parsed_conversation(shown)
    assert id_ is not None
    run_id = UUID(run_with(http, content))
    answer = NewMessage(MessageRole.ASSISTANT, f"so {content}", run_id=run_id)
    Conversations(database, ConversationSettings()).append(id_, None, [answer])
    new = NewMemory(f"They say {content} in {shown}.", MemoryKind.FACT, fields.get("user"), id_)
    memories.remember(database, new, "default", "test")
    assert http.get(f"{URL}/{shown}/items").raise_for_status().json()["data"]
    return shown, id_


def test_nothing_of_a_deleted_conversation_is_left(
    http: httpx2.Client, database: Database, valkey: redis.Redis
) -> None:
    shown, _ = conversation_with(http, database, MARK)
    other, _ = conversation_with(http, database, "something else")
    assert {"conversation", "conversation_message", "memory", "passage", "payload"} <= tables_with(database, MARK)
    assert keys_with(valkey, MARK)

    proof = http.delete(f"{URL}/{shown}").raise_for_status().json()

    assert (proof["deleted"], proof["proved"], proof["notes"]) == (True, True, [])
    assert set(proof["left"].values()) == {0}
    assert (
        proof["removed"] | {"passages and vectors": 2, "messages": 2, "conversations": 1, "runs": 1, "memories": 1}
        == proof["removed"]
    )
    assert tables_with(database, MARK) == set()
    assert keys_with(valkey, MARK) == []
    assert http.get(f"{URL}/search", params={"q": MARK}).json()["data"] == []
    assert http.get(f"{URL}/{other}").json()["messages"] == 2
    assert "memory" in tables_with(database, "something else")


def test_nothing_of_a_deleted_user_is_left(http: httpx2.Client, database: Database, valkey: redis.Redis) -> None:
    user = "Ada / Bo"
    made = [conversation_with(http, database, MARK, user=user) for _ in range(2)]
    for shown, id_ in made:
        http.put(f"/v1/memories/extraction/{shown}", json={"enabled": True}).raise_for_status()
        assert "memory_extraction" in tables_with(database, str(id_))
    other, _ = conversation_with(http, database, "something else", user="other")
    path = "/v1/users/Ada%20%2F%20Bo/memory"
    stored = http.get(path).raise_for_status().json()["stored"]
    assert (stored["conversations"], stored["messages"], stored["memories"]) == (2, 4, 2)

    proof = http.delete(path).raise_for_status().json()

    assert (proof["user"], proof["proved"], proof["removed"]["conversations"]) == (user, True, 2)
    assert set(proof["left"].values()) == {0}
    assert tables_with(database, MARK) == set()
    assert all("memory_extraction" not in tables_with(database, str(id_)) for _, id_ in made)
    assert keys_with(valkey, MARK) == []
    assert http.get(f"{URL}/{other}").json()["messages"] == 2
    again = http.delete(path).json()
    assert (again["proved"], again["removed"]) == (True, {})


def test_a_key_of_another_namespace_deletes_nothing_of_a_user(http: httpx2.Client, database: Database) -> None:
    conversation_with(http, database, MARK, user="ada")
    body = {"name": "k", "scopes": ["operate", "read"], "namespace": "red"}
    foreign = {"Authorization": f"Bearer {http.post('/v1/keys', json=body).json()['key']}"}

    assert http.delete("/v1/users/ada/memory", params={"namespace": "default"}, headers=foreign).status_code == 422
    proof = http.delete("/v1/users/ada/memory", headers=foreign).json()
    assert (proof["namespace"], proof["removed"]) == ("red", {})
    assert set(http.get("/v1/users/ada/memory", headers=foreign).json()["stored"].values()) == {0}
    assert http.get("/v1/users/ada/memory").json()["stored"]["conversations"] == 1


def test_the_search_finds_messages_in_one_or_all_conversations(http: httpx2.Client) -> None:
    def made(*texts: str, **fields: Any) -> str:
        items = [{"role": "user", "content": one} for one in texts]
        return str(http.post(URL, json={"items": items, **fields}).raise_for_status().json()["id"])

    tea = made("I drink green tea", "The lease ends in May", user="ada")
    rent = made("When does the lease end?", user="bo")

    def found(path: str = "/search", **parameters: Any) -> list[tuple[str, int]]:
        answer = http.get(URL + path, params=parameters).raise_for_status().json()
        assert answer["lexical"]["used"]
        assert answer["dense"]["used"] or answer["dense"]["reason"]
        return [(one["conversation"], one["seq"]) for one in answer["data"]]

    assert set(found(q="lease")) >= {(tea, 2), (rent, 1)}
    assert {one for one, _ in found(q="lease", user="ada")} == {tea}
    assert found(f"/{tea}/search", q="lease", limit=1) == [(tea, 2)]
    assert found(q="zebra") == []
    fork = http.post(f"{URL}/{tea}/fork", json={}).json()["id"]
    assert (fork, 2) in found(q="lease")
    item = http.get(f"{URL}/{tea}/items", params={"limit": 1}).json()["data"][0]["id"]
    http.delete(f"{URL}/{tea}/items/{item}").raise_for_status()
    assert (tea, 2) not in found(q="lease")
    assert (fork, 2) in found(q="lease")


def test_the_retention_of_a_namespace(http: httpx2.Client, database: Database) -> None:
    path = "/v1/namespaces/default/retention"
    assert http.get(path).json() == {"namespace": "default", "conversations": None, "origin": "settings"}
    assert http.put(path, json={"conversations": "90d"}).json()["conversations"] == "90d"
    with database.work() as work:
        assert retention.find_for(work, "default") == retention.NamespaceRetention(timedelta(days=90))
    assert http.put(path, json={"conversations": None}).json() == {
        "namespace": "default", "conversations": None, "origin": "namespace",
    }  # fmt: skip
    assert http.delete(path).json()["origin"] == "settings"
    for wrong in ({}, {"conversations": "0s"}, {"conversations": "-1d"}, {"other": 1}):
        assert http.put(path, json=wrong).status_code == 422
