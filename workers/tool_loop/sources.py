"""Where tools are: workflows, Python, MCP servers, memory. How each describes its tools."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from app.kernel.errors import ArrieroError, FailureReason, StepFailure
from app.workflows import registry
from app.workflows.http import calls
from app.workflows.language.agent import AgentTool
from workers.tool_loop import mcp_tools, memory_tools, python_tools, tools
from workers.tool_loop.mcp_tools import McpServer
from workers.tool_loop.tools import ToolDescription

if TYPE_CHECKING:
    from workers.tool_loop.agent_step import AgentTask

#: For the description of the tools of a server.
_DESCRIBE_TIMEOUT = timedelta(seconds=60)


def mcp_server(task: AgentTask, tool: AgentTool, data: Mapping[str, Any]) -> McpServer:
    """Return the server of a tool: one of the operator, or that at an address. Raises StepFailure."""
    assert tool.mcp is not None, "it is a tool of a server"
    if tool.mcp.server is not None:
        return mcp_tools.server_of(task.runtime.settings.tools.mcp_file, tool.mcp.server)
    parts = {"url": tool.mcp.url, "headers": tool.mcp.headers}
    secrets = task.runtime.secrets.reveal(calls.secret_names(parts))
    filled = calls.render_texts(parts, data, secrets)
    return McpServer(url=filled["url"], headers=filled["headers"], secrets=tuple(secrets.values()))


def _of_workflow(task: AgentTask, tool: AgentTool) -> Sequence[ToolDescription]:
    assert tool.workflow is not None, "it is a workflow"
    try:
        found = registry.get(task.runtime.runs.database, tool.workflow, tool.version, namespace=task.claim.namespace)
    except ArrieroError as error:
        raise StepFailure(FailureReason.INVALID_REQUEST, str(error)) from error
    definition = found.definition
    return [ToolDescription(tool.workflow, definition.description, tools.workflow_schema(definition))]


def _of_python(task: AgentTask, tool: AgentTool) -> Sequence[ToolDescription]:
    assert tool.python is not None, "it is a Python tool"
    return [python_tools.describe(tool.python, on_stop=task.holding.on_stop)]


def _of_mcp(task: AgentTask, tool: AgentTool) -> Sequence[ToolDescription]:
    assert tool.mcp is not None, "it is a tool of a server"
    return mcp_tools.describe(
        mcp_server(task, tool, task.data),
        tool.mcp.tools,
        task.runtime.settings.http,
        on_stop=task.holding.on_stop,
        timeout=min(task.timeout, _DESCRIBE_TIMEOUT),
    )


#: By the kind of tool. HTTP tools are described in the workflow.
DESCRIBE: Mapping[str, Callable[[AgentTask, AgentTool], Sequence[ToolDescription]]] = {
    "workflow": _of_workflow,
    "python": _of_python,
    "mcp": _of_mcp,
    "memory": lambda _, tool: memory_tools.describe(tool.memory),
}
