"""Limits on calls of models: requests, tokens, calls at a time, waiting calls; their headers, and what survives."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest
import redis

from tests.api.openai.conftest import MODEL, StartPool

URL = "/v1/limits/namespace/default"


@pytest.fixture
def client(api: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=api, timeout=60, trust_env=False) as made:
        yield made


def limit(client: httpx2.Client, **limits: int) -> None:
    assert client.put(URL, json=limits).status_code == 200


def chat(client: httpx2.Client, **more: Any) -> httpx2.Response:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, **more}
    return client.post("/v1/chat/completions", json=body)


def until(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


def test_without_limits_nothing_is_sent_and_no_header_is_added(
    client: httpx2.Client, start_pool: StartPool, valkey: redis.Redis
) -> None:
    start_pool()
    answer = chat(client)
    assert answer.status_code == 200
    assert not [name for name in answer.headers if "ratelimit" in name]
    assert valkey.keys("arriero:limits:*") == []


def test_requests_are_counted_and_refused_with_the_time_to_wait(client: httpx2.Client, start_pool: StartPool) -> None:
    start_pool()
    limit(client, requests_per_minute=3)
    remaining = []
    for _ in range(3):
        answer = chat(client)
        assert answer.status_code == 200
        assert answer.headers["x-ratelimit-limit-requests"] == "3"
        remaining.append(int(answer.headers["x-ratelimit-remaining-requests"]))
    assert remaining == [2, 1, 0]

    refused = chat(client)
    assert refused.status_code == 429
    # A request comes back every 20 s; those before have taken some of the time.
    assert 1 <= int(refused.headers["Retry-After"]) <= 20
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert refused.headers["x-ratelimit-reset-requests"].endswith("s")
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert "3 requests per minute" in refused.json()["error"]["message"]
    assert client.post("/v1/embeddings", json={"model": MODEL, "input": "x"}).status_code == 429


def test_a_stream_counts_too_and_its_refusal_is_no_stream(client: httpx2.Client, start_pool: StartPool) -> None:
    start_pool()
    limit(client, requests_per_minute=1)
    first = chat(client, stream=True)
    assert (first.status_code, first.headers["x-ratelimit-remaining-requests"]) == (200, "0")
    refused = chat(client, stream=True)
    assert (refused.status_code, refused.headers["content-type"]) == (429, "application/json")


def test_tokens_are_charged_after_the_answer_and_an_overdrawn_minute_is_refused(
    client: httpx2.Client, start_pool: StartPool, valkey: redis.Redis
) -> None:
    start_pool()
    limit(client, tokens_per_minute=5)
    answer = chat(client, max_tokens=8)
    assert answer.headers["x-ratelimit-remaining-tokens"] == "5", "its own tokens are known at its end only"
    used = answer.json()["usage"]["total_tokens"]
    assert used > 5
    until(lambda: valkey.get("arriero:limits:namespace:default:tokens"))

    refused = chat(client)
    assert refused.status_code == 429
    assert "5 tokens per minute" in refused.json()["error"]["message"]
    # What was used beyond the limit has to come back first, at 12 s for each token.
    assert (used - 5) * 12 - 30 <= int(refused.headers["Retry-After"]) <= (used - 4) * 12


def test_a_stopped_stream_is_charged_with_what_was_written(
    client: httpx2.Client, start_pool: StartPool, valkey: redis.Redis
) -> None:
    start_pool(tokens_per_second=50)
    limit(client, tokens_per_minute=1000)
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2000, "stream": True}
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = answer.iter_lines()
        for _ in range(12):
            next(lines)
    until(lambda: valkey.get("arriero:limits:namespace:default:tokens"))


def test_calls_at_a_time_are_limited_and_free_again_at_their_end(
    client: httpx2.Client, api: str, start_pool: StartPool, valkey: redis.Redis
) -> None:
    start_pool(tokens_per_second=20)
    limit(client, concurrent_calls=1)
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2000, "stream": True}
    with (
        httpx2.Client(base_url=api, timeout=60, trust_env=False) as other,
        other.stream("POST", "/v1/chat/completions", json=body) as answer,
    ):
        assert answer.status_code == 200
        refused = chat(client)
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
        assert "1 calls at a time" in refused.text
    until(lambda: valkey.zcard("arriero:limits:namespace:default:concurrent") == 0)
    assert chat(client).status_code == 200


def test_calls_of_a_dead_process_are_forgotten(
    client: httpx2.Client, start_pool: StartPool, valkey: redis.Redis
) -> None:
    """Their lease is over: nobody renews it."""
    start_pool()
    limit(client, concurrent_calls=1)
    now = int(valkey.time()[0]) * 1000
    valkey.zadd("arriero:limits:namespace:default:concurrent", {"of-a-dead-one": now + 60_000})
    assert chat(client).status_code == 429
    valkey.zadd("arriero:limits:namespace:default:concurrent", {"of-a-dead-one": now - 1})
    assert chat(client).status_code == 200


def test_waiting_calls_are_limited_by_class(client: httpx2.Client, api: str, valkey: redis.Redis) -> None:
    """Without a pool every call waits. Those of the other class have places of their own."""
    limit(client, waiting_interactive=2, waiting_batch=1)
    key = "arriero:limits:namespace:default:waiting-interactive"
    stop = threading.Event()

    def wait() -> None:
        with httpx2.Client(base_url=api, timeout=60, trust_env=False) as other:
            body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "stream": True}
            with other.stream("POST", "/v1/chat/completions", json=body):
                stop.wait(60)

    waiting = [threading.Thread(target=wait) for _ in range(2)]
    for thread in waiting:
        thread.start()
    until(lambda: valkey.zcard(key) == 2)
    refused = chat(client)
    assert refused.status_code == 429
    assert "2 waiting calls of this class" in refused.text
    valkey.zadd(key.replace("interactive", "batch"), {"x": 2e12})
    assert chat(client, service_tier="flex").status_code == 429
    stop.set()
    for thread in waiting:
        thread.join()
    until(lambda: valkey.zcard(key) == 0)


def test_a_begun_call_waits_no_more(client: httpx2.Client, api: str, start_pool: StartPool) -> None:
    start_pool(tokens_per_second=20)
    limit(client, waiting_interactive=1)
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2000, "stream": True}
    with (
        httpx2.Client(base_url=api, timeout=60, trust_env=False) as other,
        other.stream("POST", "/v1/chat/completions", json=body) as answer,
    ):
        next(answer.iter_lines())
        until(lambda: chat(client).status_code == 200)


def test_limits_of_settings_hold_for_all_and_zero_lifts_them_for_one(
    client: httpx2.Client, start_pool: StartPool
) -> None:
    start_pool()
    changed = {"settings": {"limits.namespace_requests_per_minute": 1}, "reason": "a test"}
    assert client.patch("/v1/admin/settings", json=changed).status_code == 200
    assert [chat(client).status_code for _ in range(2)] == [200, 429]
    limit(client, requests_per_minute=0)
    assert [chat(client).status_code for _ in range(2)] == [200, 200]
    assert client.delete(URL).status_code == 200
    assert chat(client).status_code == 429
    assert client.delete(URL).status_code == 404


def test_submissions_count_with_the_headers_of_the_ietf(client: httpx2.Client) -> None:
    limit(client, requests_per_minute=2)
    run = {"definition": {"workflow": "w", "steps": [{"id": "a", "kind": "noop"}]}}
    answers = [client.post("/v1/runs", json=run) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [202, 202, 429]
    assert answers[0].headers["RateLimit-Policy"] == '"requests";q=2;w=60'
    assert answers[0].headers["RateLimit"].startswith('"requests";r=1;t=')
    assert 1 <= int(answers[2].headers["Retry-After"]) <= 30
    assert answers[2].json()["type"] == "urn:arriero:error:limit-reached"
    fork = client.post(f"/v1/runs/{answers[0].json()['id']}/fork", json={"from": "a"})
    assert fork.status_code == 429
    compression = client.post("/v1/compress", json={"model": "smollm2:135m", "text": "A text.", "target_ratio": 2})
    assert compression.status_code == 429
    file = client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("a.jsonl", b"{}")}).json()["id"]
    batch = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
    refused = client.post("/v1/batches", json=batch)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")


def test_a_key_of_a_wrong_type_blocks_nobody(client: httpx2.Client, start_pool: StartPool, valkey: redis.Redis) -> None:
    start_pool()
    limit(client, requests_per_minute=5, concurrent_calls=2)
    valkey.set("arriero:limits:namespace:default:concurrent", "x")
    assert chat(client).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("namespace/UPPER", {}),
        ("namespace/%00", {}),
        ("nothing/x", {}),
        ("namespace/x", {"requests_per_minute": -1}),
        ("namespace/x", {"requests_per_minute": 10**12}),
        ("namespace/x", {"requests": 1}),
        ("key/" + "x" * 101, {}),
    ],
)
def test_wrong_limits_are_refused(client: httpx2.Client, path: str, body: dict[str, Any]) -> None:
    assert client.put(f"/v1/limits/{path}", json=body).status_code == 422


def test_a_batch_counts_as_one_request(client: httpx2.Client) -> None:
    line = {"custom_id": "1", "method": "POST", "url": "/v1/embeddings", "body": {"model": MODEL, "input": "a"}}
    given = {"file": ("lines.jsonl", json.dumps(line).encode())}
    file = client.post("/v1/files", files=given, data={"purpose": "batch"}).json()["id"]
    limit(client, requests_per_minute=1)
    batch = {"input_file_id": file, "endpoint": "/v1/embeddings", "completion_window": "24h"}
    answers = [client.post("/v1/batches", json=batch) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 429], answers[0].text
    assert answers[1].json()["error"]["code"] == "rate_limit_exceeded"
    assert len(client.get("/v1/batches").json()["data"]) == 1
