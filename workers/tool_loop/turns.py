"""
The request of a turn of the model, and what was written in it.

A model whose chat template has tools is asked with them (`native`). Otherwise each turn is JSON that a grammar forces:
a call, or the answer (`forced`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from app.inference.requests import ChatMessage, FinishReason, Generated, GenerateRequest, PriorityClass, Sampling, Tool
from app.kernel.errors import FailureReason, StepFailure
from app.workflows.language.agent import AgentFields
from workers.engine.chat import calls
from workers.tool_loop.record import FORM, PROMPTS, TOOLS, OfferedTool, Record

_HOW = """
To call a function, write {"tool": its name, "arguments": its arguments}. You get its result, and can then call another.
When you know the answer, write {"answer": the answer}.
The functions, with their arguments as JSON Schema:
"""


def request_of(
    agent: AgentFields, record: Record, mode: str, *, forced: bool, sampling: Sampling, priority: str, tokens: int
) -> GenerateRequest:
    """Return the request of a turn in that mode. `record` has what was before it."""
    messages = record.messages(agent.limits.result_characters)
    if mode in PROMPTS:
        messages.append(ChatMessage("user", PROMPTS[mode]))
    tools = record.opening.tools
    common = GenerateRequest(
        messages=tuple(messages),
        max_tokens=tokens,
        fits_context=True,
        sampling=sampling,
        priority=PriorityClass(priority),
    )
    schema = None if agent.output is None else agent.output.schema_
    if not forced:
        if mode == TOOLS:
            offered = tuple(Tool(one.name, one.description, one.enforced or one.parameters) for one in tools)
            return replace(common, tools=offered, parallel_calls=agent.parallel_tool_calls, keeps_cut=True)
        return replace(common, schema=schema if mode == FORM else None, keeps_cut=mode != FORM)
    answer: dict[str, Any] = {"type": "string", "maxLength": 1_900} if schema is None else dict(schema)
    alternatives = [_call(tool) for tool in tools] if mode == TOOLS else []
    alternatives.append({"answer": answer})
    forms = [
        {
            "type": "object",
            "properties": {
                name: calls.rebase(inner, f"#/anyOf/{at}/properties/{name}") for name, inner in properties.items()
            },
            "required": list(properties),
            "additionalProperties": False,
        }
        for at, properties in enumerate(alternatives)
    ]
    return replace(common, messages=_described(messages, tools), schema={"anyOf": forms}, keeps_cut=True)


def written(generated: Generated, *, forced: bool, schema: Any) -> dict[str, Any]:
    """Return the output of a turn: `text`, `tool_calls`, `finish_reason`, and `value` for an answer in its form."""
    finish = "tool_calls" if generated.tool_calls else generated.finish.value
    if not forced:
        found = [{"name": call.name, "arguments": dict(call.arguments)} for call in generated.tool_calls]
        return {"text": generated.text, "tool_calls": found, "finish_reason": finish}
    if generated.finish is FinishReason.LENGTH and not _is_whole(generated.text):
        return {"text": _beginning(generated.text), "tool_calls": [], "finish_reason": finish}
    value = json.loads(generated.text)
    if "answer" not in value:
        found = [{"name": value["tool"], "arguments": value["arguments"]}]
        return {"text": "", "tool_calls": found, "finish_reason": "tool_calls"}
    answer = value["answer"]
    text = answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
    about: dict[str, Any] = {"text": text, "tool_calls": [], "finish_reason": finish}
    return about if schema is None else {**about, "value": answer}


def _is_whole(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _beginning(text: str) -> str:
    """The beginning of an answer that was cut. Raises StepFailure for a call, which cannot be done in part."""
    found = re.match(r'\s*\{\s*"answer"\s*:\s*"((?:[^"\\]|\\[^u]|\\u[0-9a-fA-F]{4})*)', text)
    if found is None:
        raise StepFailure(FailureReason.TRUNCATED, "the turn was cut at max_tokens before its call was complete")
    return str(json.loads(f'"{found[1]}"'))


def is_forced(agent: AgentFields, *, native: bool) -> bool:
    """Whether the calls of an agent are forced by a grammar. Raises StepFailure for what the model does not have."""
    if agent.calls == "native" and not native:
        message = "the model's chat template has no tools: use `calls: auto` or `calls: forced`"
        raise StepFailure(FailureReason.INVALID_REQUEST, message)
    return agent.calls == "forced" or not native


def _call(tool: OfferedTool) -> dict[str, Any]:
    return {"tool": {"const": tool.name}, "arguments": dict(tool.enforced or tool.parameters)}


def _described(messages: Sequence[ChatMessage], tools: Sequence[OfferedTool]) -> tuple[ChatMessage, ...]:
    """The messages for a model whose template has no tools: calls and results are texts."""
    listed = "\n".join(
        json.dumps({"name": t.name, "description": t.description, "arguments": t.parameters}, ensure_ascii=False)
        for t in tools
    )
    system = ChatMessage("system", f"{_HOW.strip()}\n{listed}")
    if messages and messages[0].role == "system":
        system, messages = replace(system, content=f"{messages[0].content}\n\n{system.content}"), messages[1:]
    plain = [system]
    names: list[str] = []
    for message in messages:
        if message.role == "tool":
            name = names.pop(0) if names else "the function"
            plain.append(ChatMessage("user", f"The result of {name}:\n{message.content}"))
        elif message.tool_calls:
            names = [call.name for call in message.tool_calls]
            texts = [json.dumps({"tool": c.name, "arguments": dict(c.arguments)}) for c in message.tool_calls]
            plain.append(ChatMessage("assistant", "\n".join(filter(None, (message.content, *texts)))))
        elif message.role == "assistant":
            plain.append(ChatMessage("assistant", json.dumps({"answer": message.content}, ensure_ascii=False)))
        else:
            plain.append(message)
    return tuple(plain)
