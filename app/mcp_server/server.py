"""
The MCP server: what a client may list and call. It keeps nothing; who calls decides what `connect` may reach.

`connect` returns the API as the caller of a request: at `/mcp` with the key of the request, in `arriero mcp` with that
of the settings.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import mcp_types as types
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel.server import Server
from mcp.shared.exceptions import MCPError

from app import __version__
from app.mcp_server import automation, generation, memory, operations, prompts, resources, tasks
from app.mcp_server.api import Api, Refused
from app.mcp_server.tool import ReportProgress, ServedTool

#: Returns the API for the caller of a request.
Connect = Callable[[ServerRequestContext[Any, Any]], Api]

TOOLS: Mapping[str, ServedTool[Any]] = {
    tool.name: tool for tool in (*generation.TOOLS, *automation.TOOLS, *memory.TOOLS, *operations.TOOLS)
}
#: The beginning of the names of tools that are workflows.
WORKFLOW_PREFIX = "workflow_"
#: Seconds that a call of such a tool waits, and the argument by which a client chooses others.
_WAIT, _WAIT_ARGUMENT = 120.0, "wait_seconds"
#: Most workflows that are tools: clients show all of them to their model.
_MAX_WORKFLOWS = 100
#: Most characters of the text that stands beside a structured result, for clients that do not read that.
_MAX_TEXT = 100_000

_INSTRUCTIONS = """\
Arriero runs work on local language models: texts, code, workflows of many steps, conversations with memory.
Long work is a task with a task_id: it goes on when this connection ends. Resume, cancel or retry it with
execute_automation_task. An error says what is wrong, where, and what would be accepted."""


def serve(connect: Connect) -> Server[Any]:
    """Return the server."""

    @asynccontextmanager
    async def reached(context: ServerRequestContext[Any, Any]) -> AsyncIterator[Api]:
        api = connect(context)
        try:
            yield api
        except Refused as refused:
            code = types.INVALID_PARAMS if refused.status < 500 else types.INTERNAL_ERROR
            raise MCPError(code=code, message=str(refused)) from None
        finally:
            await api.close()

    async def list_tools(context: ServerRequestContext[Any, Any], _: Any) -> types.ListToolsResult:
        async with reached(context) as api:
            return types.ListToolsResult(tools=[*map(_listed, TOOLS.values()), *await _workflow_tools(api)])

    async def call_tool(
        context: ServerRequestContext[Any, Any], params: types.CallToolRequestParams
    ) -> types.CallToolResult:
        async with reached(context) as api:
            try:
                found = await _called(api, params.name, params.arguments or {}, context.session.report_progress)
            except Refused as refused:  # for the model, which may mend its call
                return types.CallToolResult(content=[_text(str(refused))], is_error=True)
        return types.CallToolResult(content=[_text(_shown(found))], structured_content=found)

    async def list_resources(context: ServerRequestContext[Any, Any], _: Any) -> types.ListResourcesResult:
        async with reached(context) as api:
            return types.ListResourcesResult(resources=await resources.listed(api))

    async def list_templates(_: ServerRequestContext[Any, Any], __: Any) -> types.ListResourceTemplatesResult:
        return types.ListResourceTemplatesResult(resource_templates=resources.templates())

    async def read_resource(
        context: ServerRequestContext[Any, Any], params: types.ReadResourceRequestParams
    ) -> types.ReadResourceResult:
        async with reached(context) as api:
            return types.ReadResourceResult(contents=[await resources.read(api, str(params.uri))])

    async def list_prompts(_: ServerRequestContext[Any, Any], __: Any) -> types.ListPromptsResult:
        return types.ListPromptsResult(prompts=prompts.listed())

    async def get_prompt(
        context: ServerRequestContext[Any, Any], params: types.GetPromptRequestParams
    ) -> types.GetPromptResult:
        async with reached(context) as api:
            return await prompts.filled(api, params.name, params.arguments or {})

    return Server(
        "arriero",
        version=__version__,
        title="Arriero",
        instructions=_INSTRUCTIONS,
        on_list_tools=list_tools,
        on_call_tool=call_tool,
        on_list_resources=list_resources,
        on_list_resource_templates=list_templates,
        on_read_resource=read_resource,
        on_list_prompts=list_prompts,
        on_get_prompt=get_prompt,
    )


async def _called(api: Api, name: str, given: Mapping[str, Any], progress: ReportProgress) -> dict[str, Any]:
    """Call a tool. Raises Refused."""
    if name.startswith(WORKFLOW_PREFIX):
        return await _call_workflow(api, name, given, progress)
    tool = TOOLS.get(name)
    if tool is None:
        raise Refused(f"{name[:100]!r} is no tool; accepted: {', '.join(TOOLS)}")
    return await tool.call(api, given, progress)


async def _workflow_tools(api: Api) -> Sequence[types.Tool]:
    """Return the workflows of the caller that ask to be tools."""
    listed = [one for one in (await api.get("/v1/workflows"))["workflows"] if one["tool"]]
    return [_workflow_tool(one) for one in listed[:_MAX_WORKFLOWS]]


def _workflow_tool(workflow: Mapping[str, Any]) -> types.Tool:
    inputs: Mapping[str, Any] = workflow["inputs"]
    waiting = {
        "type": "number",
        "minimum": 0,
        "maximum": 3600,
        "default": _WAIT,
        "description": "seconds to wait for the end",
    }
    schema = {
        "type": "object",
        "properties": {_WAIT_ARGUMENT: waiting, **inputs},
        "required": [name for name, one in inputs.items() if "default" not in one],
        "additionalProperties": False,
    }
    return types.Tool(
        name=f"{WORKFLOW_PREFIX}{workflow['name'].replace('-', '_')}",
        title=workflow["name"],
        description=workflow["description"] or f"Runs the workflow {workflow['name']}.",
        input_schema=schema,
        output_schema=tasks.TASK,
        annotations=types.ToolAnnotations(read_only_hint=False, destructive_hint=False, open_world_hint=True),
    )


async def _call_workflow(api: Api, tool: str, given: Mapping[str, Any], progress: ReportProgress) -> dict[str, Any]:
    """Run the workflow of a tool."""
    found = {
        f"{WORKFLOW_PREFIX}{one['name'].replace('-', '_')}": one
        for one in (await api.get("/v1/workflows"))["workflows"]
        if one["tool"]
    }
    workflow = found.get(tool)
    if workflow is None:
        raise Refused(f"{tool[:200]!r} is no tool; workflows that are: {', '.join(found) or 'none'}")
    inputs, seconds = dict(given), _WAIT
    if _WAIT_ARGUMENT not in workflow["inputs"]:
        asked = inputs.pop(_WAIT_ARGUMENT, _WAIT)
        if isinstance(asked, bool) or not isinstance(asked, int | float) or not 0 <= asked <= 3_600:
            raise Refused(f"{_WAIT_ARGUMENT}: {str(asked)[:80]!r} is no number of seconds; accepted: 0 to 3600")
        seconds = float(asked)
    return await tasks.start(api, {"workflow": workflow["name"], "inputs": inputs}, seconds, progress)


def _listed(tool: ServedTool[Any]) -> types.Tool:
    return types.Tool(
        name=tool.name,
        title=tool.title,
        description=tool.description,
        input_schema=tool.arguments.model_json_schema(),
        output_schema=dict(tool.output),
        annotations=types.ToolAnnotations(
            title=tool.title,
            read_only_hint=tool.reads_only,
            destructive_hint=tool.destroys,
            idempotent_hint=tool.idempotent,
            open_world_hint=False,
        ),
    )


def _text(text: str) -> types.TextContent:
    return types.TextContent(type="text", text=text)


def _shown(found: Mapping[str, Any]) -> str:
    text = json.dumps(found, ensure_ascii=False)
    if len(text) <= _MAX_TEXT:
        return text
    return f"{text[:_MAX_TEXT]}… (the structured result has all {len(text)} characters)"
