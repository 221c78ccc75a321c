"""
Answers of an engine as documents of OpenAI's API: whole ones, and the chunks of a stream.

The last event of a token stream carries the whole document, so a stream and a plain answer have the same counts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from app.inference.openai.chat import ChatRequest
from app.inference.openai.completion import CompletionRequest
from app.inference.requests import Generated, TokenLogprob, ToolCall

#: By kind: the prefix of the id, the object of the whole answer and that of a chunk.
_OBJECTS = {
    "chat": ("chatcmpl", "chat.completion", "chat.completion.chunk"),
    "completion": ("cmpl", "text_completion", "text_completion"),
}


def document(
    request: ChatRequest | CompletionRequest, generated: Generated, run_id: str, created: int
) -> dict[str, Any]:
    """The whole answer. `created` is in seconds since 1970."""
    chat = isinstance(request, ChatRequest)
    texts = (generated, *generated.alternatives)
    if chat:
        choices = [_chat_choice(index, text) for index, text in enumerate(texts)]
    else:
        echoed = request.prompt if isinstance(request, CompletionRequest) and request.echo else ""
        choices = [_text_choice(index, text, echoed) for index, text in enumerate(texts)]
    return {
        **heading("chat" if chat else "completion", request.model, run_id, created, whole=True),
        "choices": choices,
        "usage": usage(generated),
    }


def heading(kind: str, model: str, run_id: str, created: int, *, whole: bool) -> dict[str, Any]:
    """The fields that begin an answer and each of its chunks."""
    prefix, answer, chunk = _OBJECTS[kind]
    return {
        "id": f"{prefix}-{run_id.replace('-', '')}",
        "object": answer if whole else chunk,
        "created": created,
        "model": model,
        "system_fingerprint": None,
    }


def usage(generated: Generated) -> dict[str, Any]:
    """The token counts; those of the prompt count once, whatever the number of texts."""
    tokens_out = sum(text.tokens_out for text in (generated, *generated.alternatives))
    return {
        "prompt_tokens": generated.tokens_in,
        "completion_tokens": tokens_out,
        "total_tokens": generated.tokens_in + tokens_out,
        "prompt_tokens_details": {"cached_tokens": generated.tokens_cached},
    }


def _chat_choice(index: int, text: Generated) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text.text, "refusal": None}
    if text.tool_calls:
        message["content"] = text.text or None
        message["tool_calls"] = [_tool_call(call, index, place) for place, call in enumerate(text.tool_calls)]
    logprobs = {"content": [_logprob(one) for one in text.logprobs], "refusal": None} if text.logprobs else None
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": _finish(text)}


def _text_choice(index: int, text: Generated, echoed: str) -> dict[str, Any]:
    logprobs = _old_logprobs(text.logprobs) if text.logprobs else None
    return {"index": index, "text": echoed + text.text, "logprobs": logprobs, "finish_reason": _finish(text)}


def _finish(text: Generated) -> str:
    return "tool_calls" if text.tool_calls else text.finish.value


def _tool_call(call: ToolCall, index: int, place: int) -> dict[str, Any]:
    function = {"name": call.name, "arguments": json.dumps(dict(call.arguments), ensure_ascii=False)}
    return {"id": f"call_{index}_{place}", "type": "function", "function": function}


def _logprob(one: TokenLogprob) -> dict[str, Any]:
    top = [_piece(piece, logprob) for _, piece, logprob in one.top]
    return {**_piece(one.piece, one.logprob), "top_logprobs": top}


def _piece(piece: bytes, logprob: float) -> dict[str, Any]:
    return {"token": piece.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(piece)}


def _old_logprobs(found: Sequence[TokenLogprob]) -> dict[str, Any]:
    tokens = [one.piece.decode("utf-8", "replace") for one in found]
    ends = [0]
    for token in tokens:
        ends.append(ends[-1] + len(token))
    return {
        "tokens": tokens,
        "token_logprobs": [_finite(one.logprob) for one in found],
        "top_logprobs": [{p.decode("utf-8", "replace"): _finite(value) for _, p, value in one.top} for one in found],
        "text_offset": ends[:-1],
    }


def _finite(logprob: float) -> float:
    """OpenAI's own value for a token of no probability, because JSON has no infinity."""
    return max(logprob, -9999.0)
