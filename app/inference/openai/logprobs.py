"""Log-probabilities of tokens in the two forms of OpenAI's API: that of chat completions, and that of completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.inference.requests import TokenLogprob


def of_chat(found: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """The form of chat completions: an object for each token."""
    return [
        {**_piece(one.piece, one.logprob), "top_logprobs": [_piece(piece, logprob) for _, piece, logprob in one.top]}
        for one in found
    ]


def of_completion(found: Sequence[dict[str, Any]], offset: int = 0) -> dict[str, Any]:
    """
    The form of completions: parallel lists. `found` has the form of chat completions.

    `offset` is the number of characters before the first token.
    """
    ends = [offset]
    for one in found:
        ends.append(ends[-1] + len(one["token"]))
    return {
        "tokens": [one["token"] for one in found],
        "token_logprobs": [one["logprob"] for one in found],
        "top_logprobs": [{top["token"]: top["logprob"] for top in one["top_logprobs"]} for one in found],
        "text_offset": ends[:-1],
    }


def _piece(piece: bytes, logprob: float) -> dict[str, Any]:
    return {"token": piece.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(piece)}


def _finite(logprob: float) -> float:
    """OpenAI's own value for a token of no probability, because JSON has no infinity."""
    return max(logprob, -9999.0)
