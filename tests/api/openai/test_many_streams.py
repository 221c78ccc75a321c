"""Many streams at a time: a short form of `benchmarks.streams`, with a simulated engine."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from datetime import timedelta

import httpx2
import pytest
import redis

from app.inference import direct, token_stream
from tests.api.openai.conftest import StartPool
from tests.api.openai.test_chat_completions import PATIENCE, body

STREAMS, TOKENS, VANISHING = 150, 16, 10


async def streamed(client: httpx2.AsyncClient, *, leaves: bool) -> tuple[str, str]:
    """The run and the text of a stream."""
    text = ""
    async with client.stream("POST", "/v1/chat/completions", json=body(max_tokens=TOKENS, stream=True)) as answer:
        assert answer.status_code == 200, await answer.aread()
        run_id = answer.headers["X-Arriero-Run"]
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                return run_id, text
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                assert "error" not in chunk, chunk
                text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
                if leaves and text:
                    return run_id, text
    raise AssertionError("the stream has no end")


def test_no_token_of_many_streams_is_lost_or_doubled(
    api: str, start_pool: StartPool, valkey: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All at the same time; each stream is whole, and its ids are consecutive."""
    # Here no worker takes what becomes a run.
    monkeypatch.setattr(direct, "TAKEN_WITHIN", timedelta(seconds=PATIENCE))
    pool = start_pool(slots=STREAMS, tokens_per_second=8)

    async def all_of_them() -> list[tuple[str, str]]:
        limits = httpx2.Limits(max_connections=STREAMS)
        async with httpx2.AsyncClient(base_url=api, timeout=PATIENCE, limits=limits) as client:
            return await asyncio.gather(
                *(streamed(client, leaves=number % VANISHING == 0) for number in range(STREAMS))
            )

    found = asyncio.run(all_of_them())
    whole = [text for number, (_, text) in enumerate(found) if number % VANISHING]
    assert set(whole) == {("[simulated] " * TOKENS)[: 4 * TOKENS]}
    for number, (run_id, text) in enumerate(found):
        entries = valkey.xrange(token_stream.key(run_id, direct.STEP))
        assert [id_ for id_, _ in entries] == [f"1-{n}" for n in range(1, len(entries) + 1)]
        written = "".join(fields.get("text", "") for _, fields in entries)
        assert written == text if number % VANISHING else written.startswith(text)
    limit = time.monotonic() + PATIENCE
    while pool._active:
        assert time.monotonic() < limit, "a client that has left keeps its slot"
        threading.Event().wait(0.01)
