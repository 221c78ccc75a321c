"""
Answers of an engine as documents of OpenAI's API: whole ones, and the chunks of a stream.

The last event of a token stream carries the whole document, so a stream and a plain answer have the same counts.
"""

from __future__ import annotations

import json
from typing import Any

from app.inference.openai import logprobs
from app.inference.openai.chat import ChatRequest
from app.inference.openai.completion import CompletionRequest
from app.inference.requests import Generated, ToolCall

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
        choices = [_chat_choice(index, text, run_id) for index, text in enumerate(texts)]
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
    texts = (generated, *generated.alternatives)
    tokens_out = sum(text.tokens_out for text in texts)
    details = {}
    if thought := sum(text.reasoning_tokens for text in texts):
        details["reasoning_tokens"] = thought
    if drafted := sum(text.tokens_drafted for text in texts):
        accepted = sum(text.tokens_accepted for text in texts)
        details |= {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": drafted - accepted}
    return {
        "prompt_tokens": generated.tokens_in,
        "completion_tokens": tokens_out,
        "total_tokens": generated.tokens_in + tokens_out,
        "prompt_tokens_details": {"cached_tokens": generated.tokens_cached},
        **({"completion_tokens_details": details} if details else {}),
    }


def call_id(run_id: str, index: int, place: int) -> str:
    """The id of a tool call: unique among all answers, because clients find its result by it in later requests."""
    return f"call_{run_id.replace('-', '')}_{index}_{place}"


def _chat_choice(index: int, text: Generated, run_id: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text.text, "refusal": None}
    if text.reasoning:
        message["reasoning_content"] = text.reasoning
    if text.tool_calls:
        message["content"] = text.text or None
        message["tool_calls"] = [
            _tool_call(call, call_id(run_id, index, place)) for place, call in enumerate(text.tool_calls)
        ]
    found = {"content": logprobs.of_chat(text.logprobs), "refusal": None} if text.logprobs else None
    return {"index": index, "message": message, "logprobs": found, "finish_reason": _finish(text)}


def _text_choice(index: int, text: Generated, echoed: str) -> dict[str, Any]:
    found = logprobs.of_completion(logprobs.of_chat(text.logprobs)) if text.logprobs else None
    return {"index": index, "text": echoed + text.text, "logprobs": found, "finish_reason": _finish(text)}


def _finish(text: Generated) -> str:
    return "tool_calls" if text.tool_calls else text.finish.value


def arguments_of(call: ToolCall) -> str:
    """The arguments of a tool call as JSON, as the model wrote them if that is known."""
    return call.written or json.dumps(dict(call.arguments), ensure_ascii=False)


def _tool_call(call: ToolCall, id_: str) -> dict[str, Any]:
    return {"id": id_, "type": "function", "function": {"name": call.name, "arguments": arguments_of(call)}}
