"""Requests in OpenAI's form, with a real model: what is left out of a conversation that is too long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from app.inference.openai.chat import ChatRequest
from app.kernel.errors import FailureReason, StepFailure
from workers import openai_step
from workers.engine.engine import LlamaEngine


def conversation(turns: int, **more: Any) -> ChatRequest:
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Answer with a number."}]
    for turn in range(turns):
        messages.append({"role": "user", "content": f"The number of turn {turn} is {turn}. " * 5})
        messages.append({"role": "assistant", "content": str(turn)})
    messages.append({"role": "user", "content": "Which number is next?"})
    return ChatRequest.model_validate({"model": "m", "messages": messages, "max_tokens": 8, **more})


def test_truncation_leaves_out_the_oldest_turns(make: Callable[..., LlamaEngine]) -> None:
    engine = make(slots=1, context=512)
    short = openai_step.start(engine, conversation(0, truncation="auto"), "interactive", None).result(60)
    long = openai_step.start(engine, conversation(30, truncation="auto"), "interactive", None).result(60)
    assert short.tokens_in < 50
    assert 512 - 8 - 80 < long.tokens_in <= 512 - 8, "no more than needed is left out"
    with pytest.raises(StepFailure) as caught:
        openai_step.start(engine, conversation(30), "interactive", None)
    assert caught.value.reason is FailureReason.CONTEXT_EXCEEDED


def test_a_last_message_that_is_too_long_is_never_cut(make: Callable[..., LlamaEngine]) -> None:
    request = ChatRequest.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": "one two " * 500}], "truncation": "auto"}
    )
    with pytest.raises(StepFailure) as caught:
        openai_step.start(make(slots=1, context=512), request, "interactive", None)
    assert caught.value.reason is FailureReason.CONTEXT_EXCEEDED
