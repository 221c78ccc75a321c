"""The response as a document of OpenAI's API, made from its request and the chat completion that answers it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

from app.inference.openai.responses.request import ResponsesRequest
from app.kernel.errors import FailureReason

#: The beginning of the id of a response.
_PREFIX = "resp_"
_ID = re.compile(rf"^{_PREFIX}[0-9a-f]{{32}}\Z")


class ResponseStatus(StrEnum):
    """The state of a response."""

    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    #: The text was cut; `incomplete_details` says why.
    INCOMPLETE = "incomplete"
    FAILED = "failed"
    CANCELLED = "cancelled"


#: By finish reason of the text, why it is incomplete.
_INCOMPLETE: Mapping[str, str] = {"length": "max_output_tokens", "content_filter": "content_filter"}
#: Reasons of failures for which the request is at fault.
_INVALID = (FailureReason.INVALID_REQUEST, FailureReason.TEMPLATE_ERROR, FailureReason.CONTEXT_EXCEEDED)


def response_id(run_id: str) -> str:
    """The id of the response that a run answers."""
    return _PREFIX + digits_of(run_id)


def run_id_of(id_: str) -> str | None:
    """The id of the run of a response, as 32 hexadecimal digits; None for what is no id of a response."""
    return id_.removeprefix(_PREFIX) if _ID.match(id_) else None


def digits_of(run_id: str) -> str:
    """The id of a run without hyphens."""
    return run_id.replace("-", "")


def outline(request: ResponsesRequest, run_id: str, created: int, status: ResponseStatus) -> dict[str, Any]:
    """A response without output."""
    tools = [tool.model_dump(mode="json") for tool in request.tools or ()]
    choice = request.tool_choice
    form = request.text.format if request.text is not None and request.text.format is not None else None
    return {
        "id": response_id(run_id),
        "object": "response",
        "created_at": created,
        "status": status.value,
        "background": bool(request.background),
        "completed_at": None,
        "conversation": None if request.conversation is None else {"id": request.conversation.id},
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "metadata": request.metadata or {},
        "model": request.model,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "prompt_cache_key": request.prompt_cache_key,
        "reasoning": {"effort": None if request.reasoning is None else request.reasoning.effort, "summary": None},
        "safety_identifier": request.safety_identifier,
        "service_tier": request.service_tier or "default",
        "store": request.is_stored,
        "temperature": request.temperature,
        "text": {"format": {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_unset=True)},
        "tool_choice": choice if choice is None or isinstance(choice, str) else choice.model_dump(exclude_unset=True),
        "tools": tools,
        "top_logprobs": request.top_logprobs or 0,
        "top_p": request.top_p,
        "truncation": request.truncation or "disabled",
        "usage": None,
        "user": request.user,
    } | ({"tool_choice": "auto"} if choice is None else {})


def answered(
    request: ResponsesRequest, run_id: str, chat: Mapping[str, Any], output: Sequence[Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """The response that a chat completion answers. `output` are its items, if they are known already."""
    finish = chat["choices"][0]["finish_reason"]
    status = ResponseStatus.INCOMPLETE if finish in _INCOMPLETE else ResponseStatus.COMPLETED
    return {
        **outline(request, run_id, chat["created"], status),
        "incomplete_details": {"reason": _INCOMPLETE[finish]} if finish in _INCOMPLETE else None,
        "output": output_of(request, run_id, chat) if output is None else list(output),
        "usage": _usage(chat["usage"]),
    }


def failed(request: ResponsesRequest, run_id: str, created: int, reason: str, message: str) -> dict[str, Any]:
    """The response of a request that failed, or was cancelled."""
    if reason == FailureReason.CANCELLED:
        return outline(request, run_id, created, ResponseStatus.CANCELLED)
    error = {"code": "invalid_prompt" if reason in _INVALID else "server_error", "message": message}
    return {**outline(request, run_id, created, ResponseStatus.FAILED), "error": error}


def output_of(request: ResponsesRequest, run_id: str, chat: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The output items of a chat completion: its thinking, its text, then its tool calls."""
    choice = chat["choices"][0]
    message, calls = choice["message"], choice["message"].get("tool_calls") or ()
    found: list[dict[str, Any]] = []
    status = "incomplete" if choice["finish_reason"] in _INCOMPLETE else "completed"
    if thought := message.get("reasoning_content"):
        found.append(reasoning_item(run_id, "completed" if message["content"] or calls else status, thought))
    if message["content"] or not (calls or thought):
        logprobs = (choice["logprobs"] or {}).get("content") or ()
        shown = logprobs if request.wants_logprobs else ()
        found.append(message_item(run_id, status, [text_part(message["content"] or "", shown)]))
    for place, call in enumerate(calls):
        function = call["function"]
        found.append(call_item(run_id, place, "completed", call["id"], function["name"], function["arguments"]))
    return found


def text_part(text: str, logprobs: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """The content of a message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def reasoning_item(run_id: str, status: str, text: str | None) -> dict[str, Any]:
    """The item of the thinking; without a text, one that has just begun."""
    return {
        "id": f"rs_{digits_of(run_id)}",
        "type": "reasoning",
        "status": status,
        "summary": [],
        "content": [] if text is None else [reasoning_part(text)],
    }


def reasoning_part(text: str) -> dict[str, Any]:
    """The content of the thinking."""
    return {"type": "reasoning_text", "text": text}


def message_item(run_id: str, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    """The item of the text."""
    return {
        "id": f"msg_{digits_of(run_id)}",
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": content,
    }


def call_item(run_id: str, place: int, status: str, call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """The item of a tool call."""
    return {
        "id": f"fc_{digits_of(run_id)}_{place}",
        "type": "function_call",
        "status": status,
        "call_id": call_id,
        "name": name,
        "arguments": arguments,
    }


def input_items(request: ResponsesRequest, run_id: str) -> list[dict[str, Any]]:
    """The input items of a response, in their order, with ids."""
    return [
        {**_listed(item.model_dump(mode="json", exclude_unset=True)), "id": f"in_{digits_of(run_id)}_{place}"}
        for place, item in enumerate(request.input)
    ]


def _listed(item: dict[str, Any]) -> dict[str, Any]:
    """An item as a list shows it: the content of a message is a list of parts."""
    if item.setdefault("type", "message") == "message" and isinstance(item["content"], str):
        kind = "output_text" if item["role"] == "assistant" else "input_text"
        part = {"type": kind, "text": item["content"]}
        item["content"] = [part | ({"annotations": []} if kind == "output_text" else {})]
    return {"status": "completed", **item}


def _usage(usage: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
            "cache_write_tokens": 0,
        },
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {
            "reasoning_tokens": (usage.get("completion_tokens_details") or {}).get("reasoning_tokens", 0)
        },
        "total_tokens": usage["total_tokens"],
    }
