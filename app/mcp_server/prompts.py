"""Prompts that users of MCP clients can choose, with what the model needs to know already in them."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import mcp_types as types

from app.mcp_server.api import Api, Refused

#: Most characters of an argument, and of the data in a prompt.
_MAX_ARGUMENT, _MAX_DATA = 4_000, 60_000


@dataclass(frozen=True, slots=True)
class ServedPrompt:
    """A prompt."""

    name: str
    description: str
    #: The arguments, all needed, with what they are.
    arguments: Mapping[str, str]
    text: Callable[[Api, Mapping[str, str]], Awaitable[str]]


async def _run(api: Api, given: Mapping[str, str]) -> str:
    run = quote(given["task_id"], safe="")
    found, history = await api.get(f"/v1/runs/{run}"), await api.get(f"/v1/runs/{run}/events", limit=200)
    return (
        "Explain why this run of a workflow ended as it did. Name the step that failed first, its cause in plain "
        "words, and what to change. Then say whether a retry would help.\n\nThe run:\n"
        + _data(found)
        + "\n\nIts history:\n"
        + _data(history)
    )


async def _model(api: Api, given: Mapping[str, str]) -> str:
    found, fleet = await api.get("/v1/fleet/explain", model=given["model"]), await api.get("/v1/fleet")
    return (
        "Say whether this model can be loaded now, what must be freed first, and which calls of manage_memory_reserves "
        "do it with the least harm to others.\n\nThe explanation:\n" + _data(found) + "\n\nThe fleet:\n" + _data(fleet)
    )


async def _workflow(api: Api, given: Mapping[str, str]) -> str:
    catalog, listed = await api.get("/v1/catalog"), await api.get("/v1/workflows")
    names = [model["name"] for model in catalog["models"]]
    return (
        f"Write an Arriero workflow in YAML that does this: {given['goal']}\n\nA workflow has `workflow` (a name), "
        "`inputs` (name to JSON Schema), and `steps`: each with `id`, `kind` (generate, map, transform, http, switch, "
        "wait and others), `needs`, and templates such as {{ inputs.text }} and {{ steps.first.output }}. Then start "
        "it with execute_automation_task and `definition`; problems come back with their place.\n\n"
        f"Models: {', '.join(names)}\n\nWorkflows that exist:\n{_data(listed)}"
    )


PROMPTS = (
    ServedPrompt("explain_run", "Why a task ended as it did", {"task_id": "the id of a run"}, _run),
    ServedPrompt("make_room_for_model", "How a model gets memory", {"model": "a model of the catalogue"}, _model),
    ServedPrompt("write_workflow", "A workflow for a goal", {"goal": "what it must do"}, _workflow),
)


def listed() -> list[types.Prompt]:
    """Return the prompts."""
    return [
        types.Prompt(
            name=prompt.name,
            description=prompt.description,
            arguments=[
                types.PromptArgument(name=name, description=text, required=True)
                for name, text in prompt.arguments.items()
            ],
        )
        for prompt in PROMPTS
    ]


async def filled(api: Api, name: str, given: Mapping[str, str]) -> types.GetPromptResult:
    """Return a prompt with its data. Raises Refused."""
    prompt = next((one for one in PROMPTS if one.name == name), None)
    if prompt is None:
        raise Refused(f"{name[:100]!r} is no prompt; accepted: {', '.join(one.name for one in PROMPTS)}", status=404)
    for argument, meaning in prompt.arguments.items():
        if not 0 < len(given.get(argument, "")) <= _MAX_ARGUMENT:
            raise Refused(f"argument {argument!r} ({meaning}) needs 1 to {_MAX_ARGUMENT} characters")
    content = types.TextContent(type="text", text=await prompt.text(api, given))
    return types.GetPromptResult(
        description=prompt.description, messages=[types.PromptMessage(role="user", content=content)]
    )


def _data(found: Any) -> str:
    text = json.dumps(found, ensure_ascii=False)
    return text if len(text) <= _MAX_DATA else f"{text[:_MAX_DATA]}… ({len(text)} characters in all)"
