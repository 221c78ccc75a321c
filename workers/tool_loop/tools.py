"""The tools of an agent: what is offered to the model, from the definition and from where the tools are."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from app import grammar, json_schema
from app.kernel.errors import FailureReason, InvalidInput, StepFailure
from app.workflows.language.agent import TOOL_NAME, AgentFields, AgentTool
from app.workflows.language.definition import Definition
from workers.tool_loop.record import OfferedTool

#: Most tools of one agent; more of them confuse models, and each takes room in every prompt.
MAX_TOOLS = 64
#: Most characters of a description that comes from elsewhere.
_DESCRIPTION = 4_000
#: The longest texts and lists in arguments whose schema allows longer ones than a grammar can count.
_TEXT, _ITEMS = 1_024, 64
_NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True)
class ToolDescription:
    """A tool as its source describes it."""

    name: str
    description: str
    parameters: Mapping[str, Any]


#: Returns the tools of a definition that its source describes. Raises StepFailure.
DescribeTool = Callable[[AgentTool], Sequence[ToolDescription]]


def offered(agent: AgentFields, describe: Mapping[str, DescribeTool]) -> tuple[list[OfferedTool], list[str]]:
    """Return the tools of an agent, and what is to be said about them. Raises StepFailure."""
    found: list[OfferedTool] = []
    warnings: list[str] = []
    for at, tool in enumerate(agent.tools):
        for one in _described(tool, describe):
            made, warning = _checked(OfferedTool(one.name, one.description[:_DESCRIPTION], one.parameters, at))
            found.append(made)
            warnings += [warning] if warning else []
            if len(found) > MAX_TOOLS:
                raise _refused(f"the agent has more than {MAX_TOOLS} tools: name those that it needs (`mcp.tools`)")
    names = [tool.name for tool in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise _refused(f"two tools have the name {twice!r}; names must be unique")
    return found, warnings


def workflow_schema(definition: Definition) -> dict[str, Any]:
    """The JSON Schema of the inputs of a workflow."""
    inputs = {name: dict(schema) for name, schema in definition.inputs.items()}
    required = [name for name, schema in inputs.items() if "default" not in schema]
    return {"type": "object", "properties": inputs, "required": required, "additionalProperties": False}


def argument_problems(tool: OfferedTool, arguments: Any) -> str:
    """What is wrong with the arguments of a call, for the model; empty when they conform."""
    problems = json_schema.value_problems(tool.parameters, arguments, "arguments")
    return "; ".join(f"{problem.where}: {problem.message}" for problem in problems)


def _described(tool: AgentTool, describe: Mapping[str, DescribeTool]) -> Iterator[ToolDescription]:
    if tool.http is not None:
        assert tool.name is not None, "the definition was checked"
        yield ToolDescription(tool.name, tool.description, tool.parameters or _NO_ARGUMENTS)
        return
    for one in describe[tool.source](tool):
        single = tool.called is not None
        name = tool.called if single and tool.called is not None else one.name
        yield ToolDescription(name, tool.description or one.description, one.parameters)


def _checked(tool: OfferedTool) -> tuple[OfferedTool, str]:
    if not re.search(TOOL_NAME, tool.name):
        raise _refused(f"{tool.name[:80]!r} is not a name of a tool: letters, digits, '_' and '-', at most 64")
    problems = json_schema.problems(tool.parameters, f"the parameters of {tool.name}", json_schema.Allowance())
    if problems:
        raise _refused("; ".join(map(str, problems[:3])))
    if tool.parameters.get("type") != "object":
        raise _refused(f"the parameters of {tool.name} are not of the type 'object'")
    why = _unenforceable(tool.parameters)
    if why is None:
        return tool, ""
    short = _shortened(tool.parameters)
    if _unenforceable(short) is None:
        return replace(tool, enforced=short), ""
    warning = f"the arguments of {tool.name} are checked after the model has written them, not while: {why}"
    properties = {
        name: schema if _unenforceable(schema) is None else {key: schema[key] for key in ("type",) if key in schema}
        for name, schema in short.get("properties", {}).items()
    }
    loose = {"type": "object", "properties": properties, "required": list(short.get("required", ()))}
    return replace(tool, enforced=loose if _unenforceable(loose) is None else {"type": "object"}), warning


def _unenforceable(schema: Mapping[str, Any]) -> str | None:
    """Why a grammar cannot enforce a schema; None where it can."""
    try:
        grammar.to_gbnf(schema)
    except InvalidInput as error:
        return str(error.problems[0])
    return None


def _shortened(schema: Any) -> Any:
    """The schema with texts and lists so short that a grammar can count them: what conforms to it conforms to both."""
    if isinstance(schema, list):
        return [_shortened(inner) for inner in schema]
    if not isinstance(schema, Mapping):
        return schema
    found = {key: _shortened(inner) for key, inner in schema.items()}
    for key, least, most in (("maxLength", "minLength", _TEXT), ("maxItems", "minItems", _ITEMS)):
        if isinstance(found.get(key), int) and found[key] > most >= found.get(least, 0):
            found[key] = most
    return found


def _refused(message: str) -> StepFailure:
    return StepFailure(FailureReason.INVALID_REQUEST, message)
