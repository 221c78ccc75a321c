"""A model that thinks, behind the API: a real engine whose text is scripted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ollama
import openai
import pytest

from app.catalog import files
from app.catalog.model import PromptProfile
from tests.api.openai.conftest import MODEL, StartPool
from tests.workers.engine.chat.script import written
from workers.engine.engine import LlamaEngine
from workers.engine.options import EngineOptions

pytestmark = pytest.mark.slow

HELLO: Any = [{"role": "user", "content": "Hello."}]
TEXT = "<think>\nA greeting.\n</think>\n\nHello, you."


@pytest.fixture
def engine() -> Iterator[LlamaEngine]:
    path = files.locate(files.read_catalog().get(MODEL), Path())
    made = LlamaEngine(path, EngineOptions(slots=1, context=512, threads=1, profile=PromptProfile(profile="thinking")))
    yield made
    made.close()


@pytest.fixture
def client(api: str, start_pool: StartPool, engine: LlamaEngine) -> Iterator[Any]:
    start_pool(engine=engine)
    with openai.OpenAI(base_url=f"{api}/v1", api_key="none") as made:
        yield made


def test_thinking_reaches_clients_plain_and_streamed(client: Any, engine: LlamaEngine) -> None:
    with written(engine, TEXT, ends=True):
        whole = client.chat.completions.create(model=MODEL, messages=HELLO)
    message = whole.choices[0].message
    assert (message.content, message.reasoning_content) == ("Hello, you.", "A greeting.")
    assert 0 < whole.usage.completion_tokens_details.reasoning_tokens < whole.usage.completion_tokens

    with written(engine, TEXT, ends=True):
        chunks = list(client.chat.completions.create(model=MODEL, messages=HELLO, stream=True))
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    thought = [getattr(delta, "reasoning_content", None) or "" for delta in deltas]
    assert "".join(thought) == "A greeting."
    assert sum(map(bool, thought)) > 1, "piece by piece"
    assert "".join(delta.content or "" for delta in deltas) == "Hello, you."


def test_thinking_is_an_item_of_a_response(client: Any, engine: LlamaEngine) -> None:
    with written(engine, TEXT, ends=True):
        whole = client.responses.create(model=MODEL, input="Hello.")
    assert [item.type for item in whole.output] == ["reasoning", "message"]
    assert whole.output[0].content[0].text == "A greeting."
    assert whole.output_text == "Hello, you."

    with written(engine, TEXT, ends=True):
        events = list(client.responses.create(model=MODEL, input="Hello.", stream=True))
    assert "".join(one.delta for one in events if one.type == "response.reasoning_text.delta") == "A greeting."
    assert [item.type for item in events[-1].response.output] == ["reasoning", "message"]


def test_ollamas_clients_get_it_beside_the_text(client: Any, api: str, engine: LlamaEngine) -> None:
    with ollama.Client(api) as one:
        with written(engine, TEXT, ends=True):
            whole = one.chat(MODEL, HELLO, think=True)
        assert (whole.message.thinking, whole.message.content) == ("A greeting.", "Hello, you.")
        for logprobs in (False, True):
            with written(engine, TEXT, ends=True):
                lines = list(one.chat(MODEL, HELLO, stream=True, logprobs=logprobs))
            assert "".join(line.message.thinking or "" for line in lines) == "A greeting."
            assert "".join(line.message.content or "" for line in lines) == "Hello, you."
        with written(engine, TEXT, ends=True):
            made = one.generate(MODEL, "Hello.", think="low")
        assert (made.thinking, made.response) == ("A greeting.", "Hello, you.")
