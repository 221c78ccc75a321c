"""The Python client against the API, and against a server that misbehaves."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx2
import pytest
from pydantic import BaseModel

import arriero_client
from app.api.main import serve
from app.api.services import Services
from app.kernel.database import Database
from app.workflows.runs.service import Runs
from arriero_client import AsyncClient, Client, Retries
from arriero_client.operations import operation, stream
from tests.api.openai.conftest import MODEL, StartPool
from tests.api.openai.test_chat_completions import until_state
from tests.client.conftest import Script, answer, events
from tests.workflows.conftest import StepWorker

QUICK = Retries(attempts=5, first=0.01)
WAIT = {
    "workflow": "w",
    "inputs": {"text": {"type": "string", "default": ""}},
    "steps": [{"id": "go", "kind": "wait", "event": "go"}],
}
RUN = {"id": "1", "workflow": "w", "state": "succeeded", "created_at": "2026-01-01T00:00:00Z"}
CHAT = {
    "model": "m",
    "choices": [{"index": 0, "message": {"content": "hi"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 1},
}


class Word(BaseModel):
    word: str


@pytest.fixture
def client(api: str) -> Any:
    with Client(api) as made:
        yield made


# -- one set of operations -----------------------------------------------------------------------------------------


def test_both_clients_have_the_same_operations_and_signatures() -> None:
    def shown(kind: type) -> dict[str, str]:
        found = {}
        for name in dir(kind):
            made = inspect.getattr_static(kind, name)
            if isinstance(made, operation | stream):
                found[name] = f"{type(made).__name__} {inspect.signature(made.function)}"
        return found

    assert shown(Client) == shown(AsyncClient)
    named = {"submit", "get", "list", "wait", "events", "tokens", "cancel", "retry", "fork", "send_event", "chat"}
    assert named | {"embed", "embed_batch", "reason", "models", "check_health", "create_batch"} <= shown(Client).keys()
    public = {name for name in vars(Client) | vars(AsyncClient) if not name.startswith("_")}
    assert public == {"close"}, "nothing is written by hand for one of them"


def test_the_client_imports_nothing_of_the_server() -> None:
    folder = Path(arriero_client.__file__).parent
    for path in folder.glob("*.py"):
        text = path.read_text()
        assert not any(f"{word} {name}" in text for word in ("import", "from") for name in ("app", "workers")), path


# -- runs ----------------------------------------------------------------------------------------------------------


def test_a_run_is_submitted_watched_and_answered(client: Client, runs: Runs) -> None:
    run = client.submit(definition=WAIT, labels={"team": "a"})
    StepWorker(runs).work()
    assert client.list(labels={"team": "a"}).runs[0].id == run.id
    assert [one.id for one in client.list_all(workflow="w")] == [run.id]
    waited: list[arriero_client.Run] = []
    waiting = threading.Thread(target=lambda: waited.append(client.wait(run.id, timeout=60)))
    waiting.start()
    seen = client.events(run.id)
    assert next(seen).id
    assert client.send_event(run.id, "go", {"a": 1}).answered == "go"
    assert [one.event for one in seen][-1] == "succeeded"
    waiting.join()
    assert waited[0].state == "succeeded"
    assert waited[0].step("go").output == {"a": 1}
    assert waited[0].step("go").state == "succeeded"
    again = client.fork(run.id, "go")
    assert again.id != run.id
    assert client.cancel(again.id).state == "cancelled"
    with pytest.raises(arriero_client.RunFailed, match="cancelled"):
        client.wait(again.id)
    assert client.wait(again.id, check=False).state == "cancelled"
    client.retry(again.id)
    with pytest.raises(arriero_client.TimedOut, match="has not ended within"):
        client.wait(again.id, timeout=0.3)


def test_the_asynchronous_client_does_the_same(api: str, runs: Runs) -> None:
    async def use() -> arriero_client.Run:
        async with AsyncClient(api) as client:
            run = await client.submit(definition=WAIT)
            await asyncio.to_thread(StepWorker(runs).work)
            waiting = asyncio.create_task(client.wait(run.id, timeout=60))
            seen = client.events(run.id)
            await anext(seen)
            await client.send_event(run.id, "go")
            assert [one.event async for one in seen][-1] == "succeeded"
            assert [one.id async for one in client.list_all()] == [run.id]
            return await waiting

    assert asyncio.run(use()).state == "succeeded"


def test_a_submission_with_the_same_key_is_the_same_run(client: Client) -> None:
    first, second = (client.submit(definition=WAIT, idempotency_key="k") for _ in range(2))
    assert first.id == second.id


def test_the_client_works_without_a_socket(services: Services) -> None:
    async def use() -> list[str]:
        app = serve(services)
        async with AsyncClient("http://localhost", transport=httpx2.ASGITransport(app)) as client:
            await client.submit(definition=WAIT)
            return [one.workflow async for one in client.list_all()]

    assert asyncio.run(use()) == ["w"]


def test_refusals_are_errors_with_their_problems(client: Client) -> None:
    with pytest.raises(arriero_client.InvalidRequest) as wrong:
        client.submit(definition={"workflow": "w", "steps": [{"id": "a", "kind": "nap"}]})
    assert wrong.value.status == 422
    assert wrong.value.problems
    assert "nap" in str(wrong.value)
    with pytest.raises(arriero_client.NotFound):
        client.get("00000000-0000-7000-8000-000000000000")
    with pytest.raises(arriero_client.NotFound) as unknown:
        client.chat("nothing", "Hello.")
    assert unknown.value.code == "model_not_found"


# -- models --------------------------------------------------------------------------------------------------------


def test_an_answer_and_its_stream_are_the_same(client: Client, start_pool: StartPool) -> None:
    start_pool()
    whole = client.chat(MODEL, "Hello.", max_tokens=9)
    assert whole.text
    assert (whole.usage.tokens_out, whole.latency_s > 0) == (9, True)
    parts = list(client.chat_stream(MODEL, [{"role": "user", "content": "Hello."}], max_tokens=9))
    assert "".join(part.text for part in parts) == whole.text
    last = parts[-1].result
    assert last is not None
    assert (last.text, last.usage.tokens_out, last.finish_reason) == (whole.text, 9, whole.finish_reason)
    assert last.first_text_s is not None
    assert last.first_text_s <= last.latency_s
    assert last.run_id
    read = list(client.tokens(last.run_id, "answer"))
    assert "".join(one.text for one in read) == whole.text
    rest = list(client.tokens(last.run_id, "answer", after=read[2].id))
    assert [one.id for one in rest] == [one.id for one in read[3:]]


def test_leaving_a_stream_stops_the_model(client: Client, start_pool: StartPool, database: Database) -> None:
    start_pool(tokens_per_second=50.0)
    parts = client.chat_stream(MODEL, "Hello.", max_tokens=2_000)
    run_id = next(parts).run_id
    parts.close()
    assert until_state(database, UUID(run_id), "cancelled", "succeeded").steps[0].tokens_out < 2_000


def test_embeddings_keep_their_order_and_tell_what_failed(client: Client, start_pool: StartPool) -> None:
    start_pool()
    texts = [f"text {index}" for index in range(23)]
    whole = client.embed(MODEL, texts)
    assert whole.tokens_in
    found = client.embed_batch(MODEL, texts, batch_size=4, parallel=3)
    assert found.vectors == whole.vectors
    assert found.failures == {}
    texts[5] = ""
    partly = client.embed_batch(MODEL, texts, batch_size=4, parallel=3)
    assert list(partly.failures) == [5]
    assert isinstance(partly.failures[5], arriero_client.InvalidRequest)
    assert partly.vectors[5] is None
    assert [vector for index, vector in enumerate(partly.vectors) if index != 5] == [
        vector for index, vector in enumerate(whole.vectors) if index != 5
    ]


def test_the_asynchronous_client_calls_models(api: str, start_pool: StartPool) -> None:
    start_pool()

    async def use() -> None:
        async with AsyncClient(api) as client:
            whole = await client.chat(MODEL, "Hello.", max_tokens=5)
            parts = [part async for part in client.chat_stream(MODEL, "Hello.", max_tokens=5)]
            assert "".join(part.text for part in parts) == whole.text
            batch = await client.embed_batch(MODEL, ["a", "b", ""], batch_size=2)
            assert (list(batch.failures), len(batch.vectors)) == ([2], 3)
            assert MODEL in [model.id for model in await client.models()]

    asyncio.run(use())


def test_the_health_of_what_is_there(client: Client, start_pool: StartPool) -> None:
    start_pool()
    found = client.check_health(("embedding", "consolidation"), embedding_model=MODEL)
    assert found.ok
    assert found.checks["embedding"].latency_s
    assert found.checks["consolidation"].latency_s
    with pytest.raises(ValueError, match="cannot be checked; accepted: embedding"):
        client.check_health(("everything",))
    unknown = client.check_health(("reasoning",), reasoning_model="nothing").checks["reasoning"]
    assert isinstance(unknown.error, arriero_client.NotFound)


# -- a server that misbehaves --------------------------------------------------------------------------------------


def test_what_the_server_did_not_do_is_sent_again(script: Script) -> None:
    script.answers = [answer(429, Retry_After="0"), answer(503), b"", answer(202, RUN)]
    with Client(script.url, retries=QUICK, api_key="secret") as client:
        assert client.submit("w").id == "1"
    keys = {script.header(index, "Idempotency-Key") for index in range(4)}
    assert len(keys) == 1, "one submission"
    assert None not in keys
    assert script.header(0, "Authorization") == "Bearer secret"


def test_the_pause_that_the_server_names_is_kept_or_told(script: Script) -> None:
    assert Retries(first=0.01).pause(1, 2.0) == 2.0
    script.answers = [
        answer(429, {"error": {"message": "slow down", "code": "rate_limit_exceeded"}}, Retry_After="3600")
    ]
    with Client(script.url, retries=QUICK) as client, pytest.raises(arriero_client.RateLimited) as limited:
        client.chat("m", "x")
    assert (limited.value.retry_after, limited.value.code) == (3600, "rate_limit_exceeded")


@pytest.mark.parametrize(
    ("call", "sent"),
    [(lambda client: client.chat("m", "x"), 5), (lambda client: client.fork("1", "a"), 1)],
    ids=["repeatable", "not repeatable"],
)
def test_a_lost_answer_is_asked_for_again_where_that_does_no_harm(
    script: Script, call: Callable[[Client], object], sent: int
) -> None:
    script.answers = [b""] * 5
    with Client(script.url, retries=QUICK) as client, pytest.raises(arriero_client.ConnectionFailed):
        call(client)
    assert len(script.requests) == sent


def test_a_server_that_is_not_there(script: Script) -> None:
    with Client("http://127.0.0.1:1", retries=QUICK) as client, pytest.raises(arriero_client.ConnectionFailed):
        client.fork("1", "a")
    with pytest.raises(ValueError, match="is no address"):
        Client("localhost:8470")


def test_a_refusal_is_not_sent_again(script: Script) -> None:
    script.answers = [answer(401, {"title": "no key", "detail": "send one"})]
    with Client(script.url, retries=QUICK) as client, pytest.raises(arriero_client.Unauthorized, match="send one"):
        client.get("1")


def test_an_answer_that_is_no_json(script: Script) -> None:
    script.answers = [b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\n<html"]
    with Client(script.url) as client, pytest.raises(arriero_client.InvalidAnswer, match="is this an Arriero server"):
        client.get("1")


def event(number: int, name: str = "started") -> str:
    return f'id: {number}\nevent: {name}\ndata: {{"id": {number}, "at": "2026-01-01T00:00:00Z", "event": "{name}"}}\n\n'


def test_events_go_on_after_a_lost_connection_without_a_gap(script: Script) -> None:
    ended = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + event(4, "succeeded").encode()
    script.answers = [
        events(event(1), ": comment\n\n", event(2)),
        events(event(3), "id: 4\nda"),
        ended,
        answer(200, RUN),
    ]
    with Client(script.url, retries=QUICK) as client:
        assert [one.id for one in client.events("1")] == [1, 2, 3, 4]
    assert [script.header(index, "Last-Event-ID") for index in range(3)] == [None, "2", "3"]


def test_a_stream_that_never_says_anything_is_given_up(script: Script) -> None:
    script.answers = [events()] * 5
    with Client(script.url, retries=QUICK) as client, pytest.raises(arriero_client.ConnectionFailed, match="5 times"):
        list(client.events("1"))


def test_a_chat_that_breaks_off_says_which_run_it_is(script: Script) -> None:
    chunk = 'data: {"choices": [{"index": 0, "delta": {"content": "a"}}]}\n\n'
    head = "HTTP/1.1 200 OK\r\nX-Arriero-Run: 77\r\nContent-Length: 1000\r\n\r\n"
    script.answers = [head.encode() + chunk.encode()]
    with Client(script.url) as client:
        parts = client.chat_stream("m", "x")
        assert next(parts).text == "a"
        with pytest.raises(arriero_client.ConnectionFailed, match="run 77"):
            next(parts)
    script.answers = [head.encode() + b'data: {"error": {"message": "the pool died", "code": "worker_lost"}}\n\n']
    with Client(script.url) as client, pytest.raises(arriero_client.ServerFailed, match="the pool died"):
        list(client.chat_stream("m", "x"))


def test_an_answer_has_the_form_of_its_schema_or_is_refused(script: Script) -> None:
    def said(text: str, finish: str = "stop") -> bytes:
        return answer(200, {**CHAT, "choices": [{"index": 0, "message": {"content": text}, "finish_reason": finish}]})

    script.answers = [said('{"word": "yes"}'), said('"yes"'), said('{"word": "y', "length")]
    with Client(script.url) as client:
        assert client.reason("m", "x", Word).value.word == "yes"
        assert client.reason("m", "x", {"type": "string"}).value == "yes"
        with pytest.raises(arriero_client.InvalidAnswer, match="cut at max_tokens") as cut:
            client.reason("m", "x", Word)
    assert cut.value.text == '{"word": "y'
    assert b'"required":["word"]' in script.requests[0][1].replace(b" ", b"")


def test_files_and_batches_speak_the_form_of_openai(script: Script) -> None:
    batch = {"id": "b", "endpoint": "/v1/embeddings", "status": "in_progress", "input_file_id": "f"}
    done = {**batch, "status": "completed", "output_file_id": "o", "error_file_id": None}
    line = {"custom_id": "0", "response": {"status_code": 200}}
    script.answers = [answer(200, {"id": "f"}), answer(200, batch), answer(200, batch), answer(200, done)]
    script.answers += [answer(200, done), answer(200, line)]
    with Client(script.url) as client:
        made = client.create_batch([{"model": "m", "input": "a"}], endpoint="/v1/embeddings")
        assert client.wait_batch(made.id, timeout=60).output_file_id == "o"
        assert client.batch_results("b") == {"0": line}
    upload = script.requests[0]
    assert "multipart/form-data" in upload[0]
    assert b'"custom_id": "0"' in upload[1]
    assert b"batch" in upload[1]
    assert script.requests[1][0].startswith("POST /v1/batches ")


def test_the_key_comes_from_the_environment(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARRIERO_API__KEY", "of the environment")
    script.answers = [answer(200, RUN)]
    with Client(f"{script.url}/v1") as client:
        client.get("1")
    assert script.header(0, "Authorization") == "Bearer of the environment"
    assert script.requests[0][0].startswith("GET /v1/runs/1 "), "the address may end in /v1"
