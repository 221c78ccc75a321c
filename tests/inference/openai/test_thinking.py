"""Thinking in OpenAI's form: `reasoning_content`, its tokens, and the options that switch it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from pydantic import ValidationError

from app.inference.openai import answers, pieces
from app.inference.openai.chat import ChatRequest
from app.inference.openai.chunks import Chunks
from app.inference.openai.responses import document as responses
from app.inference.openai.responses.events import ResponseEvents
from app.inference.openai.responses.request import ResponsesRequest
from app.inference.requests import FinishReason, Generated, TextPiece, ToolCall, ToolCallPiece

RUN = "00000000-0000-0000-0000-000000000001"
HELLO: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hello."}]}


def generated(**more: Any) -> Generated:
    none = timedelta(0)
    return Generated(**({"text": "Yes.", "finish": FinishReason.STOP, "tokens_in": 3, "tokens_out": 9,
                         "tokens_cached": 0, "time_to_first": none, "time_total": none} | more))  # fmt: skip


def test_an_answer_has_its_thinking_beside_the_content() -> None:
    thought = generated(reasoning="Hm.", reasoning_tokens=5)
    made = answers.document(ChatRequest.model_validate(HELLO), thought, RUN, 0)
    message = made["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("Yes.", "Hm.")
    assert made["usage"]["completion_tokens"] == 9
    assert made["usage"]["completion_tokens_details"] == {"reasoning_tokens": 5}
    plain = answers.document(ChatRequest.model_validate(HELLO), generated(), RUN, 0)
    assert "reasoning_content" not in plain["choices"][0]["message"]
    assert "completion_tokens_details" not in plain["usage"]


@pytest.mark.parametrize("received", range(5))
def test_chunks_have_all_of_the_thinking_once_whatever_was_received(received: int) -> None:
    """A reader that joined late, or lost pieces at the end, gets the rest with the end."""
    stream = [TextPiece("", reasoning="H"), TextPiece("", reasoning="m."), TextPiece("Ye"), TextPiece("s.")]
    whole = answers.document(ChatRequest.model_validate(HELLO), generated(reasoning="Hm.", reasoning_tokens=5), RUN, 0)
    chunks = Chunks("chat", "m", RUN, 0, includes_usage=True)
    sent = [chunk for piece in stream[:received] for chunk in chunks.pieces([pieces.document(piece)])]
    sent += chunks.last(whole)
    deltas = [chunk["choices"][0]["delta"] for chunk in sent if chunk["choices"]]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm."
    assert "".join(delta.get("content", "") for delta in deltas) == "Yes."
    assert not any("reasoning_content" in delta and delta.get("content") for delta in deltas)
    assert sent[-1]["usage"]["completion_tokens_details"] == {"reasoning_tokens": 5}


def test_a_piece_of_thinking_is_no_plain_text() -> None:
    assert pieces.is_plain(TextPiece("a"))
    assert not pieces.is_plain(TextPiece("", reasoning="a"))


@pytest.mark.parametrize("received", range(7))
def test_a_response_has_its_thinking_as_an_item_whatever_was_received(received: int) -> None:
    """The events end in the same items as the plain answer, in an order that clients can follow."""
    stream = [
        TextPiece("", reasoning="H"),
        TextPiece("", reasoning="m."),
        TextPiece("Ye", reasoning="!"),
        TextPiece("s."),
    ]
    stream += [TextPiece("", calls=(ToolCallPiece(0, "f", "{"),)), TextPiece("", calls=(ToolCallPiece(0, None, "}"),))]
    request = ResponsesRequest.model_validate({"model": "m", "input": "Hello.", "reasoning": {"effort": "low"}})
    call = ToolCall("f", {}, "{}")
    done = generated(reasoning="Hm.!", reasoning_tokens=5, tool_calls=(call,))
    chat = answers.document(ChatRequest.model_validate(HELLO), done, RUN, 0)
    events = ResponseEvents(request, RUN, 0)
    sent = [*events.begin(), *(one for piece in stream[:received] for one in events.pieces([pieces.document(piece)]))]
    sent += events.last(chat)
    whole = responses.answered(request, RUN, chat)
    assert sent[-1]["response"] == whole
    assert [item["type"] for item in whole["output"]] == ["reasoning", "message", "function_call"]
    assert whole["output"][0]["content"] == [{"type": "reasoning_text", "text": "Hm.!"}]
    assert whole["usage"]["output_tokens_details"] == {"reasoning_tokens": 5}
    assert whole["reasoning"]["effort"] == "low"
    deltas = [one["delta"] for one in sent if one["type"] == "response.reasoning_text.delta"]
    assert "".join(deltas) == "Hm.!"
    added = [one["output_index"] for one in sent if one["type"] == "response.output_item.added"]
    finished = [one["output_index"] for one in sent if one["type"] == "response.output_item.done"]
    assert added == finished == [0, 1, 2]


def test_a_response_that_was_cut_while_thinking_has_only_that() -> None:
    request = ResponsesRequest.model_validate({"model": "m", "input": "Hello."})
    cut = generated(text="", reasoning="Hm", reasoning_tokens=2, finish=FinishReason.LENGTH)
    chat = answers.document(ChatRequest.model_validate(HELLO), cut, RUN, 0)
    events = ResponseEvents(request, RUN, 0)
    sent = [*events.begin(), *events.last(chat)]
    assert sent[-1]["response"] == responses.answered(request, RUN, chat)
    (item,) = sent[-1]["response"]["output"]
    assert (item["type"], item["status"]) == ("reasoning", "incomplete")


def test_the_effort_of_a_response_is_that_of_its_chat() -> None:
    given = {"model": "m", "input": "Hello.", "reasoning": {"effort": "none"}, "chat_template_kwargs": {"a": 1}}
    request = ResponsesRequest.model_validate(given).translated(()).translated()
    assert (request.reasoning_effort, request.template_arguments) == ("none", {"a": 1})


def test_thinking_is_switched_by_the_request() -> None:
    given = {**HELLO, "chat_template_kwargs": {"enable_thinking": False, "budget": 3}, "reasoning_effort": "low"}
    request = ChatRequest.model_validate(given).translated()
    assert request.template_arguments == {"enable_thinking": False, "budget": 3}
    assert request.reasoning_effort == "low"
    assert ChatRequest.model_validate(HELLO).translated().template_arguments == {}


@pytest.mark.parametrize(
    "wrong",
    [
        {"chat_template_kwargs": {"messages": "x"}},
        {"chat_template_kwargs": {"__class__": "x"}},
        {"chat_template_kwargs": {"a" * 65: 1}},
        {"chat_template_kwargs": {"a": [1]}},
        {"chat_template_kwargs": {"a": {"b": 1}}},
        {"chat_template_kwargs": {"a": "x" * 1_001}},
        {"chat_template_kwargs": {"a": 2**60}},
        {"chat_template_kwargs": {"a": "\x00"}},
        {"chat_template_kwargs": {f"a{number}": 1 for number in range(17)}},
        {"chat_template_kwargs": "enable_thinking"},
        {"reasoning_effort": "very"},
    ],
)
def test_what_no_template_should_get_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ChatRequest.model_validate({**HELLO, **wrong})


def test_thinking_of_earlier_answers_is_accepted_and_not_sent_back() -> None:
    turn = {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}
    request = ChatRequest.model_validate({**HELLO, "messages": [*HELLO["messages"], turn, *HELLO["messages"]]})
    assert "Hm." not in str(request.translated().messages)
