"""The execution of the calls of tools that the model of an agent has written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

from app.kernel.errors import FailureReason, StepFailure
from app.workflows.http import calls as http_calls
from app.workflows.language.agent import ARGUMENTS, AgentCall, AgentFields, AgentTool
from app.workflows.language.steps import CallFields
from app.workflows.state_machine.outcomes import Called, Success
from workers import outbound
from workers.tool_loop import http_requests, mcp_tools, memory_tools, python_tools, reading, sources, tools
from workers.tool_loop.agent_step import AgentTask
from workers.tool_loop.memory_tools import MemoryAccess
from workers.tool_loop.record import OfferedTool, Record, cut

#: Methods whose arguments are the query where the request does not say where they go.
_QUERY_METHODS = ("GET", "HEAD", "DELETE")

#: Executes a step that calls a workflow.
CallWorkflow = Callable[[Any, CallFields], Called]


def call(task: AgentTask, work: AgentCall, call_workflow: CallWorkflow) -> Success | Called:
    """
    Call a tool.

    Raises StepFailure, with `invalid_request` where the model must write the call otherwise; CancelledError.
    """
    agent, claim = work.agent, task.claim
    assert claim.parent_id is not None, "it is an item"
    written = claim.data["item"]
    name, arguments = written["tool"], written["arguments"]
    record = reading.read(task.runtime.runs.database, claim.parent_id, agent.limits.result_characters)
    offered = {tool.name: tool for tool in record.opening.tools}
    if name not in offered:
        message = f"there is no tool {name!r}; the tools are: {', '.join(offered)}"
        raise StepFailure(FailureReason.INVALID_REQUEST, message)
    problems = tools.argument_problems(offered[name], arguments)
    if problems:
        raise StepFailure(FailureReason.INVALID_REQUEST, f"the arguments of {name} do not conform: {problems}")
    tool = agent.tools[offered[name].at]
    timeout = min(tool.timeout, task.timeout)
    if tool.workflow is not None:
        fields = CallFields(kind="workflow", workflow=tool.workflow, version=tool.version)
        return replace(call_workflow(task, fields), inputs=arguments, deadline=timeout)
    if tool.memory:
        text = _of_memory(task, agent, record, name, arguments)
    else:
        text = _result(task, offered[name], tool, arguments, timeout)
    return Success(cut(text, agent.limits.result_characters))


def _result(
    task: AgentTask, offered: OfferedTool, tool: AgentTool, arguments: Mapping[str, Any], timeout: timedelta
) -> str:
    claim, on_stop = task.claim, task.holding.on_stop
    call_id = f"{claim.run_id}/{claim.key}"
    match tool.source:
        case "http":
            return _http(task, tool, arguments, call_id, timeout)
        case "python":
            assert tool.python is not None, "it is the source"
            return python_tools.call(tool.python, arguments, call_id, on_stop=on_stop, timeout=timeout)
        case "mcp":
            server = sources.mcp_server(task, tool, task.data)
            http = task.runtime.settings.http
            return mcp_tools.call(server, offered.name, arguments, call_id, http, on_stop=on_stop, timeout=timeout)
        case source:
            raise AssertionError(f"the source {source} has no calls")


def _of_memory(task: AgentTask, agent: AgentFields, record: Record, name: str, arguments: Mapping[str, Any]) -> str:
    claim, settings = task.claim, task.runtime.settings
    access = MemoryAccess(
        task.runtime.runs.database,
        task.runtime.recall,
        claim.namespace,
        record.opening.user,
        record.opening.conversation,
        settings.conversations,
        settings.blocks,
        task.data["run"]["workflow"],
        agent.model or "",
        str(claim.run_id),
        claim.key,
    )
    return memory_tools.call(access, name, arguments)


def _http(task: AgentTask, tool: AgentTool, arguments: Mapping[str, Any], call_id: str, timeout: timedelta) -> str:
    step = tool.http
    assert step is not None, "it is the source"
    secrets = task.runtime.secrets.reveal(http_calls.secret_names(http_requests.texts_of(step)))
    request = http_requests.call_of(step, {**task.data, ARGUMENTS: arguments}, secrets, timeout=timeout, key=call_id)
    if not (step.has_json or step.body is not None or step.query or "{{" in step.url):
        # Never as templates: the model has written them.
        if step.method in _QUERY_METHODS:
            texts = {name: one if isinstance(one, str) else json.dumps(one) for name, one in arguments.items()}
            request = replace(request, query=texts)
        else:
            request = replace(request, body=http_calls.json_body(dict(arguments)))
    response = outbound.call(request, settings=task.runtime.settings.http, on_stop=task.holding.on_stop)
    return response.body if isinstance(response.body, str) else json.dumps(response.body, ensure_ascii=False)
