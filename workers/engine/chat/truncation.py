"""Truncation of conversations: the oldest turns that must be left out so that the rest fits the context."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace

from app.inference.requests import GenerateRequest


def truncated(request: GenerateRequest, tokens_of: Callable[[GenerateRequest], int], limit: int) -> GenerateRequest:
    """
    Return the request without its oldest turns, as few as possible, so that its prompt has at most `limit` tokens.

    A turn begins with a message of the user. The first system messages and the last turn are kept, so the prompt can
    still be too long. The prompt is computed for few of the turns.
    """
    count = next((at for at, one in enumerate(request.messages) if one.role != "system"), len(request.messages))
    system, others = request.messages[:count], request.messages[count:]
    starts = [0, *(at for at, message in enumerate(others) if at and message.role == "user")]

    def shortened(left_out: int) -> GenerateRequest:
        return replace(request, messages=(*system, *others[starts[left_out] :]))

    fits = bisect_left(range(len(starts) - 1), True, key=lambda left_out: tokens_of(shortened(left_out)) <= limit)
    return shortened(fits)
