"""LangChain's adapters for OpenAI's API and for Ollama's."""

from __future__ import annotations

import asyncio

import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_ollama import ChatOllama, OllamaEmbeddings
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel

MODEL, TOOLS, EMBEDDING = "smollm2:135m", "smollm2-tools:135m", "all-minilm:l6-v2"


class Animal(BaseModel):
    """An animal."""

    legs: int


@tool
def weather(city: str) -> str:
    """The weather of a city."""
    return f"rain in {city}"


def openai(url: str, model: str = MODEL, **more: object) -> ChatOpenAI:
    return ChatOpenAI(base_url=f"{url}/v1", api_key="none", model=model, temperature=0, timeout=300, **more)


def ollama(url: str, model: str = MODEL, **more: object) -> ChatOllama:
    return ChatOllama(base_url=url, model=model, temperature=0, **more)


@pytest.mark.parametrize("kind", [openai, ollama])
def test_an_answer_its_stream_and_its_usage(url: str, kind) -> None:
    chat = kind(url, **({"max_tokens": 12} if kind is openai else {"num_predict": 12}))
    messages = [("system", "Be short."), ("human", "Say hello.")]
    whole = chat.invoke(messages)
    assert whole.content
    assert whole.usage_metadata["output_tokens"] <= 12
    pieces = list(chat.stream(messages))
    assert "".join(piece.content for piece in pieces) == whole.content
    assert len(pieces) > 2

    async def ask() -> str:
        return "".join([piece.content async for piece in chat.astream(messages)])

    assert asyncio.run(ask()) == whole.content
    assert len(chat.batch(["a", "b", "c"])) == 3


@pytest.mark.parametrize("kind", [openai, ollama])
def test_an_answer_in_the_form_of_a_type(url: str, kind) -> None:
    chat = kind(url, **({"max_tokens": 60} if kind is openai else {"num_predict": 60}))
    found = chat.with_structured_output(Animal, method="json_schema").invoke("A dog has four legs.")
    assert isinstance(found, Animal)


def test_a_tool_that_must_be_called(url: str) -> None:
    chat = openai(url, TOOLS, max_tokens=80).bind_tools([weather], tool_choice="weather")
    answer = chat.invoke("What is the weather in Paris?")
    assert answer.tool_calls[0]["name"] == "weather"
    streamed = None
    for piece in chat.stream("What is the weather in Paris?"):
        streamed = piece if streamed is None else streamed + piece
    assert streamed.tool_calls[0]["args"].keys() == {"city"}
    call = answer.tool_calls[0]
    history = [HumanMessage("Weather?"), AIMessage("", tool_calls=[call]), ToolMessage("rain", tool_call_id=call["id"])]
    assert openai(url, TOOLS, max_tokens=8).invoke(history).content


def test_tools_are_accepted_as_ollama_sends_them(url: str) -> None:
    answer = ollama(url, TOOLS, num_predict=60).bind_tools([weather]).invoke("What is the weather in Paris?")
    assert answer.content or answer.tool_calls[0]["name"] == "weather"


def test_embeddings(url: str) -> None:
    # Without this check LangChain sends token ids, which only OpenAI's own models know.
    found = OpenAIEmbeddings(base_url=f"{url}/v1", api_key="none", model=EMBEDDING, check_embedding_ctx_length=False)
    vectors = found.embed_documents(["a cat", "a dog"])
    assert [len(vector) for vector in vectors] == [384, 384]
    same = OllamaEmbeddings(base_url=url, model="all-minilm").embed_documents(["a cat", "a dog"])
    assert same[0] == pytest.approx(vectors[0], abs=1e-4)
