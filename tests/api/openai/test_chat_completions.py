"""Chat completions over HTTP, with a pool whose engine is simulated."""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress
from typing import Any
from uuid import UUID

import httpx2
import openai
import pytest
import redis

from app.fleet.pool import PoolPhase
from app.inference import direct, token_stream
from app.kernel.database import Database
from app.kernel.errors import NotFound
from app.workflows.runs import views
from app.workflows.runs.service import Runs
from tests.api.openai.conftest import MODEL, StartPool
from workers import steps
from workers.pool.direct import DirectRequests

PATIENCE = 60.0
HELLO = [{"role": "user", "content": "Hello."}]


def body(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": HELLO, "max_tokens": 8, **more}


def post(api: str, path: str = "chat/completions", **more: Any) -> httpx2.Response:
    return httpx2.post(f"{api}/v1/{path}", json=body(**more), timeout=PATIENCE)


def run_of(answer: httpx2.Response) -> UUID:
    return UUID(answer.headers["X-Arriero-Run"])


def until_state(database: Database, run_id: UUID, *states: str) -> views.RunView:
    """Wait until the run exists and has one of the states."""
    limit = time.monotonic() + PATIENCE
    while True:
        found = None
        with suppress(NotFound):
            found = views.run(database, run_id)
        if found is not None and found.run.state in states:
            return found
        assert time.monotonic() < limit, found
        threading.Event().wait(0.02)


def test_the_official_client_gets_an_answer_and_its_usage(api: str, start_pool: StartPool) -> None:
    start_pool()
    with openai.OpenAI(base_url=f"{api}/v1", api_key="none") as client:
        answer = client.chat.completions.create(**body())
    assert answer.id.startswith("chatcmpl-")
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8


def test_a_stream_has_the_text_of_the_plain_answer_and_ends_with_the_usage(api: str, start_pool: StartPool) -> None:
    start_pool()
    with openai.OpenAI(base_url=f"{api}/v1", api_key="none") as client:
        whole = client.chat.completions.create(**body(max_tokens=30)).choices[0].message.content
        chunks = list(
            client.chat.completions.create(**body(max_tokens=30), stream=True, stream_options={"include_usage": True})
        )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 30


def test_the_call_is_a_run_with_its_tokens(api: str, start_pool: StartPool, database: Database) -> None:
    start_pool()
    answer = post(api)
    found = until_state(database, run_of(answer), "succeeded")
    assert (found.run.workflow, found.run.priority) == ("openai", "interactive")
    assert found.steps[0].tokens_out == 8
    assert found.steps[0].model == MODEL
    assert found.run.inputs["request"]["messages"] == HELLO


def test_the_stream_of_tokens_has_consecutive_ids(api: str, start_pool: StartPool, valkey: redis.Redis) -> None:
    start_pool()
    answer = post(api, max_tokens=20)
    ids = [id_ for id_, _ in valkey.xrange(token_stream.key(str(run_of(answer)), direct.STEP))]
    assert ids == [f"1-{n}" for n in range(1, len(ids) + 1)]


def test_without_a_pool_the_call_becomes_a_run_that_waits(api: str, database: Database, valkey: redis.Redis) -> None:
    with (
        httpx2.Client(timeout=PATIENCE) as client,
        client.stream("POST", f"{api}/v1/chat/completions", json=body(stream=True)) as answer,
    ):
        lines = answer.iter_lines()
        while not next(lines).startswith(": waiting for smollm2:135m"):
            pass
        found = until_state(database, run_of(answer), "queued")
        assert found.steps[0].state == "ready"
        assert not valkey.llen(direct.requests_key("smollm2-135m")), "it was withdrawn"
    until_state(database, found.run.id, "cancelled")


def test_a_run_that_waited_streams_as_a_direct_request_does(
    api: str, start_pool: StartPool, database: Database
) -> None:
    answers: list[httpx2.Response] = []
    asking = threading.Thread(target=lambda: answers.append(post(api, max_tokens=12)))
    asking.start()
    run_id = until_listed(database)
    step = until_state(database, run_id, "queued").steps[0]
    pool = start_pool()
    steps.run_step(pool.runtime, step.id, 1)
    asking.join(PATIENCE)
    assert answers[0].status_code == 200, answers[0].text
    assert answers[0].json()["usage"]["completion_tokens"] == 12


def until_listed(database: Database) -> UUID:
    limit = time.monotonic() + PATIENCE
    while not (found := views.page(database, limit=1).runs):
        assert time.monotonic() < limit
        threading.Event().wait(0.02)
    return found[0].id


def test_more_calls_than_slots_are_visible_to_the_scheduler(
    api: str, start_pool: StartPool, database: Database
) -> None:
    start_pool(slots=1, tokens_per_second=2)
    with (
        httpx2.Client(timeout=PATIENCE) as client,
        client.stream("POST", f"{api}/v1/chat/completions", json=body(stream=True, max_tokens=500)) as first,
        client.stream("POST", f"{api}/v1/chat/completions", json=body(stream=True, max_tokens=500)) as second,
    ):
        assert first.status_code == second.status_code == 200
        states = {until_state(database, run_of(one), "running", "queued").run.state for one in (first, second)}
        assert states == {"running", "queued"}


def test_a_client_that_goes_away_frees_the_slot(api: str, start_pool: StartPool, database: Database) -> None:
    pool = start_pool(slots=1, tokens_per_second=10)
    with (
        httpx2.Client(timeout=PATIENCE) as client,
        client.stream("POST", f"{api}/v1/chat/completions", json=body(stream=True, max_tokens=5000)) as answer,
    ):
        assert next(answer.iter_lines()).startswith("data:")
    until_state(database, run_of(answer), "cancelled")
    assert pool.engine.metrics().cancelled == 1  # type: ignore[attr-defined] # the simulated engine has metrics


def test_a_client_that_goes_away_before_a_plain_answer_frees_the_slot(
    api: str, start_pool: StartPool, database: Database
) -> None:
    start_pool(slots=1, tokens_per_second=10)
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.post(f"{api}/v1/chat/completions", json=body(max_tokens=5000), timeout=1.0)
    until_state(database, until_listed(database), "cancelled")


def test_a_cancelled_run_ends_its_stream(api: str, start_pool: StartPool, database: Database, runs: Runs) -> None:
    start_pool(slots=1, tokens_per_second=10)
    with (
        httpx2.Client(timeout=PATIENCE) as client,
        client.stream("POST", f"{api}/v1/chat/completions", json=body(stream=True, max_tokens=5000)) as answer,
    ):
        until_state(database, run_of(answer), "running")
        runs.cancel(run_of(answer))
        last = [line for line in answer.iter_lines() if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "cancelled"


def test_a_pool_that_drains_gives_its_call_to_another(api: str, start_pool: StartPool, database: Database) -> None:
    """The client has got no text yet, so it sees nothing of it."""
    pool = start_pool(slots=1, tokens_per_second=0.001)
    answers: list[httpx2.Response] = []
    asking = threading.Thread(target=lambda: answers.append(post(api)))
    asking.start()
    until_active(pool)
    pool.on_phase(PoolPhase.DRAINING)
    pool.close()
    run_id = until_listed(database)
    step = until_state(database, run_id, "running", "queued").steps[0]
    second = start_pool()
    limit = time.monotonic() + PATIENCE
    while asking.is_alive():
        assert time.monotonic() < limit
        steps.run_step(second.runtime, step.id, views.run(database, run_id).steps[0].attempt)
        asking.join(0.1)
    assert answers[0].status_code == 200, answers[0].text
    assert until_state(database, run_id, "succeeded").steps[0].attempt == 2


def until_active(pool: DirectRequests) -> None:
    limit = time.monotonic() + PATIENCE
    while not pool._active:
        assert time.monotonic() < limit
        threading.Event().wait(0.02)


INVALID = {
    "no messages": ({"messages": []}, "messages"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0"),
    "a number as content": ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
    "no content": ({"messages": [{"role": "user"}]}, "messages.0"),
    "NUL": ({"messages": [{"role": "user", "content": "a\x00b"}]}, "messages.0.content"),
    "broken arguments": (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "messages.0.tool_calls.0",
    ),
    "a hot temperature": ({"temperature": 9}, "temperature"),
    "too many texts": ({"n": 99}, "n"),
    "deprecated functions": ({"functions": [{"name": "f"}]}, None),
    "a schema that is none": ({"response_format": {"type": "json_schema"}}, "response_format"),
    "a tool choice without tools": ({"tool_choice": "required"}, None),
    "log-probabilities of nothing": ({"top_logprobs": 3}, None),
}


@pytest.mark.parametrize(("more", "param"), INVALID.values(), ids=INVALID)
def test_an_invalid_request_names_the_field(api: str, more: dict[str, Any], param: str | None) -> None:
    answer = post(api, **more)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert "function-" not in error["message"], "names of the code are not shown"


def test_an_unknown_model_is_answered_with_the_known_ones(api: str) -> None:
    answer = post(api, model="gpt-4")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert MODEL in answer.json()["error"]["message"]


def test_a_failure_in_the_pool_has_its_status(api: str, start_pool: StartPool, database: Database) -> None:
    """The simulated engine cannot write JSON of this length in so few tokens."""
    start_pool()
    schema = {"type": "string", "minLength": 4000}
    answer = post(api, response_format={"type": "json_schema", "json_schema": {"schema": schema}})
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "invalid_output"
    assert until_state(database, until_listed(database), "failed").steps[0].attempt == 1, "it is not repeated"


def test_fields_of_other_servers_are_ignored(api: str, start_pool: StartPool) -> None:
    start_pool()
    assert post(api, store=True, user="u", metadata={"a": "b"}, reasoning_effort="low", num_ctx=3).status_code == 200


def test_a_list_of_another_type_makes_calls_runs(api: str, valkey: redis.Redis, database: Database) -> None:
    valkey.set(direct.requests_key("smollm2-135m"), "x")
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.post(f"{api}/v1/chat/completions", json=body(), timeout=2.0)
    until_state(database, until_listed(database), "cancelled")


def test_a_stream_of_another_type_does_not_stop_the_others(
    api: str, start_pool: StartPool, database: Database, valkey: redis.Redis
) -> None:
    start_pool(slots=1, tokens_per_second=10)
    with (
        httpx2.Client(timeout=PATIENCE) as client,
        client.stream("POST", f"{api}/v1/chat/completions", json=body(stream=True, max_tokens=20)) as broken,
    ):
        until_state(database, run_of(broken), "running")
        key = token_stream.key(str(run_of(broken)), direct.STEP)
        valkey.delete(key)
        valkey.set(key, "x")
        other = start_pool()
        assert other.engine.slots
        assert post(api, max_tokens=4).json()["usage"]["completion_tokens"] == 4
        lines = [line for line in broken.iter_lines() if line]
    assert lines[-1] == "data: [DONE]", "the rest comes from the database"
    text = "".join(json.loads(line[6:])["choices"][0]["delta"].get("content", "") for line in lines[:-1] if "{" in line)
    assert len(text) == 20 * 4


def test_too_many_calls_are_refused(api: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.api.openai.road.MAX_CALLS", 0)
    for stream in (False, True):
        answer = post(api, stream=stream)
        assert (answer.status_code, answer.headers["Retry-After"]) == (429, "1")
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"


def test_tokens_are_read_again_from_the_last_id(api: str, start_pool: StartPool) -> None:
    start_pool()
    run_id = run_of(post(api, max_tokens=20))
    address = f"{api}/v1/runs/{run_id}/steps/{direct.STEP}/tokens"
    everything = httpx2.get(address, timeout=PATIENCE).text
    rest = httpx2.get(address, headers={"Last-Event-ID": "1-3"}, timeout=PATIENCE).text
    assert everything.startswith("id: 1-1\nevent: begun")
    assert rest.startswith("id: 1-4\n")
    assert everything.endswith(rest)
    assert httpx2.get(address.replace("answer", "nothing"), timeout=PATIENCE).status_code == 404


def test_embeddings_are_little_endian_floats_for_the_official_client(api: str, start_pool: StartPool) -> None:
    start_pool()
    with openai.OpenAI(base_url=f"{api}/v1", api_key="none") as client:
        found = client.embeddings.create(model=MODEL, input=["one", "two"], dimensions=8)
        plain = client.embeddings.create(model=MODEL, input="one", dimensions=8, encoding_format="float")
    assert [one.index for one in found.data] == [0, 1]
    assert found.data[0].embedding == pytest.approx(plain.data[0].embedding, abs=1e-6)
    assert sum(number**2 for number in plain.data[0].embedding) == pytest.approx(1, abs=1e-4)
    assert found.usage.prompt_tokens > 0


def test_a_model_without_vectors_refuses_embeddings(api: str) -> None:
    answer = httpx2.post(f"{api}/v1/embeddings", json={"model": "gemma3:270m", "input": "x"}, timeout=PATIENCE)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")


def test_documents_are_returned_best_first(api: str, start_pool: StartPool, database: Database) -> None:
    start_pool()
    documents = ["all about llamas", "the price of tea", {"text": "tea and llamas and tea"}]
    body = {"model": MODEL, "query": "price of tea", "documents": documents, "top_n": 2, "return_documents": True}
    answer = httpx2.post(f"{api}/v1/rerank", json=body, timeout=PATIENCE)
    assert answer.status_code == 200, answer.text
    assert [one["index"] for one in answer.json()["results"]] == [1, 2]
    assert answer.json()["results"][0]["document"] == {"text": "the price of tea"}
    assert until_state(database, run_of(answer), "succeeded").steps[0].tokens_in > 0


def test_a_model_that_is_no_reranker_refuses(api: str) -> None:
    body = {"model": "gemma3:270m", "query": "x", "documents": ["y"]}
    answer = httpx2.post(f"{api}/v1/rerank", json=body, timeout=PATIENCE)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")


def test_completions_continue_a_prompt(api: str, start_pool: StartPool) -> None:
    start_pool()
    with openai.OpenAI(base_url=f"{api}/v1", api_key="none") as client:
        whole = client.completions.create(model=MODEL, prompt="Once", max_tokens=6, echo=True)
        pieces = client.completions.create(model=MODEL, prompt="Once", max_tokens=6, echo=True, stream=True)
        text = "".join(chunk.choices[0].text for chunk in pieces)
    assert whole.choices[0].text.startswith("Once")
    assert text == whole.choices[0].text


#: The first parts of OpenAI's paths, from its OpenAPI document.
OPENAI_NAMES = {
    *("assistants", "audio", "batches", "chat", "chatkit", "completions", "containers", "conversations", "embeddings"),
    *("evals", "files", "fine_tuning", "images", "models", "moderations", "organization", "projects", "realtime"),
    *("responses", "skills", "threads", "uploads", "vector_stores", "videos"),
}


def test_no_own_resource_has_a_name_of_openai(api: str) -> None:
    document = httpx2.get(f"{api}/openapi.json", timeout=PATIENCE).json()
    own = {
        path.split("/")[2]
        for path, operations in document["paths"].items()
        for operation in operations.values()
        if path.startswith("/v1/") and operation.get("tags") != ["openai"]
    }
    assert own & OPENAI_NAMES == set()
    assert "runs" in own
