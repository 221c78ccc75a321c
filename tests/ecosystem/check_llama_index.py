"""LlamaIndex' adapters for servers with OpenAI's API."""

from __future__ import annotations

import asyncio

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

MODEL, TOOLS, EMBEDDING = "smollm2:135m", "smollm2-tools:135m", "all-minilm:l6-v2"


class Animal(BaseModel):
    """An animal."""

    legs: int


def model(url: str, name: str = MODEL, max_tokens: int = 12, **more: object) -> OpenAILike:
    options = {"api_base": f"{url}/v1", "api_key": "none", "temperature": 0, "context_window": 2048, "timeout": 300}
    return OpenAILike(model=name, is_chat_model=True, max_tokens=max_tokens, **options, **more)


def test_an_answer_and_its_stream(url: str) -> None:
    llm, messages = model(url), [ChatMessage(role="user", content="Say hello.")]
    whole = llm.chat(messages).message.content
    assert whole
    assert "".join(piece.delta or "" for piece in llm.stream_chat(messages)) == whole
    assert asyncio.run(llm.achat(messages)).message.content == whole
    assert llm.complete("Say hello.").text


def test_a_completion_without_a_template(url: str) -> None:
    options = {"api_base": f"{url}/v1", "api_key": "none", "temperature": 0, "timeout": 300}
    llm = OpenAILike(model=MODEL, is_chat_model=False, max_tokens=4, **options)
    assert "Paris" in llm.complete("The capital of France is").text
    assert "".join(piece.delta or "" for piece in llm.stream_complete("The capital of France is"))


def test_a_tool_that_must_be_called(url: str) -> None:
    def weather(city: str) -> str:
        """The weather of a city."""
        return f"rain in {city}"

    llm = model(url, TOOLS, 80, is_function_calling_model=True)
    tools = [FunctionTool.from_defaults(weather)]
    answer = llm.chat_with_tools(tools, user_msg="What is the weather in Paris?", tool_choice="weather")
    (call,) = llm.get_tool_calls_from_response(answer)
    assert call.tool_name == "weather"
    assert call.tool_kwargs.keys() == {"city"}


def test_an_answer_in_the_form_of_a_type(url: str) -> None:
    llm = model(url, TOOLS, 80, is_function_calling_model=True, should_use_structured_outputs=True)
    found = llm.as_structured_llm(Animal).complete("A dog has four legs.")
    assert isinstance(found.raw, Animal)


def test_embeddings(url: str) -> None:
    llm = OpenAILikeEmbedding(model_name=EMBEDDING, api_base=f"{url}/v1", api_key="none", embed_batch_size=2)
    assert [len(vector) for vector in llm.get_text_embedding_batch(["a", "b", "c"])] == [384] * 3
    assert len(llm.get_query_embedding("a")) == 384
