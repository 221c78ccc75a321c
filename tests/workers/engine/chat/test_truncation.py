"""Truncation of conversations."""

from __future__ import annotations

import pytest

from app.inference.requests import ChatMessage, GenerateRequest
from workers.engine.chat.truncation import truncated

SYSTEM = ChatMessage("system", "be brief")
TURNS = [
    message
    for turn in range(5)
    for message in (
        ChatMessage("user", f"u{turn}"),
        ChatMessage("assistant", f"a{turn}"),
        ChatMessage("tool", f"t{turn}"),
    )
]


def characters(request: GenerateRequest) -> int:
    return sum(len(message.content) for message in request.messages)


@pytest.mark.parametrize(("limit", "first"), [(1000, "u0"), (38, "u0"), (37, "u1"), (26, "u2"), (25, "u3"), (3, "u4")])
def test_as_few_turns_as_possible_are_left_out(limit: int, first: str) -> None:
    found = truncated(GenerateRequest(messages=(SYSTEM, *TURNS)), characters, limit).messages
    assert found[0] == SYSTEM
    assert found[1].content == first
    assert found[1:] == tuple(TURNS[-len(found) + 1 :])
