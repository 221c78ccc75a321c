"""The body of a request to a server, from a request to an engine."""

from __future__ import annotations

import itertools
import json
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from app.inference.requests import ChatMessage, GenerateRequest, NamedTool
from app.kernel.errors import FailureReason, StepFailure


def body(request: GenerateRequest, model: str, *, llama_fields: bool) -> dict[str, Any]:
    """Return the JSON body of a request. Raises StepFailure when the server does not accept grammars."""
    sampling = request.sampling
    found: dict[str, Any] = {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
    }
    if not request.fits_context:  # otherwise the server's context is the limit
        found["max_tokens"] = request.max_tokens
    if request.prompt is not None:
        found["prompt"] = request.prompt
    else:
        found["messages"] = list(_messages(request.messages))
    if request.stop:
        found["stop"] = list(request.stop)
    if sampling.seed is not None:
        found["seed"] = sampling.seed
    if sampling.logit_bias:
        found["logit_bias"] = {str(token): max(-100, min(100, bias)) for token, bias in sampling.logit_bias.items()}
    if request.reasoning_effort is not None:
        found["reasoning_effort"] = request.reasoning_effort
    if request.schema is not None:
        schema = {"name": "answer", "schema": dict(request.schema), "strict": True}
        found["response_format"] = {"type": "json_schema", "json_schema": schema}
    if request.tools:
        found["tools"] = [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": dict(tool.parameters),
                },
            }
            for tool in request.tools
        ]
        found["tool_choice"] = request.tool_choice
        if isinstance(request.tool_choice, NamedTool):
            found["tool_choice"] = {"type": "function", "function": {"name": request.tool_choice.name}}
        found["parallel_tool_calls"] = request.parallel_calls
    if llama_fields:
        found |= {"top_k": sampling.top_k, "min_p": sampling.min_p, "typical_p": sampling.typical_p}
        if request.template_arguments:
            found["chat_template_kwargs"] = dict(request.template_arguments)
        found |= {"repeat_penalty": sampling.repeat_penalty, "repeat_last_n": sampling.penalty_last_n}
        if request.grammar is not None:
            found["grammar"] = request.grammar
    elif request.grammar is not None:
        raise StepFailure(FailureReason.INVALID_REQUEST, "the request has a grammar, which this server does not accept")
    return found


def _messages(messages: Sequence[ChatMessage]) -> Iterator[dict[str, Any]]:
    """Yield the messages as JSON. Tool results are matched with tool calls by their order."""
    count, waiting = itertools.count(1), deque[str]()
    for message in messages:
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tool_calls:
            waiting = deque(f"call_{next(count)}" for _ in message.tool_calls)
            functions = [
                {"name": call.name, "arguments": json.dumps(dict(call.arguments))} for call in message.tool_calls
            ]
            turn["tool_calls"] = [
                {"id": number, "type": "function", "function": call}
                for number, call in zip(waiting, functions, strict=True)
            ]
        elif message.role == "tool" and waiting:
            turn["tool_call_id"] = waiting.popleft()
        yield turn
