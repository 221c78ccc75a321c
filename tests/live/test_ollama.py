"""The official client of Ollama, with real models in a real installation."""

from __future__ import annotations

import asyncio

import ollama
import pytest
from pydantic import BaseModel

from tests.live.conftest import LETTERS, MODEL, PATIENCE, Live, until

pytestmark = pytest.mark.slow

#: A model that nothing keeps running.
EMBEDDING = "all-minilm:l6-v2"
SHORT = {"num_predict": 8, "temperature": 0}


class Animal(BaseModel):
    legs: int


def test_the_official_client_works_as_with_ollama(live: Live) -> None:
    with ollama.Client(host=live.api, timeout=PATIENCE) as client:
        whole = client.chat("smollm2", LETTERS, options=SHORT)
        lines = list(client.chat("smollm2", LETTERS, options=SHORT, stream=True))
        assert "".join(line.message.content or "" for line in lines) == whole.message.content
        assert (whole.done_reason, whole.eval_count) == ("length", 8)
        assert whole.model == "smollm2"
        dog = [{"role": "user", "content": "A dog has four legs."}]
        Animal.model_validate_json(client.chat(MODEL, dog, format=Animal.model_json_schema()).message.content or "")
        fruit = client.generate(MODEL, "A fruit as JSON:", format="json", options={"num_predict": 20})
        assert (fruit.response or "").startswith("{")
        raw = client.generate(MODEL, "The capital of France is", raw=True, options={"num_predict": 3, "temperature": 0})
        assert "Paris" in (raw.response or "")
        with pytest.raises(ollama.ResponseError, match="does not support tools"):
            client.chat(MODEL, LETTERS, tools=[{"type": "function", "function": {"name": "f"}}])
        with pytest.raises(ollama.ResponseError, match="exceed"):
            client.generate(MODEL, "word " * 20_000)
        assert MODEL in {model.model for model in client.list().models}
        assert MODEL in {model.model for model in client.ps().models}

    async def ask() -> str:
        one = ollama.AsyncClient(host=live.api, timeout=PATIENCE)
        text = "".join(
            [line.message.content or "" async for line in await one.chat(MODEL, LETTERS, options=SHORT, stream=True)]
        )
        await one.close()
        return text

    assert asyncio.run(ask()) == whole.message.content


def test_keep_alive_loads_keeps_and_unloads_a_model(live: Live) -> None:
    live.arriero("models", "pull", EMBEDDING)
    with ollama.Client(host=live.api, timeout=PATIENCE) as client:

        def expires() -> float | None:
            found = {one.model: one.expires_at for one in client.ps().models}.get(EMBEDDING)
            return None if found is None else found.timestamp()

        assert client.generate(EMBEDDING, keep_alive=0).done_reason == "unload"
        until(lambda: expires() is None)
        assert client.generate(EMBEDDING, keep_alive="1h").done_reason == "load"
        # A pool that drains may have answered; then another one is loaded.
        until(lambda: expires() is not None)
        hour = expires()
        assert hour is not None
        assert len(client.embed(EMBEDDING, ["a", "b"], keep_alive=-1).embeddings) == 2
        forever = expires()
        assert forever is not None
        assert forever > hour + 1e9, "some centuries"
        assert list(client.embed(EMBEDDING, [], keep_alive=0).embeddings) == []
        until(lambda: expires() is None)
        kept = client.generate(MODEL, keep_alive=0)
        assert kept.done_reason == "load", "the settings keep it running"
