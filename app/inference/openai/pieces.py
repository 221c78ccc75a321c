"""
Pieces of texts in token streams, as JSON: the text of a choice, its thinking, tool calls and log-probabilities.

A piece is `{"index", "text", "logprobs"?, "tool_calls"?, "reasoning"?}`; its parts have the form of chat completions.
"""

from __future__ import annotations

from typing import Any

from app.inference.openai import logprobs
from app.inference.requests import TextPiece


def document(piece: TextPiece) -> dict[str, Any]:
    """A piece as JSON."""
    made: dict[str, Any] = {"index": piece.index, "text": piece.text}
    if piece.logprobs:
        made["logprobs"] = logprobs.of_chat(piece.logprobs)
    if piece.reasoning:
        made["reasoning"] = piece.reasoning
    if piece.calls:
        made["tool_calls"] = [
            {
                "index": call.place,
                "function": {**({} if call.name is None else {"name": call.name}), "arguments": call.arguments},
            }
            for call in piece.calls
        ]
    return made


def is_plain(piece: TextPiece) -> bool:
    """Whether it is nothing but text of the first choice."""
    return not (piece.index or piece.logprobs or piece.calls or piece.reasoning)
