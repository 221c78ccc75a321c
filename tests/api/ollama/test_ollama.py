"""Ollama's API over HTTP, with its official client and a pool whose engine is simulated."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any, cast

import httpx2
import ollama
import pytest

from app.api.ollama import keep_alive, names
from app.api.ollama.calls import OllamaCall
from app.api.ollama.requests import OllamaChatIn, OllamaGenerateIn
from app.api.openai.calls import ModelCall
from app.inference.openai.chat import ChatRequest
from app.inference.token_stream import EntryKind, StreamEntry
from tests.api.openai.conftest import MODEL, StartPool, catalog

PATIENCE = 60.0
HELLO = [{"role": "user", "content": "Hello."}]
#: A PNG of one white pixel.
_IMAGE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP6DwABBQECz6AuzQAAAABJRU5ErkJggg=="


def post(api: str, path: str, **body: Any) -> httpx2.Response:
    return httpx2.post(f"{api}/api/{path}", json={"model": MODEL, **body}, timeout=PATIENCE)


def client(api: str) -> ollama.Client:
    return ollama.Client(host=api, timeout=PATIENCE)


def test_the_official_client_gets_an_answer_with_counts_and_durations(api: str, start_pool: StartPool) -> None:
    start_pool()
    with client(api) as one:
        found = one.chat(MODEL, HELLO, options={"num_predict": 8})
    assert found.message.role == "assistant"
    assert found.message.content
    assert (found.done, found.eval_count) == (True, 8)
    assert found.prompt_eval_count
    parts = (found.load_duration, found.prompt_eval_duration, found.eval_duration)
    assert all(part is not None and part > 0 for part in parts)
    assert found.total_duration == pytest.approx(sum(part or 0 for part in parts), rel=0.2, abs=5e6)


def test_a_stream_has_the_text_of_the_plain_answer(api: str, start_pool: StartPool) -> None:
    start_pool()
    with client(api) as one:
        whole = one.generate(MODEL, "Hello.", options={"num_predict": 30})
        lines = list(one.generate(MODEL, "Hello.", options={"num_predict": 30}, stream=True))
    assert "".join(line.response or "" for line in lines) == whole.response
    assert len(lines) > 2
    assert [line.done for line in lines] == [False] * (len(lines) - 1) + [True]
    assert lines[-1].eval_count == 30


def test_a_stream_is_the_default_and_has_json_lines(api: str, start_pool: StartPool) -> None:
    start_pool()
    answer = post(api, "chat", messages=HELLO, options={"num_predict": 5})
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert answer.headers["X-Arriero-Run"]
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert {line["model"] for line in lines} == {MODEL}
    assert lines[-1]["done_reason"] in ("stop", "length")


def test_the_asynchronous_client_gets_the_same(api: str, start_pool: StartPool) -> None:
    start_pool()

    async def ask() -> str:
        one = ollama.AsyncClient(host=api, timeout=PATIENCE)
        stream = await one.chat(MODEL, HELLO, options={"num_predict": 6}, stream=True)
        text = "".join([line.message.content or "" async for line in stream])
        await one.close()
        return text

    with client(api) as one:
        assert asyncio.run(ask()) == one.chat(MODEL, HELLO, options={"num_predict": 6}).message.content


def test_embeddings_in_both_forms(api: str, start_pool: StartPool) -> None:
    start_pool()
    with client(api) as one:
        found = one.embed(MODEL, ["a", "b"])
        assert len(found.embeddings) == 2
        assert found.prompt_eval_count
        assert found.total_duration
        assert one.embeddings(MODEL, "a").embedding == pytest.approx(list(found.embeddings[0]))
        assert list(one.embed(MODEL, []).embeddings) == []


@pytest.mark.parametrize(
    ("path", "body", "status", "text"),
    [
        ("chat", {"model": "nothing", "messages": HELLO}, 404, "not found"),
        ("generate", {"prompt": "a", "suffix": "b"}, 400, "suffix is not supported"),
        ("generate", {"prompt": "a", "template": "b"}, 400, "template is not supported"),
        ("generate", {"prompt": "a", "images": ["b"]}, 400, "no image as base64"),
        ("generate", {"prompt": "a", "context": [1]}, 400, "context is not supported"),
        ("generate", {"prompt": "a", "raw": True, "system": "b"}, 400, "raw cannot be used"),
        ("generate", {"prompt": "a", "think": "much"}, 400, "think"),
        ("generate", {"prompt": "a", "options": {"num_ctx": 10_000_000}}, 400, "num_ctx"),
        ("generate", {"prompt": "a", "options": {"mirostat": 2}}, 400, "mirostat is not supported"),
        ("generate", {"prompt": "a", "options": {"temperature": 99}}, 400, "temperature"),
        ("generate", {"prompt": "a", "keep_alive": "soon"}, 400, "keep_alive"),
        ("generate", {"prompt": "a\0"}, 400, "NUL"),
        ("chat", {"messages": [{"role": "user", "content": "a", "images": ["b"]}]}, 400, "no image as base64"),
        ("chat", {"messages": [{"role": "user", "content": "a", "images": [_IMAGE]}]}, 400, "reads no images"),
        ("chat", {"messages": [{"role": "king", "content": "a"}]}, 400, "role"),
        ("chat", {"messages": HELLO, "tools": [{"type": "function"}]}, 400, "tools"),
        ("embed", {"input": [""]}, 400, "input"),
        ("show", {"model": "nothing"}, 404, "not found"),
        ("pull", {}, 400, "arriero models pull"),
        ("push", {}, 400, "not supported"),
    ],
)
def test_what_is_wrong_is_said_in_ollamas_form(
    api: str, path: str, body: dict[str, Any], status: int, text: str
) -> None:
    answer = post(api, path, **body)
    assert answer.status_code == status, answer.text
    assert text in answer.json()["error"]


def test_the_client_raises_for_what_is_refused(api: str) -> None:
    refused: list[Callable[[ollama.Client], Any]] = [
        lambda one: one.pull(MODEL),
        lambda one: one.create("x", from_=MODEL),
        lambda one: one.copy(MODEL, "x"),
        lambda one: one.delete(MODEL),
        lambda one: one.push(MODEL),
    ]
    with client(api) as one:
        for call in refused:
            with pytest.raises(ollama.ResponseError, match="is not supported"):
                call(one)
        with pytest.raises(ollama.ResponseError, match="run `arriero models rm NAME`"):
            one.delete(MODEL)
        with pytest.raises(ollama.ResponseError, match="not found") as raised:
            one.chat("nothing", HELLO)
    assert raised.value.status_code == 404


def test_what_is_there_and_what_is_loaded(api: str) -> None:
    with client(api) as one:
        listed = {model.model: model for model in one.list().models}
        assert listed[MODEL].details is not None
        assert listed[MODEL].details.family == "llama"
        assert listed[MODEL].size
        shown = one.show("smollm2")
        assert shown.modelinfo is not None
        assert shown.modelinfo["general.architecture"] == "llama"
        assert shown.template
        assert one.ps().models == []
    assert httpx2.get(f"{api}/api/version").json()["version"]
    assert httpx2.head(api).status_code == 200, "the command line of Ollama looks whether somebody is there"


def test_options_become_parameters() -> None:
    options = {
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.4,
        "min_p": 0.1,
        "seed": 7,
        "num_predict": 9,
        "stop": "x",
        "repeat_penalty": 1.2,
        "repeat_last_n": 32,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.4,
        "num_ctx": 128,
        "num_gpu": 99,
    }
    body = OllamaChatIn.model_validate({"model": "m", "messages": HELLO, "options": options, "format": "json"})
    made = ChatRequest.model_validate(body.translated("m", 256)).translated()
    assert (made.max_tokens, made.stop, made.schema) == (9, ("x",), {"type": "object"})
    sampling = made.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.5, 3, 0.4, 0.1)
    assert (sampling.repeat_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.2, 0.3, 0.4)
    assert (sampling.seed, sampling.penalty_last_n) == (7, 32)


def test_a_conversation_with_tools_is_translated() -> None:
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": "2", "tool_name": "f"},
    ]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    body = OllamaChatIn.model_validate({"model": "m", "messages": messages, "tools": [tool]})
    made = ChatRequest.model_validate(body.translated("m", 256)).translated()
    assert made.messages[1].tool_calls[0].arguments == {"a": 1}
    assert made.tools[0].name == "f"


def test_a_limit_that_fills_the_context_is_none() -> None:
    for limit in (-1, -2, 0, 256, 10_000):
        body = OllamaGenerateIn.model_validate({"model": "m", "prompt": "a", "options": {"num_predict": limit}})
        assert ChatRequest.model_validate(body.translated("m", 256)).translated().fits_context
        assert "seed" not in body.translated("m", 256)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(0, 0), ("0", 0), (30, 30), (1.5, 1.5), ("5m", 300), ("1h30m", 5400), ("300ms", 0.3), ("24h", 86_400), ("+2s", 2)],
)
def test_keep_alive_is_a_duration(value: Any, seconds: float) -> None:
    assert keep_alive.parse(value) == timedelta(seconds=seconds)


@pytest.mark.parametrize("value", [-1, "-1", "-1m", 10**40, -(10**40), "999999999999h"])
def test_keep_alive_can_be_forever(value: Any) -> None:
    assert keep_alive.parse(value) == keep_alive.FOREVER


@pytest.mark.parametrize("value", ["", "soon", "5 m", "1e9", float("nan"), float("inf"), True, [], "9" * 500, "٣s"])
def test_keep_alive_is_nothing_else(value: Any) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        keep_alive.parse(value)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("smollm2:135m", "smollm2:135m"),
        ("smollm2", "smollm2:135m"),
        ("smollm2:latest", "smollm2:135m"),
        ("smollm2:7b", "smollm2:7b"),
        ("nothing", "nothing"),
        (":latest", ":latest"),
    ],
)
def test_a_name_without_a_tag_means_the_first_of_its_family(name: str, meant: str) -> None:
    assert names.resolve(catalog(), name) == meant


def test_tool_calls_are_objects_in_one_line_before_the_last() -> None:
    function = {"name": "weather", "arguments": '{"city": "Paris"}'}
    message = {"content": None, "tool_calls": [{"id": "call_0_0", "type": "function", "function": function}]}
    document = {
        "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls", "logprobs": None}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4},
    }
    entry = StreamEntry("1-2", EntryKind.DONE, json.dumps(document))

    async def done() -> None:
        """Nothing is left to do."""

    call = OllamaCall(cast(ModelCall, None), "m", "chat", done)
    called, last = asyncio.run(call.lines_of(entry))
    expected = {"function": {"index": 0, "name": "weather", "arguments": {"city": "Paris"}}}
    assert (called["done"], called["message"]["tool_calls"]) == (False, [expected])
    assert ollama.ChatResponse(**called).message.tool_calls
    assert (last["done"], last["done_reason"], last["eval_count"]) == (True, "stop", 4)


def test_a_limit_is_told_in_the_form_of_ollama(api: str, start_pool: StartPool) -> None:
    start_pool()
    limits = {"requests_per_minute": 1}
    assert httpx2.put(f"{api}/v1/limits/namespace/default", json=limits, timeout=PATIENCE).status_code == 200
    for stream in (False, True):
        answer = post(api, "chat", messages=HELLO, stream=stream, options={"num_predict": 2})
    assert answer.status_code == 429
    assert answer.headers["Content-Type"] == "application/json"
    assert "1 requests per minute" in answer.json()["error"]
    assert int(answer.headers["Retry-After"]) > 1
    assert answer.headers["x-ratelimit-remaining-requests"] == "0"
