"""Thinking in OpenAI's form: `reasoning_content`, its tokens, and the options that switch it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from pydantic import ValidationError

from app.inference.openai import answers, pieces
from app.inference.openai.chat import ChatRequest
from app.inference.openai.chunks import Chunks
from app.inference.requests import FinishReason, Generated, TextPiece

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
