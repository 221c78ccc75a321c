"""Responses: the official client, sync and async, is the conformance test. The pool's engine is simulated."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any
from uuid import UUID, uuid4

import httpx2
import openai
import pytest
from pydantic import BaseModel

from app.api.openai import responses
from app.api.openai.road import Waiting
from app.inference.openai.responses import document
from app.inference.openai.responses.events import ResponseEvents
from app.inference.openai.responses.request import ResponsesRequest
from app.inference.token_stream import EntryKind, StreamEntry
from app.kernel.database import Database
from app.workflows.runs import views
from tests.api.openai.conftest import MODEL, StartPool
from tests.api.openai.test_chat_completions import until_state
from workers import steps

PATIENCE = 60.0
TOOL: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": True,
}


class Weather(BaseModel):
    """A form of an answer."""

    city: str
    degrees: int


@pytest.fixture
def client(api: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{api}/v1", api_key="none", max_retries=0) as made:
        yield made


def run_of(response: Any) -> UUID:
    found = document.run_id_of(response.id)
    assert found is not None
    return UUID(found)


def messages_of(database: Database, response: Any) -> list[Any]:
    """What the model was given."""
    found: list[Any] = until_state(database, run_of(response), "succeeded", "running").run.inputs["request"]["messages"]
    return found


def test_a_response_is_created_read_and_deleted(client: openai.OpenAI, start_pool: StartPool) -> None:
    start_pool()
    made = client.responses.create(
        model=MODEL, input="Hello.", instructions="Be brief.", max_output_tokens=8, metadata={"a": "b"}, user="u"
    )
    assert made.status == "completed"
    assert made.output_text.startswith("[simulated]")
    assert (made.object, made.metadata, made.user, made.instructions) == ("response", {"a": "b"}, "u", "Be brief.")
    assert made.usage is not None
    assert made.usage.output_tokens == 8
    assert made.usage.total_tokens == made.usage.input_tokens + 8
    assert made.usage.input_tokens_details.cached_tokens == 0
    found = client.responses.retrieve(made.id)
    assert found.to_dict() == made.to_dict()
    assert client.responses.delete(made.id) is None
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.delete(made.id)


def test_the_events_of_a_text_are_complete_and_numbered(client: openai.OpenAI, start_pool: StartPool) -> None:
    start_pool()
    with client.responses.stream(model=MODEL, input="Hello.", max_output_tokens=12) as stream:
        events = list(stream)
        final = stream.get_final_response()
    kinds = [event.type for event in events]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == final.output_text
    assert events[-1].type == "response.completed"
    stored = client.responses.retrieve(final.id)
    assert stored.output_text == final.output_text
    assert (stored.id, stored.usage, stored.output[0].id) == (final.id, final.usage, final.output[0].id)


def test_the_events_of_a_tool_call(client: openai.OpenAI, start_pool: StartPool) -> None:
    start_pool()
    with client.responses.stream(model=MODEL, input="Weather?", tools=[TOOL], tool_choice="required") as stream:
        events = list(stream)
        final = stream.get_final_response()
    kinds = [event.type for event in events]
    assert "response.output_text.delta" not in kinds
    assert kinds[2] == "response.output_item.added"
    assert kinds[-3:] == [
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    (call,) = final.output
    assert call.type == "function_call"
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call.arguments
    assert len(deltas) > 2
    (stored,) = client.responses.retrieve(final.id).output
    assert stored.to_dict().items() <= call.to_dict().items()


def test_a_tool_is_called_and_its_result_continues_the_chain(
    client: openai.OpenAI, start_pool: StartPool, database: Database
) -> None:
    start_pool()
    first = client.responses.create(
        model=MODEL,
        input="Weather?",
        instructions="Use the tool.",
        tools=[TOOL],
        tool_choice={"type": "function", "name": "get_weather"},
    )
    (call,) = first.output
    assert call.type == "function_call"
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "4 degrees"}
    second = client.responses.create(
        model=MODEL, input=[output], previous_response_id=first.id, tools=[TOOL], max_output_tokens=8
    )
    third = client.responses.create(model=MODEL, input="And?", previous_response_id=second.id, max_output_tokens=8)
    given = messages_of(database, third)
    assert [message["role"] for message in given] == ["user", "assistant", "tool", "assistant", "user"]
    assert given[1]["tool_calls"][0]["id"] == call.call_id
    assert given[2]["content"] == "4 degrees"
    assert given[3]["content"] == second.output_text
    assert "Use the tool." not in json.dumps(given), "instructions hold for one response"
    wrong: Any = {**output, "call_id": "call_nothing"}
    with pytest.raises(openai.BadRequestError, match="call_nothing"):
        client.responses.create(model=MODEL, input=[wrong], previous_response_id=first.id)


def test_the_client_sends_its_own_items_back(client: openai.OpenAI, start_pool: StartPool, database: Database) -> None:
    """The stateless way: the client keeps the conversation, and sends the output as input."""
    start_pool()
    first = client.responses.create(model=MODEL, input="Weather?", tools=[TOOL], tool_choice="required", store=False)
    call = first.output[0]
    assert call.type == "function_call"
    second = client.responses.create(
        model=MODEL,
        input=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
            {"type": "reasoning", "id": "rs_1", "summary": []},
            *[one.to_dict() for one in first.output],  # type: ignore[list-item] # the form of an input
            {"type": "function_call_output", "call_id": call.call_id, "output": [{"type": "input_text", "text": "4"}]},
        ],
        max_output_tokens=8,
    )
    assert [one["role"] for one in messages_of(database, second)] == ["developer", "user", "assistant", "tool"]


def test_parse_and_json_object(client: openai.OpenAI, start_pool: StartPool) -> None:
    start_pool()
    parsed = client.responses.parse(model=MODEL, input="Weather?", text_format=Weather)
    assert isinstance(parsed.output_parsed, Weather)
    with client.responses.stream(model=MODEL, input="Weather?", text_format=Weather) as stream:
        assert stream.get_final_response().output_parsed == parsed.output_parsed
    plain = client.responses.create(model=MODEL, input="JSON!", text={"format": {"type": "json_object"}})
    assert isinstance(json.loads(plain.output_text), dict)


def test_log_probabilities_come_if_they_are_asked_for(client: openai.OpenAI, start_pool: StartPool) -> None:
    start_pool()
    request: Any = {"model": MODEL, "input": "Hello.", "max_output_tokens": 8, "top_logprobs": 2}
    made = client.responses.create(**request, include=["message.output_text.logprobs"])
    part = made.output[0].content[0]  # type: ignore[union-attr] # it is a message
    assert part.type == "output_text"
    assert part.logprobs is not None
    assert {len(one.top_logprobs) for one in part.logprobs} == {2}
    with client.responses.stream(**request) as stream:
        deltas = [event for event in stream if event.type == "response.output_text.delta"]
    assert [one.token for event in deltas for one in event.logprobs] == [one.token for one in part.logprobs]


def test_the_async_client(api: str, start_pool: StartPool) -> None:
    start_pool()

    async def use() -> None:
        async with openai.AsyncOpenAI(base_url=f"{api}/v1", api_key="none") as client:
            made = await client.responses.create(model=MODEL, input="Hello.", max_output_tokens=8)
            async with client.responses.stream(
                model=MODEL, input="Go on.", previous_response_id=made.id, max_output_tokens=8
            ) as stream:
                final = await stream.get_final_response()
            found = await client.responses.retrieve(final.id)
            assert found.output_text == final.output_text
            assert found.previous_response_id == made.id
            assert [item.type async for item in client.responses.input_items.list(final.id)] == ["message"]
            parsed = await client.responses.parse(model=MODEL, input="Weather?", text_format=Weather)
            assert isinstance(parsed.output_parsed, Weather)
            await client.responses.delete(final.id)

    asyncio.run(use())


def test_input_items_are_listed_page_by_page(client: openai.OpenAI, start_pool: StartPool) -> None:
    start_pool()
    given: Any = [{"role": "user", "content": f"{number}"} for number in range(5)]
    made = client.responses.create(model=MODEL, input=given, max_output_tokens=4)
    listed = [item.content[0].text for item in client.responses.input_items.list(made.id, order="asc", limit=2)]  # type: ignore[union-attr] # all are messages of text
    assert listed == ["0", "1", "2", "3", "4"], "the client follows the pages"
    newest = client.responses.input_items.list(made.id, limit=1)
    assert newest.data[0].content[0].text == "4"  # type: ignore[union-attr] # as above
    assert newest.has_more
    with pytest.raises(openai.BadRequestError):
        client.responses.input_items.list(made.id, after="nothing")


def test_a_response_that_is_not_stored_is_not_found(client: openai.OpenAI, start_pool: StartPool) -> None:
    start_pool()
    made = client.responses.create(model=MODEL, input="Hello.", max_output_tokens=4, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=MODEL, input="And?", previous_response_id=made.id)
    assert (caught.value.code, caught.value.param) == ("previous_response_not_found", "previous_response_id")


@pytest.mark.parametrize("id_", ["resp_0", f"resp_{'0' * 32}", f"msg_{'0' * 32}", "resp_" + "x" * 32])
def test_an_unknown_id_is_not_found(client: openai.OpenAI, id_: str) -> None:
    for action in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError) as caught:
            action(id_)
        assert caught.value.type == "invalid_request_error"


def test_a_run_that_is_no_response_is_not_found(
    client: openai.OpenAI, start_pool: StartPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.api.openai.responses_store._RECORDED_WITHIN", 0.5)
    start_pool()
    chat = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x"}], max_tokens=4)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(chat.id.replace("chatcmpl-", "resp_"))


def test_a_response_in_the_background_goes_on_without_its_client(
    client: openai.OpenAI, start_pool: StartPool, database: Database
) -> None:
    made = client.responses.create(model=MODEL, input="Hello.", background=True, max_output_tokens=6)
    assert made.status == "queued"
    assert client.responses.retrieve(made.id).status == "queued"
    with pytest.raises(openai.BadRequestError, match="no answer: it is queued"):
        client.responses.create(model=MODEL, input="And?", previous_response_id=made.id)
    with pytest.raises(openai.BadRequestError, match="still in progress"):
        client.responses.delete(made.id)
    step = views.run(database, run_of(made)).steps[0]
    steps.run_step(start_pool().runtime, step.id, 1)
    found = client.responses.retrieve(made.id)
    assert (found.status, found.background) == ("completed", True)
    assert found.usage is not None
    assert found.usage.output_tokens == 6


def test_a_response_in_the_background_is_cancelled(client: openai.OpenAI) -> None:
    made = client.responses.create(model=MODEL, input="Hello.", background=True)
    assert client.responses.cancel(made.id).status == "cancelled"
    assert client.responses.retrieve(made.id).status == "cancelled"
    assert client.responses.cancel(made.id).status == "cancelled", "once more changes nothing"


def test_only_a_response_in_the_background_is_cancelled(client: openai.OpenAI, start_pool: StartPool) -> None:
    start_pool()
    made = client.responses.create(model=MODEL, input="Hello.", max_output_tokens=4)
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(made.id)


def test_a_stream_in_the_background_is_resumed(
    client: openai.OpenAI, start_pool: StartPool, database: Database
) -> None:
    stream = client.responses.create(model=MODEL, input="Hello.", background=True, stream=True, max_output_tokens=30)
    kinds, response_id, last = [], "", -1
    for event in stream:
        kinds.append(event.type)
        last = event.sequence_number
        if event.type == "response.created":
            response_id = event.response.id
        if event.type == "response.in_progress":
            stream.close()
            break
    assert kinds == ["response.created", "response.queued", "response.in_progress"]
    run_id = UUID(document.run_id_of(response_id))
    pool = start_pool(tokens_per_second=50)
    working = threading.Thread(target=steps.run_step, args=(pool.runtime, views.run(database, run_id).steps[0].id, 1))
    working.start()
    rest = list(client.responses.retrieve(response_id, stream=True, starting_after=last))
    working.join(PATIENCE)
    assert [event.sequence_number for event in rest] == list(range(last + 1, last + 1 + len(rest)))
    assert rest[-1].type == "response.completed"
    again = list(client.responses.retrieve(response_id, stream=True))
    assert [event.to_dict() for event in again[last + 1 :]] == [event.to_dict() for event in rest]


def test_a_failure_ends_a_stream_with_its_event(
    client: openai.OpenAI, start_pool: StartPool, database: Database
) -> None:
    start_pool(slots=1, tokens_per_second=10)
    stream = client.responses.create(model=MODEL, input="Hello.", stream=True, max_output_tokens=5000)
    last: Any = None
    for event in stream:
        last = event
        if event.type == "response.output_text.delta" and event.sequence_number == 4:
            run_id = UUID(stream.response.headers["X-Arriero-Run"])
            until_state(database, run_id, "running")
            httpx2.post(f"{client.base_url}runs/{run_id}/cancel", timeout=PATIENCE)
    assert last.type == "response.failed"
    assert last.response.status == "cancelled"
    assert last.response.output[0].content[0].text


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a hosted tool": ({"tools": [{"type": "web_search"}]}, "'web_search' is not available here"),
    "an image": (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        "names no image",
    ),
    "an item of a hosted tool": ({"input": [{"type": "web_search_call", "id": "x"}]}, "'web_search_call'"),
    "a reference": ({"input": [{"type": "item_reference", "id": "x"}]}, "'item_reference'"),
    "a prompt": ({"prompt": {"id": "pmpt_1"}}, "'prompt'"),
    "a moderation": ({"moderation": {"model": "x"}}, "'moderation'"),
    "an unknown choice": ({"tools": [TOOL], "tool_choice": {"type": "mcp"}}, "'mcp'"),
    "a choice that is no tool": ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "f"}}, "get_weather"),
    "broken arguments": (
        {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{"}]},
        "not a JSON object",
    ),
    "a schema that is missing": ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "schema is missing"),
    "nothing": ({"input": []}, "at least 1 item"),
    "no input": ({"input": None}, "input"),
    "only reasoning": ({"input": [{"type": "reasoning"}]}, "nothing that a model could read"),
    "too much metadata": ({"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
    "NUL": ({"input": "a\x00b"}, "NUL"),
    "background that is not stored": ({"background": True, "store": False}, "store"),
}


@pytest.mark.parametrize(("more", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(api: str, more: dict[str, Any], message: str) -> None:
    answer = httpx2.post(f"{api}/v1/responses", json={"model": MODEL, "input": "x", **more}, timeout=PATIENCE)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert message in error["message"]
    assert "<" not in f"{error['param']}", "names of the code are not shown"


def test_the_wrong_field_is_named(api: str) -> None:
    body = {"model": MODEL, "input": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]}
    answer = httpx2.post(f"{api}/v1/responses", json=body, timeout=PATIENCE)
    assert answer.json()["error"]["param"] == "input.0.content.0"


def test_allowed_tools_are_the_only_ones(client: openai.OpenAI, start_pool: StartPool, database: Database) -> None:
    start_pool()
    other: Any = {**TOOL, "name": "set_alarm"}
    choice: Any = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "set_alarm"}]}
    made = client.responses.create(model=MODEL, input="x", tools=[TOOL, other], tool_choice=choice)
    assert made.output[0].name == "set_alarm"  # type: ignore[union-attr] # it is a call
    assert made.tool_choice.to_dict() == choice  # type: ignore[union-attr] # it is no mode
    stored = until_state(database, run_of(made), "succeeded").run.inputs["request"]
    assert [tool["function"]["name"] for tool in stored["tools"]] == ["set_alarm"]


def test_a_foreign_namespace_finds_nothing(api: str, client: openai.OpenAI, start_pool: StartPool) -> None:
    start_pool()

    def headers(namespace: str) -> dict[str, str]:
        key = {"name": namespace, "scopes": ["submit", "read"], "namespace": namespace}
        made = httpx2.post(f"{api}/v1/keys", json=key, timeout=PATIENCE).json()
        return {"Authorization": f"Bearer {made['key']}"}

    own, foreign = headers("own"), headers("foreign")
    body = {"model": MODEL, "input": "x", "max_output_tokens": 4}
    id_ = httpx2.post(f"{api}/v1/responses", json=body, headers=own, timeout=PATIENCE).json()["id"]
    assert httpx2.get(f"{api}/v1/responses/{id_}", headers=own, timeout=PATIENCE).json()["status"] == "completed"
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
        found, unknown = (
            httpx2.request(method, f"{api}/v1/responses/{one}{path}", headers=foreign, timeout=PATIENCE)
            for one in (id_, f"resp_{'0' * 32}")
        )
        assert found.status_code == 404
        assert found.text.replace(id_, "") == unknown.text.replace(f"resp_{'0' * 32}", "")
    continued = {**body, "previous_response_id": id_}
    refused = httpx2.post(f"{api}/v1/responses", json=continued, headers=foreign, timeout=PATIENCE)
    assert refused.json()["error"]["code"] == "previous_response_not_found"
    assert httpx2.post(f"{api}/v1/responses", json=continued, headers=own, timeout=PATIENCE).status_code == 200
    assert client.responses.retrieve(id_).id == id_, "a caller for all namespaces finds it"


def test_a_service_tier_sets_the_class(client: openai.OpenAI, database: Database) -> None:
    made = client.responses.create(model=MODEL, input="x", background=True, service_tier="flex")
    assert made.service_tier == "flex"
    assert until_state(database, run_of(made), "queued").run.priority == "batch"


def test_a_call_that_is_cut_makes_the_response_incomplete(client: openai.OpenAI, start_pool: StartPool) -> None:
    start_pool()
    request: Any = {"model": MODEL, "input": "x", "tools": [TOOL], "tool_choice": "required", "max_output_tokens": 2}
    events = list(client.responses.create(**request, stream=True))
    last = events[-1]
    assert last.type == "response.incomplete"
    assert last.response.status == "incomplete"
    assert last.response.incomplete_details is not None
    assert last.response.incomplete_details.reason == "max_output_tokens"
    (call,) = last.response.output
    assert (call.type, call.status) == ("function_call", "incomplete")
    assert "response.function_call_arguments.done" not in [event.type for event in events]
    assert client.responses.create(**request).status == "incomplete"


def test_a_chain_of_responses_costs_one_read_each(
    client: openai.OpenAI, start_pool: StartPool, database: Database
) -> None:
    """The first responses may be deleted: the last one has the whole conversation."""
    start_pool()
    ids: list[str] = []
    for number in range(4):
        made = client.responses.create(
            model=MODEL, input=f"turn {number}", previous_response_id=ids[-1] if ids else None, max_output_tokens=4
        )
        ids.append(made.id)
    for id_ in ids[:-1]:
        client.responses.delete(id_)
    made = client.responses.create(model=MODEL, input="the last", previous_response_id=ids[-1], max_output_tokens=4)
    given = messages_of(database, made)
    assert [one["content"] for one in given if one["role"] == "user"] == [*(f"turn {n}" for n in range(4)), "the last"]


def test_a_conversation_is_bounded(client: openai.OpenAI, start_pool: StartPool, monkeypatch: Any) -> None:
    start_pool()
    monkeypatch.setattr("app.inference.openai.responses.request.MAX_CHARACTERS", 100)
    made = client.responses.create(model=MODEL, input="x" * 60, max_output_tokens=4)
    with pytest.raises(openai.BadRequestError, match="the conversation has"):
        client.responses.create(model=MODEL, input="y" * 60, previous_response_id=made.id)


def test_it_is_listed_at_once(client: openai.OpenAI, start_pool: StartPool) -> None:
    """An answer is recorded after it was sent; a reader that is quick waits for that."""
    start_pool()
    started = time.monotonic()
    for _ in range(5):
        made = client.responses.create(model=MODEL, input="x", max_output_tokens=4)
        assert client.responses.retrieve(made.id).status == "completed"
    assert time.monotonic() - started < PATIENCE


def test_a_stream_has_the_id_of_the_run_that_answers() -> None:
    """A call that waits may fall back to another model, which is another run."""
    runs = [uuid4(), uuid4()]

    async def entries() -> AsyncGenerator[StreamEntry | Waiting]:
        yield StreamEntry("1-1", EntryKind.BEGUN, "pool")
        yield Waiting("falling back")
        runs.pop(0)
        yield StreamEntry("1-1", EntryKind.BEGUN, "pool")
        yield StreamEntry("1-2", EntryKind.TEXT, "Hi")

    def events() -> ResponseEvents:
        return ResponseEvents(ResponsesRequest(model="m:1", input="x"), str(runs[0]), 0)

    async def read() -> str:
        return "".join([text async for text in responses._events(Waiting("loading"), entries(), events)])

    last, text = runs[1], asyncio.run(read())
    assert text.startswith(": loading\n\n: falling back\n\nevent: response.created")
    assert set(re.findall(r'"resp_(\w+)"', text)) == {last.hex}
