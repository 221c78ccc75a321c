"""Batches with the official client: their life, their errors, cancels, expiry, and that nothing is done twice."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import UUID

import httpx2
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types import Batch
from openai.types.responses import Response
from sqlalchemy import text

from app.catalog.catalog import Catalog
from app.files.file import parsed_id
from app.inference.batches import advance, store
from app.inference.batches.advance import Batches, BatchLost
from app.inference.batches.batch import PREFIX, BatchState
from app.kernel.database import Database
from app.kernel.sections.files import BatchSettings
from app.kernel.settings import Settings
from app.scheduler import needs
from tests.api.openai.conftest import MODEL, StartPool
from workers import steps
from workers.runtime import Runtime

#: Most seconds for a batch to get into a state.
PATIENCE = 120.0
URL = "/v1/chat/completions"
ENDED = {"completed", "failed", "expired", "cancelled"}

_CHOSEN = text("SELECT step, cause FROM history WHERE run_id = :id AND event = 'model_chosen'")
_HOST = text("""
    INSERT INTO host (name, state, identity, agent_epoch, agent_until, cores, files, problems)
    VALUES ('here', 'schedulable', 'here', 1, now() + interval '1h', 4, CAST(:files AS jsonb), '[]')
""")
_READY = text("SELECT id, attempt FROM step WHERE state = 'ready' ORDER BY queue, item LIMIT 64")


class Workers:
    """Control worker and pool in threads: they find ready steps in the database, and claim and record like workers."""

    def __init__(self, runtime: Runtime, threads: int = 4) -> None:
        self.runtime = runtime
        settings = runtime.settings
        self.batches = Batches(
            runtime.runs, lambda: runtime.catalog, settings.files, settings.batches, f"control@here/{id(self)}"
        )
        #: Whether they also do the job of batches.
        self.advances = True
        self._stopped, self._pause = threading.Event(), threading.Event()
        self._threads = [threading.Thread(target=self._serve, args=(n, threads)) for n in range(threads)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def _serve(self, number: int, of: int) -> None:
        while not self._stopped.is_set():
            with self.runtime.runs.database.work() as work:
                ready = work.rows(_READY)
            for row in ready[number::of]:
                if self._stopped.is_set():
                    return
                steps.run_step(self.runtime, row.id, row.attempt)
            if not number and self.advances:
                self.batches.advance_all()
            if not ready:
                self._pause.wait(0.005)


@pytest.fixture
def settings(settings: Settings) -> Settings:
    batches = BatchSettings(max_lines=6000, max_line_bytes=20_000, max_open=3)
    return settings.model_copy(update={"batches": batches})


@pytest.fixture
def client(api: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{api}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
def start_workers(start_pool: StartPool) -> Iterator[Callable[..., Workers]]:
    started: list[Workers] = []

    def start(threads: int = 4, **more: Any) -> Workers:
        workers = Workers(start_pool(slots=threads, **more).runtime, threads)
        workers.start()
        started.append(workers)
        return workers

    yield start
    for workers in started:
        workers.stop()


def line(custom_id: str, url: str = URL, **body: Any) -> str:
    body = body or {"messages": [{"role": "user", "content": f"Say {custom_id}"}], "max_tokens": 2}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": MODEL, **body}})


def create(client: OpenAI, *lines: str, endpoint: Any = URL, **more: Any) -> Batch:
    file = client.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, **{"completion_window": "24h", **more})


def until(client: OpenAI, batch: Batch, *states: str) -> Batch:
    pause = threading.Event()
    for _ in range(int(PATIENCE / 0.02)):
        found = client.batches.retrieve(batch.id)
        if found.status in (states or ENDED):
            return found
        pause.wait(0.02)
    raise AssertionError(f"{found.status} is not one of {states}")


def lines_of(client: OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    if file_id is None:
        return []
    return [json.loads(one) for one in client.files.content(file_id).read().decode().splitlines()]


def ids_of(batch: Batch) -> UUID:
    found = parsed_id(batch.id, PREFIX)
    assert found is not None
    return found


def test_the_life_of_a_batch(client: OpenAI, start_workers: Callable[..., Workers]) -> None:
    texts = [line(f"réq-{n}") for n in range(20)]
    batch = create(client, *texts, metadata={"job": "night"})
    assert (batch.object, batch.status, batch.metadata) == ("batch", "validating", {"job": "night"})
    assert batch.expires_at == batch.created_at + 86400
    start_workers()

    ended = until(client, batch)

    assert ended.status == "completed", ended
    assert ended.request_counts is not None
    assert ended.request_counts.model_dump() == {"total": 20, "completed": 20, "failed": 0}
    moments = (ended.created_at, ended.in_progress_at, ended.finalizing_at, ended.completed_at)
    assert None not in moments
    assert list(moments) == sorted(m for m in moments if m is not None)
    assert ended.error_file_id is None
    found = lines_of(client, ended.output_file_id)
    assert {one["custom_id"] for one in found} == {f"réq-{n}" for n in range(20)}
    assert {(one["response"]["status_code"], one["error"]) for one in found} == {(200, None)}
    answers = [one["response"]["body"] for one in found]
    assert {answer["object"] for answer in answers} == {"chat.completion"}
    assert len({answer["id"] for answer in answers}) == len({one["id"] for one in found}) == 20, "each has its own"
    assert all(one["response"]["body"]["usage"]["completion_tokens"] == 2 for one in found)
    file = client.files.retrieve(ended.output_file_id or "")
    assert (file.purpose, file.filename) == ("batch_output", f"{batch.id}_output.jsonl")


def test_each_endpoint(client: OpenAI, start_workers: Callable[..., Workers]) -> None:
    start_workers()
    cases = [
        ("/v1/completions", {"prompt": "Once", "messages": "of no meaning here"}, "text_completion"),
        ("/v1/embeddings", {"input": ["one", "two"]}, "list"),
        ("/v1/rerank", {"query": "one", "documents": ["two", "one"]}, "list"),
    ]
    batches = [create(client, line("a", url, **body), endpoint=url) for url, body, _ in cases]
    for batch, (_, _, kind) in zip(batches, cases, strict=True):
        ended = until(client, batch)
        (found,) = lines_of(client, ended.output_file_id)
        assert found["response"]["body"].get("object") == kind, found


async def _async_life(api: str) -> list[dict[str, Any]]:
    async with AsyncOpenAI(base_url=f"{api}/v1", api_key="none") as client:
        file = await client.files.create(file=("in.jsonl", line("a").encode()), purpose="batch")
        made = await client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h")  # type: ignore[arg-type] # a literal
        while (found := await client.batches.retrieve(made.id)).status not in ENDED:
            await asyncio.sleep(0.02)
        assert [batch.id async for batch in client.batches.list()] == [made.id]
        with pytest.raises(openai.ConflictError):
            await client.batches.cancel(made.id)
        content = await client.files.content(found.output_file_id or "")
        return [json.loads(content.text)]


def test_the_life_of_a_batch_with_the_asynchronous_client(api: str, start_workers: Callable[..., Workers]) -> None:
    start_workers()
    (found,) = asyncio.run(_async_life(api))
    assert (found["custom_id"], found["response"]["status_code"]) == ("a", 200)


def test_invalid_lines_are_named_and_nothing_is_done(client: OpenAI, start_workers: Callable[..., Workers]) -> None:
    wrong = [
        (line("ok"), None, None),
        ("{", "invalid_json_line", None),
        ("[" * 100_000, "line_too_long", None),
        ("[" * 10_000, "invalid_json_line", None),
        ('{"a": NaN}', "invalid_json_line", None),
        ("[]", "invalid_json_line", None),
        ("", None, None),
        ('{"custom_id": "x"}', "missing_required_parameter", "method"),
        (line("ok"), "duplicate_custom_id", "custom_id"),
        (line(""), "invalid_custom_id", "custom_id"),
        (line("x" * 600), "invalid_custom_id", "custom_id"),
        (line("\ud800"), "invalid_custom_id", "custom_id"),
        (line("u", "/v1/embeddings"), "invalid_url", "url"),
        (line("g").replace("POST", "GET"), "invalid_method", "method"),
        (line("none").replace(MODEL, "auto:paint"), "model_not_found", "body.model"),
        (line("m").replace(MODEL, "gpt-4o"), "model_not_found", "body.model"),
        (line("b", messages=[]), "invalid_request", "body.messages"),
        (line("s", messages=[{"role": "user", "content": "x"}], stream=True), "invalid_request", "body.stream"),
        (line("last"), None, None),
    ]
    start_workers()
    ended = until(client, create(client, *(text for text, _, _ in wrong)))

    assert (ended.status, ended.failed_at is not None, ended.output_file_id) == ("failed", True, None)
    assert ended.errors is not None
    found = [(error.line, error.code, error.param) for error in ended.errors.data or []]
    assert found == [(n, code, param) for n, (_, code, param) in enumerate(wrong, 1) if code]
    messages = {error.code: error.message or "" for error in ended.errors.data or []}
    assert "also that of line 1" in messages["duplicate_custom_id"]
    assert "gpt-4o" in messages["model_not_found"]
    assert MODEL in messages["model_not_found"]


@pytest.mark.parametrize(
    ("lines", "code", "line_number"),
    [(["", " \r"], "empty_file", None), ([line(str(n)) for n in range(6001)], "too_many_requests", 6001)],
)
def test_files_that_are_empty_or_too_long(
    client: OpenAI, start_workers: Callable[..., Workers], lines: list[str], code: str, line_number: int | None
) -> None:
    start_workers()
    ended = until(client, create(client, *lines))
    assert ended.errors is not None
    assert [(error.code, error.line) for error in ended.errors.data or []] == [(code, line_number)]


def test_aliases_and_selectors_are_decided_once_for_a_batch(
    client: OpenAI, start_workers: Callable[..., Workers], database: Database
) -> None:
    """The lines of one model are one map, whatever names them; the history of the run says how it was chosen."""
    workers = start_workers()
    model = workers.runtime.catalog.get(MODEL).model_copy(update={"aliases": ("small",)})
    workers.runtime.catalogs = Catalog((model,))
    with database.work() as work:
        assert work.run(_HOST, {"files": json.dumps([needs.configuration_id(model)])}) == 1
    names = [MODEL, "small", "auto:chat", "small"]
    texts = [line(str(n)).replace(MODEL, name) for n, name in enumerate(names)]
    ended = until(client, create(client, *texts))

    assert (ended.status, ended.model) == ("completed", MODEL), ended.errors
    done = lines_of(client, ended.output_file_id)
    assert sorted(one["custom_id"] for one in done) == list("0123")
    assert {one["response"]["body"]["model"] for one in done} == {MODEL}
    with database.work() as work:
        (chosen,) = work.rows(_CHOSEN, {"id": ids_of(ended)})
    assert (chosen.step, chosen.cause["models"]) == ("lines_0", [MODEL])
    assert chosen.cause["asked"] == "small, auto:chat"
    assert chosen.cause["reasons"][0] == f"small is an alias of {MODEL}"


def test_a_batch_of_responses(client: OpenAI, start_workers: Callable[..., Workers]) -> None:
    """Their `input` is no request for embeddings; the answers have the form of responses that are not stored."""
    start_workers()
    url = "/v1/responses"
    texts = [
        line("text", url, input="Say hello.", max_output_tokens=2),
        line("items", url, input=[{"role": "user", "content": "Say hello."}], instructions="Be kind."),
    ]
    ended = until(client, create(client, *texts, endpoint=url))
    assert ended.status == "completed", ended.errors
    done = {one["custom_id"]: one["response"]["body"] for one in lines_of(client, ended.output_file_id)}
    assert set(done) == {"text", "items"}
    for body in done.values():
        answer = Response.model_validate(body)
        assert (answer.object, answer.model, body["store"]) == ("response", MODEL, False)
        assert answer.output_text
    assert (done["text"]["status"], done["text"]["usage"]["output_tokens"]) == ("completed", 2)
    assert done["items"]["instructions"] == "Be kind."


def test_responses_that_no_batch_can_have(client: OpenAI, start_workers: Callable[..., Workers]) -> None:
    url = "/v1/responses"
    refused = {"previous_response_id": "resp_1", "stream": True, "background": True, "conversation": "c"}
    start_workers()
    texts = [line(name, url, input="a", **{name: value}) for name, value in refused.items()]
    ended = until(client, create(client, *texts, line("empty", url, input=[]), endpoint=url))
    assert (ended.status, ended.errors is not None) == ("failed", True)
    found = {error.line: (error.code, error.param) for error in (ended.errors and ended.errors.data) or ()}
    params = ["body.previous_response_id", "body.stream", "body.background", "body.conversation", "body.input"]
    assert found == {n: ("invalid_request", param) for n, param in enumerate(params, 1)}


def test_a_chat_completion_of_a_batch_continues_no_conversation(
    client: OpenAI, start_workers: Callable[..., Workers]
) -> None:
    start_workers()
    messages = [{"role": "user", "content": "a"}]
    ended = until(client, create(client, line("a", conversation_id=f"conv_{'0' * 32}", messages=messages)))

    assert [error.param for error in (ended.errors and ended.errors.data) or ()] == ["body.conversation_id"]


def test_requests_that_fail_are_in_the_error_file(
    client: OpenAI, start_workers: Callable[..., Workers], start_pool: StartPool, database: Database
) -> None:
    """The second half of the file is lost after the check, which leaves requests that cannot be read."""
    long = [line(f"long-{n}", messages=[{"role": "user", "content": "x" * 15_000}]) for n in range(20)]
    batch = create(client, line("first"), *long)
    Workers(start_pool().runtime).batches.advance_all()
    with database.work() as work:
        assert work.run(text("DELETE FROM file_chunk WHERE number > 0")) == 1
    start_workers()
    ended = until(client, batch)

    assert ended.status == "completed"
    assert ended.request_counts is not None
    done, failed = lines_of(client, ended.output_file_id), lines_of(client, ended.error_file_id)
    assert ended.request_counts.model_dump() == {"total": 21, "completed": len(done), "failed": len(failed)}
    assert sorted(one["custom_id"] for one in done + failed) == sorted(["first", *(f"long-{n}" for n in range(20))])
    assert failed
    for one in failed:
        assert (one["error"], one["response"]["status_code"]) == (None, 400)
        assert "was removed" in one["response"]["body"]["error"]["message"]


def test_a_cancelled_batch_keeps_what_is_done(client: OpenAI, start_workers: Callable[..., Workers]) -> None:
    batch = create(client, *(line(str(n)) for n in range(300)))
    workers = start_workers(threads=2, tokens_per_second=100.0)
    pause = threading.Event()
    while (counts := client.batches.retrieve(batch.id).request_counts) is None or counts.completed < 3:
        pause.wait(0.02)

    cancelling = client.batches.cancel(batch.id)
    assert (cancelling.status, cancelling.cancelling_at is not None) == ("cancelling", True)
    assert client.batches.cancel(batch.id).id == batch.id, "again is no error"
    ended = until(client, batch)
    workers.stop()

    assert (ended.status, ended.cancelled_at is not None) == ("cancelled", True)
    done, rest = lines_of(client, ended.output_file_id), lines_of(client, ended.error_file_id)
    assert sorted(int(one["custom_id"]) for one in done + rest) == list(range(300))
    assert 3 <= len(done) < 300
    assert {one["error"]["code"] for one in rest} == {"batch_cancelled"}
    assert {one["response"] for one in rest} == {None}
    with pytest.raises(openai.ConflictError, match="cancelled"):
        client.batches.cancel(batch.id)


def test_a_batch_that_is_cancelled_before_it_began_ends_at_once(client: OpenAI, runs: Any) -> None:
    batch = create(client, line("a"))
    assert client.batches.cancel(batch.id).status == "cancelled"


def test_a_batch_that_is_cancelled_before_its_lines_are_steps(
    client: OpenAI, start_pool: StartPool, database: Database
) -> None:
    batch = create(client, line("a"), line("b"))
    workers = Workers(start_pool().runtime)
    workers.batches.advance_all()
    client.batches.cancel(batch.id)
    for _ in range(3):
        workers.batches.advance_all()

    ended = client.batches.retrieve(batch.id)
    assert ended.status == "cancelled"
    assert [one["custom_id"] for one in lines_of(client, ended.error_file_id)] == ["a", "b"]


def test_an_expired_batch_keeps_what_is_done(
    client: OpenAI, start_workers: Callable[..., Workers], database: Database
) -> None:
    batch = create(client, *(line(str(n)) for n in range(300)), completion_window="1h")
    start_workers(threads=2, tokens_per_second=100.0)
    pause = threading.Event()
    while (counts := client.batches.retrieve(batch.id).request_counts) is None or counts.completed < 3:
        pause.wait(0.02)
    with database.work() as work:
        work.execute(text("UPDATE batch SET expires_at = now()"))
    ended = until(client, batch)

    assert (ended.status, ended.expired_at is not None) == ("expired", True)
    done, rest = lines_of(client, ended.output_file_id), lines_of(client, ended.error_file_id)
    assert sorted(int(one["custom_id"]) for one in done + rest) == list(range(300))
    assert len(done) >= 3
    assert {one["error"]["code"] for one in rest} == {"batch_expired"}


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"input_file_id": "file-" + "0" * 32}, "input_file_id"),
        ({"input_file_id": "nonsense"}, "input_file_id"),
        ({"endpoint": "/v1/images/generations"}, "body.endpoint"),
        ({"completion_window": "soon"}, "body.completion_window"),
        ({"completion_window": "1s"}, "body.completion_window"),
        ({"completion_window": "9999d"}, "body.completion_window"),
        ({"metadata": {"k": "v" * 600}}, "body.metadata.k"),
        ({"metadata": {str(n): "" for n in range(20)}}, "body.metadata"),
    ],
)
def test_what_is_refused(client: OpenAI, changes: dict[str, Any], param: str) -> None:
    file = client.files.create(file=line("a").encode(), purpose="batch")
    given: Any = {"input_file_id": file.id, "endpoint": URL, "completion_window": "24h", **changes}
    with pytest.raises(openai.BadRequestError) as caught:
        client.batches.create(**given)
    assert caught.value.param == param
    assert client.batches.list().data == []


def test_files_of_another_purpose_and_too_many_batches_are_refused(client: OpenAI) -> None:
    file = client.files.create(file=line("a").encode(), purpose="user_data")
    with pytest.raises(openai.BadRequestError, match="purpose"):
        client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h")
    made = [create(client, line("a")) for _ in range(3)]
    with pytest.raises(openai.ConflictError, match=r"batches\.max_open"):
        create(client, line("a"))
    with pytest.raises(openai.ConflictError, match="has not ended"):
        client.files.delete(made[0].input_file_id)
    assert [batch.id for batch in client.batches.list(limit=1)] == [batch.id for batch in reversed(made)]
    client.batches.cancel(made[0].id)
    assert client.files.delete(made[0].input_file_id).deleted
    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve("batch_nonsense")


def test_only_batches_read_files(client: OpenAI, api: str, start_workers: Callable[..., Workers]) -> None:
    """A workflow of a user with the name and the items of a batch gets no file."""
    create(client, line("secret"))
    step = {"kind": "openai", "model": MODEL, "request": "item"}
    steps_ = [{"id": "lines_0", "kind": "map", "over": "inputs.lines", "on_error": "collect", "step": step}]
    document = {"workflow": "openai-batch", "inputs": {"lines": {}}, "steps": steps_}
    start_workers()
    body = {"definition": document, "inputs": {"lines": [[1, 0, 20, "x"]]}}
    run = httpx2.post(f"{api}/v1/runs", json=body).json()
    pause = threading.Event()
    while (found := httpx2.get(f"{api}/v1/runs/{run['id']}").json())["state"] not in ("succeeded", "failed"):
        pause.wait(0.02)
    assert found["output"] == {"lines_0": [None]}
    assert "the request is not an object" in json.dumps(found["steps"])


def test_results_that_were_half_written_are_written_again(
    client: OpenAI, start_workers: Callable[..., Workers], database: Database
) -> None:
    """A process that dies while it writes results leaves no file; another one writes them when its lease has ended."""
    workers = start_workers()
    workers.advances = False
    batch = create(client, *(line(str(n)) for n in range(5)))
    id_ = ids_of(batch)

    def ran() -> bool:
        with database.work() as work:
            found = store.run_state(work, id_)
        return found is not None and found[0] == "succeeded"

    first, second = (replace(workers.batches, owner=f"control@here/1/{name}") for name in ("first", "second"))
    pause = threading.Event()
    first.advance_all()
    while not ran():
        pause.wait(0.02)
    with database.work() as work:
        taken = store.claim(work, id_, first.owner, timedelta(minutes=1))
        assert taken is not None
        store.move(work, id_, [BatchState.IN_PROGRESS], BatchState.FINALIZING)
    half = advance._Results(first, replace(taken, state="finalizing"), BatchState.COMPLETED)
    half.write()

    assert second.advance_all() == 1
    assert client.batches.retrieve(batch.id).status == "finalizing", "the first has the lease"
    with database.work() as work:
        work.execute(text("UPDATE batch SET lease_until = now() - interval '1s'"))
    assert second.advance_all() == 1
    ended = client.batches.retrieve(batch.id)
    assert ended.status == "completed"
    assert sorted(one["custom_id"] for one in lines_of(client, ended.output_file_id)) == list("01234")
    with pytest.raises(BatchLost):
        half.finish()
    assert {file.purpose for file in client.files.list()} == {"batch", "batch_output"}
    assert len(client.files.list().data) == 2


def test_a_batch_that_raises_does_not_stop_the_others(
    client: OpenAI, start_workers: Callable[..., Workers], database: Database
) -> None:
    broken, fine = create(client, line("a")), create(client, line("a"))
    with database.work() as work:
        work.execute(text("UPDATE batch SET endpoint = 'nonsense' WHERE id = :id"), {"id": ids_of(broken)})
    start_workers()
    assert until(client, fine).status == "completed"
    assert client.batches.retrieve(broken.id).status == "validating"
