"""Conversations with the official client, and what Arriero adds."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import redis
from openai import AsyncOpenAI, BadRequestError, NotFoundError, OpenAI

from app.kernel.sections.memory import ConversationSettings
from app.kernel.settings import Settings

URL = "/v1/conversations"
NOWHERE = "conv_01a200000000700080000000000000aa"


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Small limits."""
    small = ConversationSettings(max_messages=50, max_message_bytes=2_000, window_messages=4)
    return settings.model_copy(update={"conversations": small})


@pytest.fixture
def client(api: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{api}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
def http(api: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=api, trust_env=False) as made:
        yield made


def said(text: str, role: str = "user") -> Any:
    return {"type": "message", "role": role, "content": text}


def created(http: httpx2.Client, *texts: str, **fields: Any) -> str:
    body = {"items": [said(text) for text in texts], **fields}
    return str(http.post(URL, json=body).raise_for_status().json()["id"])


def test_the_life_of_a_conversation_with_the_official_client(client: OpenAI) -> None:
    made = client.conversations.create(metadata={"topic": "tea"}, items=[said("Hello")])
    assert (made.object, made.metadata) == ("conversation", {"topic": "tea"})
    call: Any = {"type": "function_call", "call_id": "call_1", "name": "brew", "arguments": '{"leaf": "green"}'}
    output: Any = {"type": "function_call_output", "call_id": "call_1", "output": "brewed"}
    reasoning: Any = {"type": "reasoning", "summary": []}
    added = client.conversations.items.create(
        made.id, items=[reasoning, call, output, said("Here you are", "assistant")]
    )

    assert [item.type for item in added.data] == ["function_call", "function_call_output", "message"]
    assert (added.first_id, added.last_id, added.has_more) == (added.data[0].id, added.data[2].id, False)
    whole = list(client.conversations.items.list(made.id, order="asc", limit=2))
    assert whole[1:] == added.data
    assert [item.id for item in client.conversations.items.list(made.id, limit=1)] == [one.id for one in whole[::-1]]
    asked, answered = whole[0], whole[3]
    assert asked.type == answered.type == "message"
    assert asked.content[0].to_dict() == {"type": "input_text", "text": "Hello"}
    assert answered.content[0].to_dict()["type"] == "output_text"
    assert client.conversations.items.retrieve(whole[1].id, conversation_id=made.id) == whole[1]
    left = client.conversations.items.delete(asked.id, conversation_id=made.id)
    assert left.id == made.id
    assert [item.id for item in client.conversations.items.list(made.id, order="asc")] == [one.id for one in whole[1:]]
    changed = client.conversations.update(made.id, metadata={"topic": "coffee"})
    assert changed.metadata == client.conversations.retrieve(made.id).metadata == {"topic": "coffee"}
    assert client.conversations.delete(made.id).deleted
    with pytest.raises(NotFoundError, match="no conversation 'conv_"):
        client.conversations.retrieve(made.id)
    with pytest.raises(NotFoundError):
        client.conversations.items.list(made.id)


def test_the_official_client_with_asyncio(api: str) -> None:
    async def live() -> None:
        async with AsyncOpenAI(base_url=f"{api}/v1", api_key="none", max_retries=0) as client:
            made = await client.conversations.create(items=[said("one")])
            adding = [client.conversations.items.create(made.id, items=[said("q"), said("a", "assistant")])] * 1
            await asyncio.gather(*adding)
            texts = [item.content[0].text async for item in client.conversations.items.list(made.id, order="asc")]  # type: ignore[union-attr] # all items are messages with texts
            assert texts == ["one", "q", "a"]
            assert (await client.conversations.delete(made.id)).deleted

    asyncio.run(live())


def test_messages_with_several_items_are_read_item_by_item(http: httpx2.Client) -> None:
    id_ = created(http, "first")
    calls = [{"id": name, "type": "function", "function": {"name": name, "arguments": "{}"}} for name in "abc"]
    message = {
        "role": "assistant",
        "content": "I call",
        "tool_calls": calls,
        "model": "m:1b",
        "tokens": 4,
        "name": "Bo",
    }
    body = {"messages": [message, {"role": "tool", "content": "done", "tool_call_id": "a"}]}
    stored = http.post(f"{URL}/{id_}/messages", json=body).raise_for_status().json()["data"]
    assert {name: stored[0][name] for name in message} == message

    for order in ("asc", "desc"):
        pages: list[Any] = []
        after = None
        while after is None or pages[-1]["has_more"]:
            parameters: dict[str, Any] = {"limit": 2, "order": order} | ({} if after is None else {"after": after})
            pages.append(http.get(f"{URL}/{id_}/items", params=parameters).raise_for_status().json())
            after = pages[-1]["last_id"]
        found = [item["type"] for page in pages for item in page["data"]]
        expected = ["message", "message", *["function_call"] * 3, "function_call_output"]
        assert found == (expected if order == "asc" else expected[::-1])
        assert len({item["id"] for page in pages for item in page["data"]}) == 6
    whole = http.get(f"{URL}/{id_}/items", params={"order": "asc"}).json()["data"]
    one = http.delete(f"{URL}/{id_}/items/{whole[2]['id']}")
    assert one.status_code == 409
    assert whole[1]["id"] in one.json()["error"]["message"]
    assert http.get(f"{URL}/{id_}").json()["roles"]["assistant"] == {"messages": 1, "tokens": 4}


def test_lists_are_filtered_and_read_part_by_part(http: httpx2.Client) -> None:
    ids = [created(http, user="ada" if n % 2 else "bo", title=f"Talk {n}", metadata={"n": str(n)}) for n in range(6)]

    def listed(**parameters: Any) -> list[str]:
        answer = http.get(URL, params=parameters).raise_for_status().json()
        return [one["id"] for one in answer["data"]]

    assert listed() == ids[::-1]
    assert listed(order="asc", user="ada") == ids[1::2]
    assert listed(metadata="n:3") == [ids[3]]
    assert listed(title="talk 4") == [ids[4]]
    assert listed(limit=2, after=ids[4]) == [ids[3], ids[2]]
    assert listed(since="2000-01-01T00:00:00Z", until="2001-01-01T00:00:00Z") == []
    wrong = http.get(URL, params={"metadata": "n"})
    assert wrong.status_code == 400
    assert "query.metadata[0]: 'n' is no entry of metadata; accepted: key:value" in wrong.text
    assert http.get(URL, params={"since": "2000-01-01"}).status_code == 400


def test_a_fork_goes_its_own_way(http: httpx2.Client) -> None:
    id_ = created(http, "one", "two", "three", user="ada", title="Tea", metadata={"a": "b"}, retention="30d")
    at = http.get(f"{URL}/{id_}/items", params={"order": "asc"}).json()["data"][1]["id"]
    fork = http.post(f"{URL}/{id_}/fork", json={"at": at}).raise_for_status().json()

    assert (fork["forked_from"], fork["forked_at"], fork["messages"], fork["bytes"]) == (id_, 2, 2, 6)
    assert (fork["user"], fork["title"], fork["metadata"], fork["retention"]) == ("ada", "Tea", {"a": "b"}, "30d")
    http.post(f"{URL}/{fork['id']}/items", json={"items": [said("other")]}).raise_for_status()
    texts = {
        one: [message["content"] for message in http.get(f"{URL}/{one}/messages").json()["data"]]
        for one in (id_, fork["id"])
    }
    assert texts == {id_: ["one", "two", "three"], fork["id"]: ["one", "two", "other"]}
    assert http.post(f"{URL}/{id_}/fork", json={}).json()["messages"] == 3
    assert http.post(f"{URL}/{id_}/fork", json={"at": 9}).status_code == 400
    assert http.post(f"{URL}/{id_}/fork", json={"at": "msg_0"}).status_code == 404


def test_an_export_can_be_appended_again(http: httpx2.Client) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": "```"}'}}
    id_ = created(http, *[f"text {n}\n\u2028" for n in range(5)], title="Tea\ntime", user="ada")
    body = {"messages": [{"role": "assistant", "content": "", "tool_calls": [call], "name": "Bo"}]}
    http.post(f"{URL}/{id_}/messages", json=body).raise_for_status()

    lines = http.get(f"{URL}/{id_}/export")
    messages = [json.loads(line) for line in lines.content.decode().split("\n")[:-1]]
    other = created(http)
    http.post(f"{URL}/{other}/messages", json={"messages": messages}).raise_for_status()
    again = http.get(f"{URL}/{other}/export").content.decode().split("\n")[:-1]
    without = [{k: v for k, v in json.loads(line).items() if k not in ("id", "created_at")} for line in again]
    assert without == [{k: v for k, v in one.items() if k not in ("id", "created_at")} for one in messages]
    text = http.get(f"{URL}/{id_}/export", params={"format": "markdown"}).text
    assert text.startswith("# Tea time\n")
    assert '````json\n{"a": "```"}\n````' in text


def test_limits_are_named(http: httpx2.Client, client: OpenAI) -> None:
    id_ = created(http)
    many = [said("x")] * 51
    assert "at most 50 messages" in http.post(f"{URL}/{id_}/items", json={"items": many}).json()["error"]["message"]
    with pytest.raises(BadRequestError, match="2001 bytes; accepted: at most 2000") as refused:
        client.conversations.items.create(id_, items=[said("x" * 2001)])
    assert refused.value.param == "items[0]"
    for body, field in (
        ({"metadata": {str(n): "" for n in range(17)}}, "body.metadata"),
        ({"metadata": {"a": "x" * 513}}, "body.metadata"),
        ({"user": "x" * 201}, "body.user"),
        ({"user": "\x00"}, "body.user"),
        ({"title": "x" * 501}, "body.title"),
        ({"retention": "0s"}, "body.retention"),
        ({"items": [{"type": "web_search_call"}]}, "body.items"),
        ({"items": [said("x")] * 1001}, "body.items"),
    ):
        answer = http.post(URL, json=body)
        assert (answer.status_code, answer.json()["error"]["param"][: len(field)]) == (400, field), answer.text
    assert http.post(f"{URL}/{id_}/items", json={"items": []}).status_code == 400
    assert http.post(f"{URL}/{id_}/messages", json={"messages": [{"role": "tool", "content": "x"}]}).status_code == 400
    assert http.get(f"{URL}/{id_}/items", params={"limit": 101}).status_code == 400


def test_an_append_that_is_sent_twice_is_done_once(http: httpx2.Client) -> None:
    id_ = created(http, "first")
    headers = {"Idempotency-Key": "once"}

    def append(*texts: str, path: str = "items") -> httpx2.Response:
        body: Any = {"items": [said(text) for text in texts]}
        return http.post(f"{URL}/{id_}/{path}", json=body, headers=headers)

    answers = [append("one", "two").raise_for_status().json() for _ in range(2)]
    assert answers[0] == answers[1]
    assert http.get(f"{URL}/{id_}").json()["messages"] == 3
    for others in (("one",), ("one", "two", "three"), ("one", "other")):
        assert (append(*others).status_code, http.get(f"{URL}/{id_}").json()["messages"]) == (409, 3)
    other = created(http)
    again = http.post(f"{URL}/{other}/items", json={"items": [said("one")]}, headers=headers)
    assert again.json()["data"][0]["seq"] == 1


def test_the_wiped_redis_is_not_seen(http: httpx2.Client, valkey: redis.Redis) -> None:
    id_ = created(http, "one", "two", "three", "four", "five")

    def seen() -> tuple[Any, ...]:
        paths = [f"{URL}/{id_}", f"{URL}/{id_}/items?limit=3", f"{URL}/{id_}/messages?order=desc&limit=2"]
        return tuple(http.get(path).raise_for_status().json() for path in paths)

    before = seen()
    assert seen() == before
    valkey.flushdb()
    assert seen() == before


def test_a_key_of_another_namespace_meets_nothing(http: httpx2.Client) -> None:
    def key(namespace: str) -> dict[str, str]:
        body = {"name": "k", "scopes": ["submit", "read", "operate"], "namespace": namespace}
        return {"Authorization": f"Bearer {http.post('/v1/keys', json=body).json()['key']}"}

    owner, foreign = key("blue"), key("red")
    body = {"items": [said("secret of blue")], "user": "ada", "title": "blue"}
    made = http.post(URL, json=body, headers=owner).json()
    assert made["namespace"] == "blue"
    item = http.get(f"{URL}/{made['id']}/items", headers=owner).json()["data"][0]["id"]
    own = http.post(URL, json={}, headers=foreign).json()["id"]
    for method, path, sent in [
        ("GET", "/{id}", None), ("POST", "/{id}", {"title": "x"}), ("DELETE", "/{id}", None),
        ("GET", "/{id}/items", None), ("POST", "/{id}/items", {"items": [said("x")]}),
        ("GET", f"/{{id}}/items/{item}", None), ("DELETE", f"/{{id}}/items/{item}", None),
        ("GET", "/{id}/messages", None), ("POST", "/{id}/messages", {"messages": [{"role": "user", "content": "x"}]}),
        ("POST", "/{id}/fork", {}), ("GET", "/{id}/export", None),
    ]:  # fmt: skip
        answers = [
            http.request(method, URL + path.format(id=id_), json=sent, headers=foreign) for id_ in (made["id"], NOWHERE)
        ]
        assert [answer.status_code for answer in answers] == [404, 404], (method, path)
        assert answers[0].text.replace(made["id"], NOWHERE) == answers[1].text
    assert http.get(f"{URL}/{own}/items/{item}", headers=foreign).status_code == 404
    assert http.delete(f"{URL}/{own}/items/{item}", headers=foreign).status_code == 404
    assert [one["id"] for one in http.get(URL, headers=foreign).json()["data"]] == [own]
    assert http.get(URL, params={"namespace": "blue"}, headers=foreign).status_code == 400
    assert http.post(URL, params={"namespace": "blue"}, json={}, headers=foreign).status_code == 400
    assert [one["id"] for one in http.get(URL, params={"namespace": "blue"}).json()["data"]] == [made["id"]]
    assert http.get(f"{URL}/{made['id']}/items", headers=owner).json()["data"][0]["id"] == item
