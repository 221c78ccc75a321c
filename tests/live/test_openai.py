"""The official client of OpenAI's API, and `generate` and `chat`, with a real model in a real installation."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import httpx2
import openai
import pytest
from pydantic import BaseModel, Field

from tests.live.conftest import LETTERS, MODEL, PATIENCE, ROOT, Live, generate, until

pytestmark = pytest.mark.slow

#: Slots of the model's pool.
SLOTS = 4


class Animal(BaseModel):
    name: str = Field(max_length=30)
    legs: int = Field(ge=0, le=999)


def test_chat_completions_do_what_their_parameters_say(live: Live) -> None:
    with openai.OpenAI(base_url=f"{live.api}/v1", api_key="none", timeout=PATIENCE) as client:
        create = client.chat.completions.create
        options = {"model": MODEL, "messages": LETTERS, "max_tokens": 12}
        new = {"extra_headers": {"Cache-Control": "no-cache"}}
        first, second = (create(**options, temperature=0, **new).choices[0].message.content for _ in range(2))
        assert first == second
        texts = create(**options, n=3, seed=1).choices
        assert [choice.index for choice in texts] == [0, 1, 2]
        assert len({choice.message.content for choice in texts}) > 1
        stopped = create(**options, temperature=0, stop=[(first or "")[4:6]]).choices[0]
        assert (stopped.finish_reason, stopped.message.content) == ("stop", (first or "")[:4])
        logprobs = create(**options, logprobs=True, top_logprobs=2, temperature=0).choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        assert len(logprobs.content) == 12
        assert {len(one.top_logprobs) for one in logprobs.content} == {2}
        parsed = client.chat.completions.parse(
            model=MODEL,
            messages=[{"role": "user", "content": "A dog has four legs."}],
            response_format=Animal,
            max_completion_tokens=60,
        )
        assert isinstance(parsed.choices[0].message.parsed, Animal)
        again = create(**options, temperature=0, **new)
        assert again.usage is not None
        assert again.usage.prompt_tokens_details is not None
        assert again.usage.prompt_tokens_details.cached_tokens, "the prompt was computed before"
        with pytest.raises(openai.BadRequestError, match="exceed the context"):
            create(model=MODEL, messages=[{"role": "user", "content": "word " * 20_000}])
        with pytest.raises(openai.NotFoundError):
            create(model="nothing", messages=LETTERS)
        assert MODEL in [model.id for model in client.models.list()]
        found = client.models.retrieve(MODEL)
        assert (found.id, getattr(found, "state", None)) == (MODEL, "resident")


def test_responses_do_what_their_parameters_say(live: Live) -> None:
    with openai.OpenAI(base_url=f"{live.api}/v1", api_key="none", timeout=PATIENCE) as client:
        create = client.responses.create
        question = LETTERS[0]["content"]
        first = create(model=MODEL, input=question, temperature=0, max_output_tokens=12)
        assert (first.status, bool(first.output_text)) == ("incomplete", True)
        with client.responses.stream(
            model=MODEL, input=LETTERS[0]["content"], temperature=0, max_output_tokens=12
        ) as stream:
            text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert text == first.output_text
        second = create(model=MODEL, input="And again?", previous_response_id=first.id, max_output_tokens=12)
        assert second.usage is not None
        assert second.usage.input_tokens_details.cached_tokens, "the conversation before was computed before"
        parsed = client.responses.parse(model=MODEL, input="A dog has four legs.", text_format=Animal)
        assert isinstance(parsed.output_parsed, Animal)
        waiting = create(model=MODEL, input="Say hello.", background=True, max_output_tokens=12)
        until(lambda: client.responses.retrieve(waiting.id).status not in {"queued", "in_progress"})
        assert client.responses.retrieve(waiting.id).output_text
        client.responses.delete(waiting.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(waiting.id)


def test_many_streams_at_once_have_all_their_tokens(live: Live) -> None:
    """More than the pool has slots, so some go directly and others as runs; none sees a difference."""

    async def ask(client: openai.AsyncOpenAI, number: int) -> tuple[int, int]:
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": f"Tell me about the number {number}."}],
            max_tokens=16,
            stream=True,
            stream_options={"include_usage": True},
        )
        pieces, tokens = 0, 0
        async for chunk in stream:
            pieces += sum(bool(choice.delta.content) for choice in chunk.choices)
            tokens = chunk.usage.completion_tokens if chunk.usage else tokens
        return pieces, tokens

    async def ask_all() -> list[tuple[int, int]]:
        async with openai.AsyncOpenAI(base_url=f"{live.api}/v1", api_key="none", timeout=PATIENCE) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(12)))

    for pieces, tokens in asyncio.run(ask_all()):
        assert 0 < tokens <= 16
        assert 0 < pieces <= tokens


def test_a_client_that_leaves_stops_the_text(live: Live) -> None:
    body = {"model": MODEL, "messages": LETTERS, "max_tokens": 1500, "stream": True, "logit_bias": {"2": -100}}
    with (
        httpx2.Client(timeout=PATIENCE) as client,
        client.stream("POST", f"{live.api}/v1/chat/completions", json=body) as answer,
    ):
        next(answer.iter_lines())
        run_id = answer.headers["X-Arriero-Run"]
    until(lambda: live.run(run_id).get("state") in {"cancelled", "succeeded"})
    step = live.run(run_id)["steps"][0]
    assert step["tokens_out"] < 1500


def test_generate_prints_an_answer_and_names_what_is_wrong(live: Live) -> None:
    first = live.arriero("generate", MODEL, "Say hello.", "--max-tokens", "5", "--temperature", "0")
    assert first.stdout.strip()
    assert "cut at 5 tokens" in first.stderr
    assert "no model 'nothing'" in live.arriero("generate", "nothing", "x", expect=3).stderr


def test_chat_without_a_terminal_answers_one_message(live: Live) -> None:
    command = [sys.executable, "-m", "app", f"--set=api.url={live.api}", "chat", MODEL, "--max-tokens", "5"]
    done = subprocess.run(
        command,
        input="Say hello.",
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_a_batch_is_done_beside_a_call_and_a_workflow(live: Live, tmp_path: Path) -> None:
    """Its long texts have every slot; a call is answered, and a step of a workflow gets a slot, before they end."""
    lines = [
        {
            "custom_id": f"r{n}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": MODEL, "messages": LETTERS, "max_tokens": 300, "logit_bias": {"2": -100}},
        }
        for n in range(40)
    ]
    file = tmp_path / "in.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    batch = live.arriero("batches", "create", str(file)).stdout.strip()
    with openai.OpenAI(base_url=f"{live.api}/v1", api_key="none", timeout=PATIENCE) as client:
        until(lambda: client.batches.retrieve(batch).status == "in_progress")
        run_id = client.batches.retrieve(batch).model_extra["run_id"]
        held = f"{live.api}/v1/runs/{run_id}/steps/lines_0/items?state=running"
        until(lambda: len(httpx2.get(held, timeout=30).json().get("items", ())) >= SLOTS)
        answer = client.chat.completions.create(model=MODEL, messages=LETTERS, max_tokens=4)  # type: ignore[arg-type] # literals
        assert answer.choices[0].finish_reason == "length"
        asked = live.until_ended(live.submit({**generate("Say hello.", max_tokens=4), "priority": "interactive"}))
        assert asked["state"] == "succeeded"
        assert client.batches.retrieve(batch).status == "in_progress"
        client.batches.cancel(batch)
        ended = until(lambda: found if (found := client.batches.retrieve(batch)).status == "cancelled" else None)
        done, rest = (
            [] if one is None else client.files.content(one).text.splitlines()
            for one in (ended.output_file_id, ended.error_file_id)
        )
        assert sorted(json.loads(one)["custom_id"] for one in done + rest) == sorted(f"r{n}" for n in range(40))
