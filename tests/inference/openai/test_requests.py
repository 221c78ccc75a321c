"""Requests in OpenAI's form: their translation, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from app.inference.openai.chat import ChatRequest
from app.inference.openai.completion import CompletionRequest
from app.inference.openai.embedding import EmbeddingsRequest
from app.inference.openai.generation import place_of
from app.inference.requests import ChatMessage, NamedTool, PriorityClass, ToolCall

HELLO = {"role": "user", "content": "Hello."}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def chat(**more: Any) -> ChatRequest:
    return ChatRequest.model_validate({"model": "m", "messages": [HELLO], **more})


def test_messages_keep_their_order_roles_and_calls() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Lima"}'}}
    request = chat(
        messages=[
            {"role": "developer", "content": "Be short."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "dry"},
        ]
    )
    assert request.translated().messages == (
        ChatMessage("system", "Be short."),
        ChatMessage("user", "ab"),
        ChatMessage("assistant", "", (ToolCall("weather", {"city": "Lima"}),)),
        ChatMessage("tool", "dry"),
    )


def test_without_a_limit_the_context_is_the_limit() -> None:
    assert chat().translated().fits_context
    limited = chat(max_tokens=5, max_completion_tokens=7).translated()
    assert (limited.max_tokens, limited.fits_context) == (7, False)


def test_parameters_reach_the_sampler() -> None:
    sampling = chat(temperature=0.5, top_k=3, seed=-1, logit_bias={"7": -100, "8": 1}).translated().sampling
    assert (sampling.temperature, sampling.top_k, sampling.seed) == (0.5, 3, 2**32 - 1)
    assert sampling.logit_bias == {7: float("-inf"), 8: 1}
    assert chat(top_p=0).translated().sampling.top_k == 1, "the most likely token alone"


@pytest.mark.parametrize(
    ("tier", "expected"), [("flex", "batch"), ("batch", "batch"), ("auto", "interactive"), (None, "interactive")]
)
def test_the_service_tier_is_the_class(tier: str | None, expected: str) -> None:
    assert chat(service_tier=tier).translated().priority == PriorityClass(expected)


def test_tools_and_the_chosen_one() -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    request = chat(tools=TOOLS, tool_choice=choice, parallel_tool_calls=False).translated()
    assert request.tool_choice == NamedTool("weather")
    assert not request.parallel_calls
    assert chat(tools=TOOLS).translated().tool_choice == "auto"


def test_forms_of_the_answer() -> None:
    assert chat(response_format={"type": "text"}).translated().schema is None
    assert chat(response_format={"type": "json_object"}).translated().schema == {"type": "object"}
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}, "strict": True}}
    assert chat(response_format=schema).translated().schema == {"type": "integer"}


@pytest.mark.parametrize(
    ("more", "place"),
    [
        ({"messages": [{"role": "user", "content": ["x"]}]}, ("messages", 0, "content", 0)),
        ({"messages": [{"role": "robot", "content": "x"}]}, ("messages", 0, "role")),
        ({"stop": [1]}, ("stop", 0)),
        ({"tool_choice": "any", "tools": TOOLS}, ("tool_choice",)),
        ({"logit_bias": {"x": 1}}, ("logit_bias", "x", "[key]")),
        ({"temperature": float("nan")}, ("temperature",)),
        ({"tools": [{"type": "retrieval"}]}, ("tools", 0, "type")),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, ()),
    ],
)
def test_the_place_of_an_error_is_that_of_the_field(more: dict[str, Any], place: tuple[int | str, ...]) -> None:
    with pytest.raises(ValidationError) as caught:
        chat(**more)
    assert place_of(caught.value.errors()[0]) == place


def test_a_prompt_is_one_text() -> None:
    assert CompletionRequest.model_validate({"model": "m", "prompt": ["once"]}).prompt == "once"
    for prompt in (["a", "b"], [1, 2], [], ""):
        with pytest.raises(ValidationError):
            CompletionRequest.model_validate({"model": "m", "prompt": prompt})


def test_texts_for_embeddings() -> None:
    assert EmbeddingsRequest.model_validate({"model": "m", "input": "a"}).translated().texts == ("a",)
    for given in ([], [""], [1], [[1]], None, "a\x00"):
        with pytest.raises(ValidationError):
            EmbeddingsRequest.model_validate({"model": "m", "input": given})
