"""
Tool grammars: the grammar that constrains a model's tool calls to the tools of the request.

With `auto` the model writes free text until a call begins (see `lazy_grammar`). With `required` or a named tool, the
text consists of calls from its beginning.
"""

from __future__ import annotations

import json
from typing import Any

from app.catalog.profiles.family import ToolCallStyle
from app.inference.requests import GenerateRequest, NamedTool, Tool
from app.kernel.errors import FailureReason, StepFailure
from workers.engine.chat import calls
from workers.engine.sampling.grammars import CompiledGrammar, GrammarCache

#: Most calls in one text, because a small model repeats itself.
MAX_CALLS = 16


def compile_tools(grammars: GrammarCache, request: GenerateRequest, style: ToolCallStyle | None) -> CompiledGrammar:
    """Return the grammar of calls of the request's tools. Raises StepFailure when the model cannot call tools."""
    names = [tool.name for tool in request.tools]
    if len(set(names)) < len(names):
        raise StepFailure(FailureReason.INVALID_REQUEST, "two tools have the same name; names must be unique")
    if style is None:
        message = "the model's chat template has no tools; set `tools` in its profile to 'hermes' or 'llama3'"
        raise StepFailure(FailureReason.INVALID_REQUEST, message)
    offered, limit = request.tools, MAX_CALLS if request.parallel_calls else 1
    if isinstance(request.tool_choice, NamedTool):
        offered, limit = tuple(tool for tool in offered if tool.name == request.tool_choice.name), 1
        if not offered:
            message = f"tool_choice names {request.tool_choice.name!r}; the tools are {', '.join(names)}"
            raise StepFailure(FailureReason.INVALID_REQUEST, message)
    schema = {"anyOf": [_call(tool, calls.ARGUMENTS[style], f"#/anyOf/{at}") for at, tool in enumerate(offered)]}
    source = grammars.gbnf_for_schema(schema)
    if style == "hermes":
        # Upper case avoids collisions: the schema converter uses lower-case rule names only.
        opening, closing = json.dumps(calls.OPENING), json.dumps(calls.CLOSING)
        source = source.replace("root ::=", "Call ::=", 1)
        source = f"Tagged ::= {opening} White Call White {closing}\nWhite ::= [ \\n]{{0,2}}\n{source}"
        more = f" (White Tagged){{0,{limit - 1}}}" if limit > 1 else ""
        source = f"root ::= Tagged{more}\n{source}"
    return grammars.for_gbnf(source)


def _call(tool: Tool, arguments: str, path: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "name": {"const": tool.name},
            arguments: calls.rebase(tool.parameters, f"{path}/properties/{arguments}"),
        },
        "required": ["name", arguments],
        "additionalProperties": False,
    }
