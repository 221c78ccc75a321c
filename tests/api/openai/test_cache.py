"""The response cache, with pools whose engine is simulated, on the real Valkey."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx2
import openai
import pytest
import redis
import uvicorn

from app.api.cache.flights import Flight
from app.api.main import serve
from app.api.openai.road import Waiting
from app.api.services import Services
from app.devices.inventory import Devices
from app.inference import direct, token_stream
from app.inference.cache.answer import CachedAnswer
from app.inference.cache.key import key_of
from app.inference.cache.policy import BYPASS, CachePolicy, policy_of
from app.inference.token_stream import EntryKind, StreamEntry
from app.kernel.broker import CeleryPublisher
from app.kernel.database import Database
from app.kernel.errors import ArrieroError
from app.kernel.settings import Settings
from app.scheduler.operator_commands import OperatorCommands
from app.workflows.runs.service import Runs
from tests.api.openai.conftest import MODEL, StartPool, catalog
from tests.api.openai.test_chat_completions import PATIENCE, body
from workers.engine.simulated import SimulatedEngine
from workers.pool.direct import DirectRequests

EXACT = {"temperature": 0}


def post(api: str, path: str = "chat/completions", *, cache: str = "", **more: Any) -> httpx2.Response:
    headers = {"Cache-Control": cache} if cache else {}
    content = body(**more) if path == "chat/completions" else {"model": MODEL, **more}
    return httpx2.post(f"{api}/v1/{path}", json=content, headers=headers, timeout=PATIENCE)


def status(answer: httpx2.Response) -> str:
    assert answer.status_code == 200, answer.text
    return answer.headers["X-Arriero-Cache"]


def text(answer: httpx2.Response) -> str:
    return answer.json()["choices"][0]["message"]["content"]


StartApi = Callable[[Settings], str]


@pytest.fixture
def start_api(database: Database, publisher: CeleryPublisher, runs: Runs) -> Iterator[StartApi]:
    """Starts an API on the same servers; to them it is another process."""
    with ExitStack() as stack:

        def start(settings: Settings) -> str:
            own = Database(database.url, pool_size=8)
            services = Services(
                settings,
                own,
                publisher,
                Runs(own, publisher, runs.policy),
                catalog(),
                Devices(settings.fleet),
                OperatorCommands(own, lambda: None),
            )
            listening = socket.create_server(("127.0.0.1", 0))
            server = uvicorn.Server(uvicorn.Config(serve(services), log_config=None, timeout_graceful_shutdown=1))
            thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
            thread.start()
            stack.callback(thread.join)
            stack.callback(setattr, server, "should_exit", True)
            return f"http://127.0.0.1:{listening.getsockname()[1]}"

        yield start


@pytest.fixture
def second_api(start_api: StartApi, settings: Settings) -> str:
    return start_api(settings)


def test_a_deterministic_request_is_answered_once(api: str, start_pool: StartPool, valkey: redis.Redis) -> None:
    start_pool()
    first, second = post(api, **EXACT), post(api, **EXACT)
    assert [status(first), status(second)] == ["miss", "hit"]
    assert text(first) == text(second)
    assert second.headers["X-Arriero-Run"] == first.headers["X-Arriero-Run"], "the run that computed it"
    assert int(second.headers["Age"]) >= 0
    assert first.json()["id"] != second.json()["id"]
    usage = second.json()["usage"]
    assert usage["completion_tokens"] == first.json()["usage"]["completion_tokens"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"]


def test_a_hit_streams_in_the_pieces_of_the_first_answer(api: str, start_pool: StartPool) -> None:
    start_pool(tokens_per_second=100)
    with openai.OpenAI(base_url=f"{api}/v1", api_key="none") as client:
        answers = [
            list(
                client.chat.completions.create(
                    **body(max_tokens=12, temperature=0), stream=True, stream_options={"include_usage": True}
                )
            )
            for _ in range(2)
        ]
    texts = ["".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) for chunks in answers]
    assert texts[0] == texts[1]
    assert len(answers[1]) > 4
    forms = [[(c.object, c.choices[0].finish_reason if c.choices else "usage") for c in chunks] for chunks in answers]
    assert forms[0] == forms[1]
    usage = answers[1][-1].usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens


def test_a_plain_answer_and_a_stream_are_one_entry(api: str, start_pool: StartPool) -> None:
    start_pool()
    whole = text(post(api, **EXACT))
    streamed = post(api, **EXACT, stream=True)
    assert status(streamed) == "hit"
    assert streamed.text.endswith("data: [DONE]\n\n")
    pieces = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    assert "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces) == whole


def test_chance_is_not_cached_unless_the_client_asks_for_it(api: str, start_pool: StartPool) -> None:
    start_pool()
    assert [status(post(api)) for _ in range(2)] == ["bypass", "bypass"]
    assert [status(post(api, cache="max-age=60")) for _ in range(2)] == ["miss", "hit"]
    assert [status(post(api, seed=7)) for _ in range(2)] == ["miss", "hit"]


def test_cache_control_is_respected(api: str, start_pool: StartPool, valkey: redis.Redis) -> None:
    start_pool()
    assert status(post(api, cache="no-store", **EXACT)) == "miss"
    assert status(post(api, **EXACT)) == "miss", "the first answer was not kept"
    first = post(api, **EXACT)
    new = post(api, cache="no-cache", **EXACT)
    assert [status(first), status(new)] == ["hit", "miss"]
    assert post(api, **EXACT).headers["X-Arriero-Run"] == new.headers["X-Arriero-Run"], "the new one was kept"
    assert status(post(api, cache="no-store", **EXACT)) == "hit"
    [entry] = valkey.keys("arriero:cache:entry:*")
    value = valkey.get(entry)
    valkey.set(entry, f"{int(value[:13]) - 30_000:013d}{value[13:]}", keepttl=True)  # 30 seconds ago
    old = post(api, **EXACT)
    assert int(old.headers["Age"]) >= 30
    assert status(post(api, cache="max-age=10", **EXACT)) == "miss"


@pytest.mark.parametrize(
    "other",
    [
        {"max_tokens": 9},
        {"messages": [{"role": "user", "content": "Hello!"}]},
        {"stop": "x"},
        {"seed": 1},
    ],
)
def test_another_request_is_another_key(api: str, start_pool: StartPool, other: dict[str, Any]) -> None:
    start_pool()
    assert [status(post(api, **EXACT)), status(post(api, **(EXACT | other)))] == ["miss", "miss"]


def test_the_key_has_the_build_and_the_namespace() -> None:
    request = {"model": MODEL, "messages": [{"role": "user", "content": "a"}]}
    keys = {
        key_of(namespace, MODEL, build, request, "interactive").digest
        for namespace in ("default", "research")
        for build in ("one", "two")
    }
    assert len(keys) == 4
    streamed = key_of("default", MODEL, "one", {**request, "stream": True}, "interactive")
    assert streamed.digest in keys


def test_embeddings_and_scores_are_cached(api: str, start_pool: StartPool) -> None:
    start_pool()
    answers = [post(api, "embeddings", input=["a", "b"]) for _ in range(2)]
    assert [status(one) for one in answers] == ["miss", "hit"]
    assert answers[0].json() == answers[1].json()
    ranked = [post(api, "rerank", query="a", documents=["a b", "c"]) for _ in range(2)]
    assert [status(one) for one in ranked] == ["miss", "hit"]


def asked(pool: ThreadPoolExecutor, api: str, **more: Any) -> Future[httpx2.Response]:
    return pool.submit(post, api, **more)


def until(found: Callable[[], Any]) -> Any:
    limit = time.monotonic() + PATIENCE
    while not (value := found()):
        assert time.monotonic() < limit
        threading.Event().wait(0.01)
    return value


def test_equal_requests_at_a_time_are_computed_once(
    api: str, second_api: str, start_pool: StartPool, valkey: redis.Redis
) -> None:
    pool = start_pool(slots=8, tokens_per_second=1)
    with ThreadPoolExecutor(6) as threads:
        first = asked(threads, api, **EXACT, max_tokens=40)
        until(lambda: valkey.keys("arriero:cache:flight:*"))
        others = [asked(threads, url, **EXACT, max_tokens=40) for url in (api, api, second_api, second_api)]
        until(lambda: valkey.hget("arriero:cache:counts", f"default|{MODEL}|shared") == "4")
        hurry(pool)
        answers = [one.result() for one in (first, *others)]
    assert [status(one) for one in answers] == ["miss", "shared", "shared", "shared", "shared"]
    assert len({text(one) for one in answers}) == 1
    assert len({one.headers["X-Arriero-Run"] for one in answers}) == 1
    assert len({one.json()["id"] for one in answers}) == 5
    assert status(post(second_api, **EXACT, max_tokens=40)) == "hit"


def hurry(pool: DirectRequests) -> None:
    """The engine of the pool is fast from now on."""
    assert isinstance(pool.engine, SimulatedEngine)
    pool.engine._pace = 0.001


def lines_of(api: str, got: list[str], first: threading.Event, leave: threading.Event | None = None) -> None:
    """Read a stream; with `leave`, go away after its first text once that is set."""
    with (
        httpx2.Client(timeout=PATIENCE) as client,
        client.stream("POST", f"{api}/v1/chat/completions", json=body(max_tokens=30, stream=True, **EXACT)) as answer,
    ):
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                content = json.loads(line[6:])["choices"][0]["delta"].get("content")
                if content:
                    got.append(content)
                    first.set()
                    if leave is not None and leave.wait(PATIENCE):
                        return
            if line == "data: [DONE]":
                got.append("[DONE]")


@pytest.mark.parametrize("same_process", [True, False])
def test_a_leader_that_leaves_does_not_stop_the_others(
    api: str, second_api: str, start_pool: StartPool, valkey: redis.Redis, same_process: bool
) -> None:
    pool = start_pool(slots=2, tokens_per_second=3)
    leader: list[str] = []
    follower: list[str] = []
    led, followed, leave = threading.Event(), threading.Event(), threading.Event()
    threads = [threading.Thread(target=lines_of, args=(api, leader, led, leave))]
    threads[0].start()
    assert led.wait(PATIENCE)
    other = api if same_process else second_api
    threads.append(threading.Thread(target=lines_of, args=(other, follower, followed)))
    threads[1].start()
    assert followed.wait(PATIENCE), "the follower has the text that was written before, live"
    assert "[DONE]" not in follower
    leave.set()
    threads[0].join(PATIENCE)
    hurry(pool)
    threads[1].join(PATIENCE)
    assert follower[-1] == "[DONE]"
    again = post(api, max_tokens=30, **EXACT)
    assert status(again) == "hit"
    assert "".join(follower[:-1]) == text(again)


def test_a_call_that_all_have_left_is_stopped(api: str, start_pool: StartPool, valkey: redis.Redis) -> None:
    pool = start_pool(slots=1, tokens_per_second=5)
    led, leave, got = threading.Event(), threading.Event(), list[str]()
    thread = threading.Thread(target=lines_of, args=(api, got, led, leave))
    thread.start()
    assert led.wait(PATIENCE)
    leave.set()
    thread.join(PATIENCE)
    until(lambda: not pool._active)
    until(lambda: not valkey.keys("arriero:cache:flight:*"))
    assert not valkey.keys("arriero:cache:entry:*")


def test_a_failure_is_not_kept(api: str, start_pool: StartPool, valkey: redis.Redis) -> None:
    start_pool(tokens_per_second=5)
    with (
        httpx2.Client(timeout=PATIENCE) as client,
        client.stream("POST", f"{api}/v1/chat/completions", json=body(max_tokens=60, stream=True, **EXACT)) as answer,
    ):
        run_id, lines = answer.headers["X-Arriero-Run"], answer.iter_lines()
        while '"content":"[' not in next(lines):
            pass
        until(lambda: client.post(f"{api}/v1/runs/{run_id}/cancel", json={}).status_code < 300)
        assert any('"code":"cancelled"' in line for line in lines)
    assert not valkey.keys("arriero:cache:entry:*")
    until(lambda: not valkey.keys("arriero:cache:flight:*"))


def test_a_follower_computes_when_the_leader_has_died(api: str, start_pool: StartPool, valkey: redis.Redis) -> None:
    """A lease without a process: it expires, and the call computes its answer."""
    start_pool()
    post(api, **EXACT)
    [entry] = valkey.keys("arriero:cache:entry:*")
    digest = entry.rpartition(":")[2]
    valkey.delete(entry)
    run = "00000000-0000-7000-8000-000000000000"
    valkey.set(f"arriero:cache:flight:{digest}:interactive", f"gone:{run}", px=3_000)
    answer = post(api, **EXACT)
    assert answer.status_code == 200, answer.text
    assert status(answer) == "miss"
    assert answer.headers["X-Arriero-Run"] != run


def test_a_follower_finishes_what_a_dead_leader_has_begun(api: str, start_pool: StartPool, valkey: redis.Redis) -> None:
    """The pool writes on when the API process that asked it has died; the follower keeps the answer."""
    start_pool()
    expected = text(post(api, **EXACT))
    [entry] = valkey.keys("arriero:cache:entry:*")
    digest, kept = entry.rpartition(":")[2], json.loads(valkey.get(entry)[13:])
    valkey.delete(entry)
    run = "00000000-0000-7000-8000-000000000001"
    valkey.set(f"arriero:cache:flight:{digest}:interactive", f"gone:{run}", px=2_500)
    stream, pool_id = token_stream.key(run, direct.STEP), "a-pool"
    valkey.set(direct.alive_key(pool_id), "1", ex=120)
    valkey.xadd(stream, {"begun": pool_id}, id="1-1")
    with ThreadPoolExecutor(1) as threads:
        following = asked(threads, api, **EXACT)
        until(lambda: not valkey.exists(f"arriero:cache:flight:{digest}:interactive"))
        for number, (kind, value) in enumerate(kept[1], 2):
            valkey.xadd(stream, {kind: value}, id=f"1-{number}")
        answer = following.result(PATIENCE)
    assert status(answer) == "shared"
    assert text(answer) == expected
    until(lambda: valkey.exists(entry))


def test_a_follower_keeps_no_answer_of_another_model(api: str, start_pool: StartPool, valkey: redis.Redis) -> None:
    """Whoever computed it had another model answer, and kept nothing."""
    start_pool()
    post(api, **EXACT)
    [entry] = valkey.keys("arriero:cache:entry:*")
    digest, kept = entry.rpartition(":")[2], json.loads(valkey.get(entry)[13:])
    valkey.delete(entry)
    run, pool_id = "00000000-0000-7000-8000-000000000002", "a-pool"
    flight, stream = f"arriero:cache:flight:{digest}:interactive", token_stream.key(run, direct.STEP)
    valkey.set(flight, f"gone:{run}", px=2_500)
    valkey.set(direct.alive_key(pool_id), "1", ex=120)
    valkey.xadd(stream, {"begun": pool_id}, id="1-1")
    with ThreadPoolExecutor(1) as threads:
        following = asked(threads, api, **EXACT)
        until(lambda: not valkey.exists(flight))
        for number, (kind, value) in enumerate(kept[1], 2):
            told = json.dumps({**json.loads(value), "model": "another"}) if kind == "done" else value
            valkey.xadd(stream, {kind: told}, id=f"1-{number}")
        assert status(following.result(PATIENCE)) == "shared"
    assert not valkey.exists(entry)


@pytest.mark.parametrize(
    ("error", "told"),
    [(redis.ConnectionError("gone"), "the broker is unreachable: gone"), (KeyError("x"), "has failed (KeyError)")],
)
def test_a_computation_that_raises_tells_the_calls_that_wait_for_it(error: Exception, told: str) -> None:
    async def source() -> AsyncGenerator[StreamEntry | Waiting]:
        yield Waiting("a while")
        raise error

    async def noted(_: Flight) -> None:
        pass

    async def follow() -> None:
        flight = Flight(key_of("default", MODEL, "", {}, "batch"), "run", source(), noted, noted)
        async for _ in flight.follow():
            pass

    with pytest.raises(ArrieroError, match=re.escape(told)):
        asyncio.run(follow())


def test_purge_and_stats(api: str, start_pool: StartPool, valkey: redis.Redis) -> None:
    start_pool()
    for _ in range(2):
        post(api, **EXACT)
    post(api, "embeddings", input="a")
    [one] = httpx2.get(f"{api}/v1/cache").json()["models"]
    assert (one["namespace"], one["model"], one["entries"]) == ("default", MODEL, 2)
    assert (one["hits"], one["misses"], one["shared"]) == (1, 2, 0)
    assert one["bytes"] > 0
    assert httpx2.delete(f"{api}/v1/cache", params={"model": "other:1b"}).json() == {"removed": 0}
    assert httpx2.delete(f"{api}/v1/cache", params={"namespace": "default"}).json() == {"removed": 2}
    assert status(post(api, **EXACT)) == "miss"
    [one] = httpx2.get(f"{api}/v1/cache").json()["models"]
    assert one["entries"] == 1


def test_the_bytes_of_all_answers_are_bounded(
    api: str, start_pool: StartPool, valkey: redis.Redis, settings: Settings
) -> None:
    start_pool()
    most = settings.cache.max_bytes
    post(api, **EXACT)
    [first] = valkey.keys("arriero:cache:entry:*")
    valkey.hset("arriero:cache:sizes", "total", str(most))
    post(api, **EXACT, max_tokens=9)
    assert not valkey.exists(first), "the oldest made room"


def test_policies() -> None:
    greedy = {"temperature": 0}
    assert policy_of({}, None) == BYPASS
    assert policy_of({}, "max-age=0") == BYPASS
    assert policy_of(greedy, "max-age=0") == CachePolicy(reads=False, writes=True, max_age=0)
    assert policy_of(greedy, "No-Cache, no-store") == CachePolicy(reads=False, writes=False)
    assert policy_of({"top_k": 1}, "nonsense=1") == CachePolicy(reads=True, writes=True)
    assert policy_of({}, "max-age=5") == CachePolicy(reads=True, writes=True, max_age=5)


def test_only_the_last_attempt_of_an_answer_is_kept() -> None:
    entries = [
        StreamEntry("1-1", EntryKind.BEGUN, "a"),
        StreamEntry("1-2", EntryKind.TEXT, "lost"),
        StreamEntry("2-1", EntryKind.BEGUN, "b"),
        StreamEntry("2-2", EntryKind.TEXT, "kept"),
        StreamEntry("2-3", EntryKind.DONE, "{}"),
    ]
    answer = CachedAnswer.of("r", entries)
    assert answer is not None
    assert answer.entries == ((EntryKind.TEXT, "kept"), (EntryKind.DONE, "{}"))
    assert CachedAnswer.decoded(answer.encoded()) == answer
    assert CachedAnswer.of("r", entries[:-1]) is None
    assert CachedAnswer.decoded(b"[") is None


def test_a_similar_chat_gets_the_answer_and_says_so(
    start_api: StartApi, settings: Settings, start_pool: StartPool, valkey: redis.Redis
) -> None:
    """Each message counts as similar here: the vectors of the simulated engine have no meaning."""
    start_pool()
    near = settings.cache.model_copy(update={"near_model": MODEL, "near_threshold": -1.0})
    api = start_api(settings.model_copy(update={"cache": near}))
    system = {"role": "system", "content": "Be brief."}
    first = post(api, **EXACT)
    assert status(first) == "miss"
    until(lambda: valkey.keys("arriero:cache:near:*"))
    other = {"messages": [{"role": "user", "content": "Good day."}]}
    answer = post(api, **EXACT, **other)
    assert status(answer) == "near"
    assert -1 <= float(answer.headers["X-Arriero-Similarity"]) <= 1
    assert answer.headers["X-Arriero-Run"] == first.headers["X-Arriero-Run"]
    assert text(answer) == text(first)
    assert status(post(api, **EXACT, **other)) == "near", "it is not kept as its own answer"
    assert status(post(api, **EXACT)) == "hit"
    assert status(post(api, **EXACT, messages=[system, *other["messages"]])) == "miss", "another system prompt"
    assert status(post(api, temperature=0, max_tokens=9)) == "miss", "another parameter"
    [counted] = httpx2.get(f"{api}/v1/cache").json()["models"]
    assert (counted["near"], counted["hits"], counted["misses"]) == (2, 3, 3)


def test_messages_that_differ_are_not_similar(start_api: StartApi, settings: Settings, start_pool: StartPool) -> None:
    start_pool()
    api = start_api(
        settings.model_copy(update={"cache": settings.cache.model_copy(update={"near_model": MODEL})}),
    )
    assert status(post(api, **EXACT)) == "miss"
    assert status(post(api, **EXACT, messages=[{"role": "user", "content": "Good day."}])) == "miss"
