"""Streams with several choices, log-probabilities or tool calls: all of it comes piece by piece."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import openai
import pytest
import redis

from app.inference import direct, token_stream
from tests.api.openai.conftest import MODEL, StartPool

PATIENCE = 60.0
HELLO: Any = [{"role": "user", "content": "Hello."}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture
def client(api: str, start_pool: StartPool) -> Any:
    start_pool()
    with openai.OpenAI(base_url=f"{api}/v1", api_key="none") as made:
        yield made


def joined(chunks: list[Any], index: int) -> tuple[str, list[Any], list[str | None]]:
    """Text, log-probabilities and finish reasons of a choice."""
    of_index = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    text = "".join(choice.delta.content or "" for choice in of_index)
    found = [one for choice in of_index if choice.logprobs for one in choice.logprobs.content]
    return text, found, [choice.finish_reason for choice in of_index if choice.finish_reason]


def test_each_choice_streams_with_its_log_probabilities(client: Any) -> None:
    request = {"model": MODEL, "messages": HELLO, "max_tokens": 12, "n": 3, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**request)
    chunks = list(client.chat.completions.create(**request, stream=True))
    assert len({choice.message.content for choice in whole.choices}) == 3
    for choice in whole.choices:
        text, found, finished = joined(chunks, choice.index)
        assert text == choice.message.content
        assert [one.token for one in found] == [one.token for one in choice.logprobs.content]
        assert {len(one.top_logprobs) for one in found} == {2}
        assert finished == [choice.finish_reason]
    order = [chunk.choices[0].index for chunk in chunks if chunk.choices[0].delta.content]
    assert order.index(2) < len(order) - order[::-1].index(0), "the choices are written side by side"
    first = {chunk.choices[0].index: chunk.choices[0].delta.role for chunk in reversed(chunks)}
    assert first == dict.fromkeys(range(3), "assistant")


def test_completions_stream_their_own_form_of_log_probabilities(client: Any) -> None:
    request = {"model": MODEL, "prompt": "Once", "max_tokens": 8, "n": 2, "logprobs": 1}
    whole = client.completions.create(**request)
    chunks = list(client.completions.create(**request, stream=True))
    for choice in whole.choices:
        found = [
            one.logprobs for chunk in chunks for one in chunk.choices if one.index == choice.index and one.logprobs
        ]
        for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
            assert [one for part in found for one in getattr(part, name)] == getattr(choice.logprobs, name)


def test_a_tool_call_streams_its_arguments(client: Any) -> None:
    request = {"model": MODEL, "messages": HELLO, "tools": [TOOL], "tool_choice": "required"}
    (call,) = client.chat.completions.create(**request).choices[0].message.tool_calls
    chunks = list(client.chat.completions.create(**request, stream=True))
    deltas = [one for chunk in chunks for one in chunk.choices[0].delta.tool_calls or ()]
    assert deltas[0].id
    assert deltas[0].function.name == "get_weather"
    assert len(deltas) > 2
    assert all(one.id is None and one.function.name is None for one in deltas[1:])
    assert "".join(one.function.arguments for one in deltas) == call.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_ids_of_calls_are_unique_among_answers(client: Any) -> None:
    request = {"model": MODEL, "messages": HELLO, "tools": [TOOL], "tool_choice": "required"}
    ids = {client.chat.completions.create(**request).choices[0].message.tool_calls[0].id for _ in range(2)}
    assert len(ids) == 2


def test_a_call_that_is_cut_is_no_text(client: Any) -> None:
    request = {"model": MODEL, "messages": HELLO, "tools": [TOOL], "tool_choice": "required", "max_tokens": 2}
    chunks = list(client.chat.completions.create(**request, stream=True))
    assert joined(chunks, 0)[0] == ""
    assert chunks[-1].choices[0].finish_reason == "length"


def test_ids_of_entries_stay_consecutive(api: str, start_pool: StartPool, valkey: redis.Redis) -> None:
    start_pool()
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 40, "n": 4, "logprobs": True}
    answer = httpx2.post(f"{api}/v1/chat/completions", json=body, timeout=PATIENCE)
    run_id = answer.headers["X-Arriero-Run"]
    ids = [id_ for id_, _ in valkey.xrange(token_stream.key(run_id, direct.STEP))]
    assert ids == [f"1-{n}" for n in range(1, len(ids) + 1)]
    shown = httpx2.get(f"{api}/v1/runs/{run_id}/steps/{direct.STEP}/tokens", timeout=PATIENCE).text
    data = [event.split("data: ")[1] for event in shown.split("\n\n") if "event: pieces" in event]
    pieces = [piece for one in data for piece in json.loads(one)]
    assert {piece["index"] for piece in pieces} == {0, 1, 2, 3}
    text = "".join(piece["text"] for piece in pieces if piece["index"] == 3)
    assert text == answer.json()["choices"][3]["message"]["content"]
